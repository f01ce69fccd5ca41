//! Timings of products with packed weights, and of a decoded token's layer.
//!
//! Weights are many enough to come from memory, as a model's do: a pass goes on to the next copy each time.
use super::values;
use criterion::{BenchmarkId, Criterion, Throughput};
use mistral4_kernels::{
    Activation, Bits, DecodeAttentionDims, DecodeExperts, DecodeLayer, DecodeMla, DecodeMlp, DecodeNorm,
    DecodeToken, DecodeWeight, ExpertDims, PackedExperts, PackedMatrix, QuantizedMatrix, Rotary, RouterDims,
    Scheme, StackDims, bf16, decode_layer, packed_experts, packed_linear,
};
use std::sync::Arc;

/// Copies of a matrix that together leave no place for themselves in the caches.
fn copies(bytes: usize) -> usize {
    (256usize << 20).div_ceil(bytes).max(2)
}

/// Calls `f` with 0, 1, .. `count - 1` by turns.
fn in_turns(count: usize) -> impl FnMut() -> usize {
    let mut next = 0;
    move || {
        next = (next + 1) % count;
        next
    }
}

pub(crate) fn linears(c: &mut Criterion) {
    let mut group = c.benchmark_group("packed/linear");
    for (rows, outputs, inputs) in
        [(512, 512, 256), (512, 512, 512), (512, 1024, 1024), (512, 2048, 512), (1, 4096, 1024)]
    {
        let dims = StackDims { matrices: 1, rows: outputs, columns: inputs };
        let one = PackedMatrix::new(dims, &values::<bf16>(dims.elements()));
        let weights = vec![one; copies(2 * dims.elements())];
        let (x, mut y) = (values::<bf16>(rows * inputs), values::<bf16>(rows * outputs));
        let mut turn = in_turns(weights.len());
        group.throughput(match rows {
            1 => Throughput::Bytes(2 * dims.elements() as u64),
            _ => Throughput::Elements(2 * (rows * inputs * outputs) as u64),
        });
        group.bench_function(format!("{rows}x{outputs}x{inputs}"), |b| {
            b.iter(|| packed_linear(rows, &x, &weights[turn()], &mut y));
        });
    }
}

pub(crate) fn experts(c: &mut Criterion) {
    let mut group = c.benchmark_group("packed/experts");
    for (size, experts, hidden, inter) in [("small", 32, 512, 256), ("medium", 64, 1024, 512)] {
        let dims = StackDims { matrices: experts, rows: 2 * inter, columns: hidden };
        let gate_up = PackedMatrix::gated(dims, &values::<bf16>(dims.elements()));
        let dims = StackDims { matrices: experts, rows: hidden, columns: inter };
        let down = PackedMatrix::new(dims, &values::<bf16>(dims.elements()));
        let layers = vec![(gate_up, down); copies(6 * dims.elements())];
        let tokens = 512;
        let dims = ExpertDims { tokens, top_k: 4, experts, hidden, inter };
        let expert = |i: usize| ((i / 4 * 2_654_435_761) >> 7).wrapping_add(i % 4 * 7) % experts;
        let indices: Vec<i32> = (0..tokens * 4).map(|i| expert(i) as i32).collect();
        let (x, weights) = (values::<bf16>(tokens * hidden), vec![0.25; indices.len()]);
        let mut out = x.clone();
        let mut turn = in_turns(layers.len());
        group.throughput(Throughput::Elements((tokens * 4 * 6 * hidden * inter) as u64));
        group.bench_function(size, |b| {
            b.iter(|| {
                let (gate_up, down) = &layers[turn()];
                let (x, indices, activation) = (&x[..], &indices[..], Activation::Silu);
                let input = PackedExperts { dims, activation, x, indices, weights: &weights, gate_up, down };
                packed_experts(&input, &mut out);
            });
        });
    }
}

/// Sizes of a layer.
struct Size {
    name: &'static str,
    hidden: usize,
    q_rank: usize,
    attention: DecodeAttentionDims,
    experts: usize,
    inter: usize,
}

const fn attention([heads, nope, rope, rank, value_dim]: [usize; 5]) -> DecodeAttentionDims {
    DecodeAttentionDims { heads, nope, rope, rank, value_dim, interleaved: true, scale: 0.1 }
}

const SIZES: [Size; 2] = [
    Size {
        name: "small",
        hidden: 512,
        q_rank: 256,
        attention: attention([8, 32, 32, 128, 64]),
        experts: 32,
        inter: 256,
    },
    Size {
        name: "medium",
        hidden: 1024,
        q_rank: 512,
        attention: attention([16, 64, 64, 256, 128]),
        experts: 64,
        inter: 512,
    },
];

