//! Decoder layers of random weights.
use crate::support::Random;
use mistral4_kernels::{
    Activation, Bits, DecodeAttentionDims, DecodeExperts, DecodeLayer, DecodeMla, DecodeMlp, DecodeNorm,
    DecodeWeight, PackedMatrix, QuantizedMatrix, RouterDims, Scheme, StackDims, bf16,
};
use std::sync::Arc;

/// How the weights of a test are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Store {
    Packed,
    Quantized(Scheme),
    /// By turns, as where a checkpoint leaves some layers out.
    Mixed,
}

pub(crate) const INT4: Scheme = Scheme::Int { bits: Bits::Four, group_size: 32, symmetric: true };
pub(crate) const INT8: Scheme = Scheme::Int { bits: Bits::Eight, group_size: 64, symmetric: false };
pub(crate) const FP8: Scheme = Scheme::Fp8 { block: 128 };
pub(crate) const STORES: [Store; 5] =
    [Store::Packed, Store::Quantized(INT4), Store::Quantized(INT8), Store::Quantized(FP8), Store::Mixed];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) q_rank: Option<usize>,
    pub(crate) attention: DecodeAttentionDims,
    /// E, K and F, where there are experts.
    pub(crate) experts: Option<[usize; 3]>,
    pub(crate) shared: usize,
    pub(crate) slots: usize,
}

pub(crate) const fn attention(sizes: [usize; 5], interleaved: bool) -> DecodeAttentionDims {
    let [heads, nope, rope, rank, value_dim] = sizes;
    DecodeAttentionDims { heads, nope, rope, rank, value_dim, interleaved, scale: 0.17 }
}

pub(crate) struct Maker {
    pub(crate) random: Random,
    pub(crate) store: Store,
    pub(crate) made: usize,
}

impl Maker {
    fn stack(&mut self, matrices: usize, rows: usize, columns: usize, is_gated: bool) -> DecodeWeight {
        self.made += 1;
        let dims = StackDims { matrices, rows, columns };
        let values = self.random.values::<bf16>(dims.elements(), 1.5 / (columns as f32).sqrt());
        let scheme = match self.store {
            Store::Packed => None,
            Store::Quantized(scheme) => Some(scheme),
            Store::Mixed => self.made.is_multiple_of(2).then_some(INT8),
        };
        match scheme {
            Some(scheme) => {
                let dims = if is_gated {
                    StackDims { matrices: 2 * matrices, rows: rows / 2, columns }
                } else {
                    dims
                };
                DecodeWeight::Quantized(Arc::new(quantized(dims, scheme, &values)))
            }
            None if is_gated => DecodeWeight::Packed(Arc::new(PackedMatrix::gated(dims, &values))),
            None => DecodeWeight::Packed(Arc::new(PackedMatrix::new(dims, &values))),
        }
    }

    pub(crate) fn one(&mut self, rows: usize, columns: usize) -> DecodeWeight {
        self.stack(1, rows, columns, false)
    }

    pub(crate) fn norm(&mut self, width: usize) -> DecodeNorm {
        let weight = self.random.values::<f32>(width, 0.3).iter().map(|x| 1.0 + x).collect();
        DecodeNorm { weight, eps: 1e-6 }
    }

    pub(crate) fn layer(&mut self, s: &Sizes) -> DecodeLayer {
        let d = s.attention;
        let q_input = s.q_rank.unwrap_or(s.hidden);
        let q_a = s.q_rank.map(|rank| (self.one(rank, s.hidden), self.norm(rank)));
        let experts = s.experts.map(|[experts, top_k, inter]| DecodeExperts {
            router: RouterDims {
                tokens: 1,
                experts,
                top_k,
                n_group: 1,
                topk_group: 1,
                norm_topk_prob: true,
                routed_scaling_factor: 1.3,
            },
            gate: self.one(experts, s.hidden),
            e_score_correction_bias: self.random.values(experts, 0.1),
            gate_up_proj: self.stack(experts, 2 * inter, s.hidden, true),
            down_proj: self.stack(experts, s.hidden, inter, false),
        });
        DecodeLayer {
            input_layernorm: self.norm(s.hidden),
            self_attn: DecodeMla {
                dims: d,
                q_a,
                q: self.one(d.heads * (d.nope + d.rope), q_input),
                kv_a_proj_with_mqa: self.one(d.rank + d.rope, s.hidden),
                kv_a_layernorm: self.norm(d.rank),
                o_proj: self.one(s.hidden, d.heads * d.value_dim),
            },
            post_attention_layernorm: self.norm(s.hidden),
            experts,
            mlp: DecodeMlp {
                gate_proj: self.one(s.shared, s.hidden),
                up_proj: self.one(s.shared, s.hidden),
                down_proj: self.one(s.hidden, s.shared),
            },
            activation: Activation::Silu,
        }
    }
}

fn quantized(dims: StackDims, scheme: Scheme, values: &[bf16]) -> QuantizedMatrix {
    QuantizedMatrix::quantize(dims, scheme, values).expect("finite values")
}
