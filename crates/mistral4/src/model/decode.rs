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
use crate::ops::decode::DecodeWeights;

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
    fn decode_weight(&self) -> Option<DecodeWeight> {
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
    fn decode_norm(&self) -> DecodeNorm {
        DecodeNorm { weight: f32_values(self.weight.val()), eps: self.eps as f32 }
    }
}

fn f32_values(tensor: Tensor<1>) -> Vec<f32> {
    tensor.inner().into_data_as::<f32>().try_into_vec().expect("the tensor was just converted to f32")
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use mistral4_checkpoint::config::{Config, ConfigFile, ConfigOptions};
    use mistral4_checkpoint::weights::DType;
    use serde_json::json;

    use crate::inputs::{ForwardOptions, ModelInputs};
    use crate::model::moe::MoeOptions;
    use crate::weights::InitialSource;
    use crate::{LatentCache, Mistral4};

    /// Tokens go to all experts, because a choice between scores that differ by a rounding may fall either way.
    fn config(q_lora_rank: Option<usize>) -> Config {
        let raw = json!({
            "model_type": "mistral4", "vocab_size": 40, "hidden_size": 48, "intermediate_size": 56,
            "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
            "n_shared_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 4, "kv_lora_rank": 16,
            "q_lora_rank": q_lora_rank, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "initializer_range": 0.2, "max_position_embeddings": 256,
            "tie_word_embeddings": false,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5
            }
        });
        ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
    }

    /// Logits of tokens that follow a prompt one by one; asking for the routing keeps layers from running as one kernel.
    fn logits(model: &Mistral4, output_routing: bool) -> Vec<f32> {
        let options = ForwardOptions { output_routing, ..Default::default() };
        let mut cache = LatentCache::new();
        let mut logits = Vec::new();
        for ids in [vec![3, 1, 4, 1, 5], vec![9], vec![2], vec![6], vec![5], vec![3], vec![5], vec![8]] {
            let out = model.forward(&ModelInputs::rows(ids, 1), Some(&mut cache), &options).unwrap();
            logits.extend(out.logits.unwrap().into_data_as::<f32>().try_into_vec::<f32>().unwrap());
            assert_eq!(out.routing.len(), if output_routing { 2 } else { 0 });
        }
        logits
    }

    #[test]
    fn tokens_through_one_kernel_a_layer_are_as_through_its_steps() {
        for q_lora_rank in [Some(20), None] {
            let config = config(q_lora_rank);
            let source = InitialSource::new(&config, 11, DType::BF16);
            let model = Mistral4::new(&config, MoeOptions::default(), &source, &Device::flex()).unwrap();
            assert!(model.text().model.layers.iter().all(|layer| layer.decode.is_none()), "not frozen yet");
            let model = model.pack();
            let layers = &model.text().model.layers;
            assert!(layers.iter().all(|layer| layer.decode.is_some()));
            let (got, want) = (logits(&model, false), logits(&model, true));
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
            let error = norm(&mut got.iter().zip(&want).map(|(got, want)| got - want));
            let size = norm(&mut want.iter().copied());
            assert!(error < 2e-2 * size, "{error} of {size}");
        }
    }
}