fn layer(size: &Size, scheme: Option<Scheme>) -> DecodeLayer {
    let stack = |matrices, rows, columns, is_gated: bool| {
        let dims = StackDims { matrices, rows, columns };
        let values = values::<bf16>(dims.elements());
        let halves = StackDims { matrices: 2 * matrices, rows: rows / 2, columns };
        match scheme {
            Some(scheme) => {
                let dims = if is_gated { halves } else { dims };
                let weight = QuantizedMatrix::quantize(dims, scheme, &values).expect("finite weights");
                DecodeWeight::Quantized(Arc::new(weight))
            }
            None if is_gated => DecodeWeight::Packed(Arc::new(PackedMatrix::gated(dims, &values))),
            None => DecodeWeight::Packed(Arc::new(PackedMatrix::new(dims, &values))),
        }
    };
    let one = |rows, columns| stack(1, rows, columns, false);
    let norm = |width| DecodeNorm { weight: vec![1.0; width], eps: 1e-6 };
    let (hidden, d) = (size.hidden, size.attention);
    DecodeLayer {
        input_layernorm: norm(hidden),
        self_attn: DecodeMla {
            dims: d,
            q_a: Some((one(size.q_rank, hidden), norm(size.q_rank))),
            q: one(d.heads * (d.nope + d.rope), size.q_rank),
            kv_a_proj_with_mqa: one(d.rank + d.rope, hidden),
            kv_a_layernorm: norm(d.rank),
            o_proj: one(hidden, d.heads * d.value_dim),
        },
        post_attention_layernorm: norm(hidden),
        experts: Some(DecodeExperts {
            router: RouterDims {
                tokens: 1,
                experts: size.experts,
                top_k: 4,
                n_group: 1,
                topk_group: 1,
                norm_topk_prob: true,
                routed_scaling_factor: 1.0,
            },
            gate: one(size.experts, hidden),
            e_score_correction_bias: vec![0.0; size.experts],
            gate_up_proj: stack(size.experts, 2 * size.inter, hidden, true),
            down_proj: stack(size.experts, hidden, size.inter, false),
        }),
        mlp: DecodeMlp {
            gate_proj: one(size.inter, hidden),
            up_proj: one(size.inter, hidden),
            down_proj: one(hidden, size.inter),
        },
        activation: Activation::Silu,
    }
}

pub(crate) fn decoded_layers(c: &mut Criterion) {
    let int4 = Scheme::Int { bits: Bits::Four, group_size: 32, symmetric: true };
    for size in SIZES {
        let d = size.attention;
        let active = size.hidden * (size.q_rank + d.rank + d.rope + d.heads * d.value_dim)
            + size.q_rank * d.heads * (d.nope + d.rope)
            + 5 * 3 * size.hidden * size.inter
            + d.rank * d.heads * (d.nope + d.value_dim)
            + size.experts * size.hidden;
        let kv_b = values::<bf16>(d.heads * (d.nope + d.value_dim) * d.rank);
        for (format, scheme, bytes) in [("bf16", None, 2.0), ("int4", Some(int4), 0.5625)] {
            let mut group = c.benchmark_group(format!("decode/{}/{format}", size.name));
            let first = layer(&size, scheme);
            let layers: Vec<DecodeLayer> = (0..16).map(|_| deep(&first)).collect();
            for slots in [1, 512, 4096] {
                let cached = values::<bf16>(slots * (d.rank + d.rope));
                let angles = vec![0.5f32; d.rope / 2];
                let rotary = Rotary { cos: &angles, sin: &angles, query_scale: 1.0 };
                let mut x = values::<bf16>(size.hidden);
                let (mut out, mut own) = (x.clone(), vec![bf16::ZERO; d.rank + d.rope]);
                let mut turn = in_turns(layers.len());
                group.throughput(Throughput::Bytes((active as f64 * bytes) as u64));
                group.bench_function(BenchmarkId::from_parameter(slots), |b| {
                    b.iter(|| {
                        let token = DecodeToken { x: &x, rotary, cached: &cached, kv_b: &kv_b };
                        decode_layer(&layers[turn()], &token, &mut out, &mut own);
                        // Other experts the next time.
                        x.rotate_left(1);
                    });
                });
            }
        }
    }
}

/// A copy with memory of its own.
fn deep(layer: &DecodeLayer) -> DecodeLayer {
    let mut copy = layer.clone();
    let attn = &mut copy.self_attn;
    let mlp = &mut copy.mlp;
    let experts = copy.experts.as_mut().expect("a layer with experts");
    let q_a = attn.q_a.as_mut().map(|(weight, _)| weight);
    let weights = [
        &mut attn.q,
        &mut attn.kv_a_proj_with_mqa,
        &mut attn.o_proj,
        &mut mlp.gate_proj,
        &mut mlp.up_proj,
        &mut mlp.down_proj,
        &mut experts.gate,
        &mut experts.gate_up_proj,
        &mut experts.down_proj,
    ];
    for weight in weights.into_iter().chain(q_a) {
        match weight {
            DecodeWeight::Packed(weight) => *weight = Arc::new(PackedMatrix::clone(weight)),
            DecodeWeight::Quantized(weight) => *weight = Arc::new(QuantizedMatrix::clone(weight)),
        }
    }
    copy
}
