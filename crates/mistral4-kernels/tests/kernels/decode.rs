//! The step of a decoded token against its plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Activation, Bits, DecodeAttentionDims, DecodeExperts, DecodeLayer, DecodeMla, DecodeMlp, DecodeNorm,
    DecodeToken, DecodeWeight, PackedMatrix, QuantizedMatrix, Rotary, RouterDims, Scheme, StackDims, bf16,
    decode_layer, reference,
};
use std::sync::Arc;

/// How the weights of a test are stored.
#[derive(Clone, Copy, Debug)]
enum Store {
    Packed,
    Quantized(Scheme),
    /// By turns, as where a checkpoint leaves some layers out.
    Mixed,
}

const INT4: Scheme = Scheme::Int { bits: Bits::Four, group_size: 32, symmetric: true };
const INT8: Scheme = Scheme::Int { bits: Bits::Eight, group_size: 64, symmetric: false };
const FP8: Scheme = Scheme::Fp8 { block: 128 };
const STORES: [Store; 5] =
    [Store::Packed, Store::Quantized(INT4), Store::Quantized(INT8), Store::Quantized(FP8), Store::Mixed];

#[derive(Clone, Copy, Debug)]
struct Sizes {
    hidden: usize,
    q_rank: Option<usize>,
    attention: DecodeAttentionDims,
    /// E, K and F, where there are experts.
    experts: Option<[usize; 3]>,
    shared: usize,
    slots: usize,
}

const fn attention(sizes: [usize; 5], interleaved: bool) -> DecodeAttentionDims {
    let [heads, nope, rope, rank, value_dim] = sizes;
    DecodeAttentionDims { heads, nope, rope, rank, value_dim, interleaved, scale: 0.17 }
}

const SIZES: [Sizes; 4] = [
    Sizes {
        hidden: 64,
        q_rank: Some(32),
        attention: attention([4, 16, 8, 32, 16], true),
        experts: Some([8, 4, 32]),
        shared: 32,
        slots: 40,
    },
    Sizes {
        hidden: 37,
        q_rank: None,
        attention: attention([3, 5, 2, 9, 7], false),
        experts: Some([5, 2, 17]),
        shared: 19,
        slots: 0,
    },
    Sizes {
        hidden: 130,
        q_rank: Some(35),
        attention: attention([6, 33, 6, 70, 40], true),
        experts: None,
        shared: 77,
        slots: 700,
    },
    Sizes {
        hidden: 33,
        q_rank: Some(1),
        attention: attention([1, 1, 2, 1, 1], true),
        experts: Some([1, 1, 1]),
        shared: 1,
        slots: 255,
    },
];

struct Maker {
    random: Random,
    store: Store,
    made: usize,
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

    fn one(&mut self, rows: usize, columns: usize) -> DecodeWeight {
        self.stack(1, rows, columns, false)
    }

    fn norm(&mut self, width: usize) -> DecodeNorm {
        let weight = self.random.values::<f32>(width, 0.3).iter().map(|x| 1.0 + x).collect();
        DecodeNorm { weight, eps: 1e-6 }
    }

    fn layer(&mut self, s: &Sizes) -> DecodeLayer {
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

#[test]
fn decoded_tokens() {
    on_each_isa(|isa| {
        for (index, sizes) in SIZES.iter().enumerate() {
            for store in STORES {
                let mut maker = Maker { random: Random::new(7 + index as u64), store, made: 0 };
                let layer = maker.layer(sizes);
                let (d, random) = (sizes.attention, &mut maker.random);
                let x = random.values::<bf16>(sizes.hidden, 1.0);
                let cached = random.values::<bf16>(sizes.slots * (d.rank + d.rope), 1.0);
                let kv_b = random
                    .values::<bf16>(d.heads * (d.nope + d.value_dim) * d.rank, 1.0 / (d.rank as f32).sqrt());
                let angles = random.values::<f32>(d.rope / 2, 3.0);
                let (sin, cos): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| angle.sin_cos()).unzip();
                let rotary = Rotary { cos: &cos, sin: &sin, query_scale: 1.2 };
                let token = DecodeToken { x: &x, rotary, cached: &cached, kv_b: &kv_b };
                let outputs = || (poison::<bf16>(sizes.hidden), poison::<bf16>(d.rank + d.rope));
                let ((mut got, mut got_own), (mut want, mut want_own)) = (outputs(), outputs());
                decode_layer(&layer, &token, &mut got, &mut got_own);
                reference::decode_layer(&layer, &token, &mut want, &mut want_own);
                let what = format!("{isa:?} {store:?} {sizes:?}");
                assert_close(&what, &got, &want, tolerance::<bf16>());
                assert_close(&what, &got_own, &want_own, tolerance::<bf16>());

                let mut again = outputs();
                rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool").install(|| {
                    isa.run(|| decode_layer(&layer, &token, &mut again.0, &mut again.1));
                });
                assert_eq!((again.0, again.1), (got, got_own), "one thread, {what}");
            }
        }
    });
}
