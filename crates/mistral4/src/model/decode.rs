//! The weights of a decoder layer for decoding one token at a time, where all of them are frozen for inference.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use mistral4_kernels::{
    DecodeExperts, DecodeLayer, DecodeMla, DecodeMlp, DecodeNorm, DecodeWeight, PackedMatrix, StackDims,
};

use super::decoder_layer::{DecoderLayer, FeedForward};
use super::gate::Gate;
use super::linear::Linear;
use super::mla::Mla;
use super::mlp::Mlp;
use super::moe::Moe;
use super::norm::RmsNorm;
use super::weight::{ExpertWeight, LinearWeight, bf16_values, packs};
use crate::ops::activation::kernel_activation;

/// The weights of a layer, shared between the copies of a model.
pub(crate) type DecodeWeights = Arc<DecodeLayer>;

impl DecoderLayer {
    /// The layer's weights as the kernel for one token takes them; `None` where one of them is not frozen, has an adapter
    /// or a bias, or lies on several ranks.
    pub(super) fn decode_weights(&self) -> Option<DecodeWeights> {
        let (experts, mlp, activation) = match &self.mlp {
            FeedForward::Dense(mlp) => (None, mlp, mlp.act),
            FeedForward::Moe(moe) => (Some(moe.decode_experts()?), &moe.shared_experts, moe.experts.act),
        };
        Some(Arc::new(DecodeLayer {
            input_layernorm: self.input_layernorm.decode_norm(),
            self_attn: self.self_attn.decode_weights()?,
            post_attention_layernorm: self.post_attention_layernorm.decode_norm(),
            experts,
            mlp: mlp.decode_weights()?,
            activation: kernel_activation(activation),
        }))
    }
}

impl Mla {
    fn decode_weights(&self) -> Option<DecodeMla> {
        let kv_b = &self.kv_b_proj;
        let is_plain =
            matches!(&kv_b.weight, LinearWeight::Dense(weight) if weight.val().dtype() == DType::BF16);
        if !is_plain || kv_b.lora.is_some() || self.tensor_group.is_some() {
            return None;
        }
        let (q_a, q) = match (&self.q_proj, &self.q_a_proj, &self.q_a_layernorm, &self.q_b_proj) {
            (Some(q), ..) => (None, q),
            (None, Some(a), Some(norm), Some(b)) => (Some((a.decode_weight()?, norm.decode_norm())), b),
            _ => return None,
        };
        Some(DecodeMla {
            dims: self.decode_dims(),
            q_a,
            q: q.decode_weight()?,
            kv_a_proj_with_mqa: self.kv_a_proj_with_mqa.decode_weight()?,
            kv_a_layernorm: self.kv_a_layernorm.decode_norm(),
            o_proj: self.o_proj.decode_weight()?,
        })
    }
}

impl Mlp {
    fn decode_weights(&self) -> Option<DecodeMlp> {
        if self.tensor_group.is_some() {
            return None;
        }
        Some(DecodeMlp {
            gate_proj: self.gate_proj.decode_weight()?,
            up_proj: self.up_proj.decode_weight()?,
            down_proj: self.down_proj.decode_weight()?,
        })
    }
}

impl Moe {
    fn decode_experts(&self) -> Option<DecodeExperts> {
        let experts = &self.experts;
        let is_whole = self.expert_group.is_none() && self.tensor_group.is_none();
        let has_adapters = experts.gate_up_proj_lora.is_some() || experts.down_proj_lora.is_some();
        if !is_whole || has_adapters || self.gate.is_fake_balanced() {
            return None;
        }
        Some(DecodeExperts {
            router: self.gate.dims(1),
            gate: self.gate.decode_weight()?,
            e_score_correction_bias: f32_values(self.gate.e_score_correction_bias.val()),
            gate_up_proj: experts.gate_up_proj.decode_weight()?,
            down_proj: experts.down_proj.decode_weight()?,
        })
    }
}

impl Gate {
    fn decode_weight(&self) -> Option<DecodeWeight> {
        let weight = self.weight.val();
        let [rows, columns] = weight.dims();
        let dims = StackDims { matrices: 1, rows, columns };
        packs(&weight).then(|| DecodeWeight::Packed(Arc::new(PackedMatrix::new(dims, &bf16_values(weight)))))
    }
}

impl Linear {
    pub(crate) fn decode_weight(&self) -> Option<DecodeWeight> {
        match &self.weight {
            _ if self.lora.is_some() || self.bias.is_some() => None,
            LinearWeight::Dense(_) => None,
            LinearWeight::Packed(packed) => Some(DecodeWeight::Packed(packed.weight.clone())),
            LinearWeight::Quantized(quantized) => Some(DecodeWeight::Quantized(quantized.weight.clone())),
        }
    }
}

impl ExpertWeight {
    fn decode_weight(&self) -> Option<DecodeWeight> {
        match self {
            ExpertWeight::Dense(_) => None,
            ExpertWeight::Packed(packed) => Some(DecodeWeight::Packed(packed.weight.clone())),
            ExpertWeight::Quantized(quantized) => Some(DecodeWeight::Quantized(quantized.weight.clone())),
        }
    }
}

impl RmsNorm {
    pub(crate) fn decode_norm(&self) -> DecodeNorm {
        DecodeNorm { weight: f32_values(self.weight.val()), eps: self.eps as f32 }
    }
}

fn f32_values(tensor: Tensor<1>) -> Vec<f32> {
    tensor.inner().into_data_as::<f32>().try_into_vec().expect("the tensor was just converted to f32")
}
