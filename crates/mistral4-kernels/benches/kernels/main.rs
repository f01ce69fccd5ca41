//! Timings of the heavy kernels at the sizes of a small and a medium model.
//!
//! Throughput is in floating-point operations per second, except for `matvec`, `quantized` with few rows, the
//! decoding cases and `optimizer`, which memory limits: there it is bytes of weights (or cache, or states) per second.
//! `MISTRAL4_ISA` picks an instruction set, `RAYON_NUM_THREADS` the threads. The machine's peaks are printed first.
mod packed;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mistral4_kernels::{
    Activation, AdamW, AdamW8bitState, AdamWState, AdamWWeight, Attention, AttentionDims, AttentionGrads,
    AttentionSaved, BLOCK_8BIT, Bits, DynamicMap, Element, ExpertDims, ExpertGrads, Experts, LinearDims,
    Quantized8bit, QuantizedExperts, QuantizedMatrix, Scheme, Segment, StackDims, adamw_step,
    adamw_step_8bit, adamw_step_master, attention, attention_backward, bf16, linear, linear_backward_input,
    linear_backward_weight, moe_experts, moe_experts_backward, moe_experts_backward_deferring,
    moe_experts_keeping, peak_bf16_gflops, peak_f32_gflops, quantized_experts, quantized_linear,
    read_bandwidth, sum_of_squares,
};
use std::time::Duration;

pub(crate) fn values<T: Element>(len: usize) -> Vec<T> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| T::from_f32(next())).collect()
}

fn name<T: Element>() -> &'static str {
    if T::IS_BF16 { "bf16" } else { "f32" }
}

fn gemm<T: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("gemm/{}", name::<T>()));
    for (rows, outputs, inputs) in
        [(512, 1024, 1024), (512, 4096, 1024), (512, 1024, 4096), (512, 4096, 4096)]
    {
        let dims = LinearDims { rows, inputs, outputs };
        let (x, w) = (values::<T>(rows * inputs), values::<T>(outputs * inputs));
        let (mut y, mut dx, mut dw) = (values::<T>(rows * outputs), x.clone(), w.clone());
        group.throughput(Throughput::Elements(2 * (rows * inputs * outputs) as u64));
        let id = |pass: &str| BenchmarkId::new(pass, format!("{rows}x{outputs}x{inputs}"));
        group.bench_function(id("forward"), |b| b.iter(|| linear(dims, &x, &w, &mut y)));
        group.bench_function(id("input"), |b| {
            b.iter(|| linear_backward_input(dims, &y, &w, &mut dx, false));
        });
        group.bench_function(id("weight"), |b| {
            b.iter(|| linear_backward_weight(dims, &y, &x, &mut dw, false));
        });
    }
}

fn matvec<T: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("matvec/{}", name::<T>()));
    let (outputs, inputs) = (8192, 4096);
    let w = values::<T>(outputs * inputs);
    for rows in [1, 2, 4, 8, 16] {
        let dims = LinearDims { rows, inputs, outputs };
        let (x, mut y) = (values::<T>(rows * inputs), values::<T>(rows * outputs));
        group.throughput(Throughput::Bytes((outputs * inputs * size_of::<T>()) as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| b.iter(|| linear(dims, &x, &w, &mut y)));
    }
}

const HYPER: AdamW = AdamW {
    lr: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    decoupled_weight_decay: true,
    grad_scale: 0.5,
};

/// One step of AdamW over 32 Mi parameters; throughput is in bytes read and written at least.
fn optimizer(c: &mut Criterion) {
    const LEN: usize = 32 << 20;
    let mut group = c.benchmark_group("optimizer");
    let (mut param, grad) = (values::<f32>(LEN), values::<f32>(LEN));
    let mut rounded = vec![bf16::ZERO; LEN];
    let (mut m, mut v) = (vec![0.0f32; LEN], vec![0.0f32; LEN]);
    group.throughput(Throughput::Bytes(4 * LEN as u64));
    group.bench_function("norm", |b| b.iter(|| sum_of_squares(&grad)));
    group.throughput(Throughput::Bytes(28 * LEN as u64));
    group.bench_function("f32", |b| {
        b.iter(|| {
            let (param, exp_avg, exp_avg_sq) = (&mut param[..], &mut m[..], &mut v[..]);
            adamw_step(&HYPER, 3, AdamWState { param, grad: &grad[..], exp_avg, exp_avg_sq });
        });
    });
    // The same with a copy of the parameter before and one thread that rounds after, as the trainer once did.
    group.throughput(Throughput::Bytes(30 * LEN as u64));
    group.bench_function("f32 master, copied and rounded apart", |b| {
        b.iter(|| {
            let mut copy = param.clone();
            let (param, exp_avg, exp_avg_sq) = (&mut copy[..], &mut m[..], &mut v[..]);
            adamw_step(&HYPER, 3, AdamWState { param, grad: &grad[..], exp_avg, exp_avg_sq });
            copy.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()
        });
    });
    group.bench_function("f32 master, bf16 parameter", |b| {
        b.iter(|| {
            let (param, exp_avg, exp_avg_sq) = (&mut param[..], &mut m[..], &mut v[..]);
            let state = AdamWState { param, grad: &grad[..], exp_avg, exp_avg_sq };
            adamw_step_master(&HYPER, 3, &mut rounded, state);
        });
    });
    drop((m, v));
    let (mut m, mut v) = (vec![bf16::ZERO; LEN], vec![bf16::ZERO; LEN]);
    group.throughput(Throughput::Bytes(20 * LEN as u64));
    group.bench_function("bf16 moments", |b| {
        b.iter(|| {
            let (param, exp_avg, exp_avg_sq) = (&mut param[..], &mut m[..], &mut v[..]);
            adamw_step(&HYPER, 3, AdamWState { param, grad: &grad[..], exp_avg, exp_avg_sq });
        });
    });
    group.throughput(Throughput::Bytes(14 * LEN as u64));
    let rounded_grad = vec![bf16::from_f32(1e-3); LEN];
    group.bench_function("all bf16", |b| {
        b.iter(|| {
            let (param, exp_avg, exp_avg_sq) = (&mut rounded[..], &mut m[..], &mut v[..]);
            adamw_step(&HYPER, 3, AdamWState { param, grad: &rounded_grad[..], exp_avg, exp_avg_sq });
        });
    });
    // What computing alone takes.
    const CACHED: usize = 1 << 17;
    group.throughput(Throughput::Bytes(14 * CACHED as u64));
    group.bench_function("all bf16, in the cache", |b| {
        b.iter(|| {
            let (param, grad) = (&mut rounded[..CACHED], &rounded_grad[..CACHED]);
            let (exp_avg, exp_avg_sq) = (&mut m[..CACHED], &mut v[..CACHED]);
            adamw_step(&HYPER, 3, AdamWState { param, grad, exp_avg, exp_avg_sq });
        });
    });
    drop((m, v));
    let (mut m, mut v) = (vec![DynamicMap::Signed.zero(); LEN], vec![0u8; LEN]);
    let (mut m_absmax, mut v_absmax) = (vec![0.0f32; LEN / BLOCK_8BIT], vec![0.0f32; LEN / BLOCK_8BIT]);
    group.throughput(Throughput::Bytes(16 * LEN as u64));
    group.bench_function("8-bit moments", |b| {
        b.iter(|| {
            let state = AdamW8bitState {
                param: &mut param,
                rounded: None,
                grad: &grad[..],
                exp_avg: Quantized8bit { codes: &mut m, absmax: &mut m_absmax },
                exp_avg_sq: Quantized8bit { codes: &mut v, absmax: &mut v_absmax },
            };
            adamw_step_8bit(&HYPER, 3, state);
        });
    });
}

/// A weight in bf16 with moments in bf16.
struct State([Vec<bf16>; 3]);

impl State {
    fn of(weight: &[bf16]) -> Self {
        Self([weight.to_vec(), vec![bf16::ZERO; weight.len()], vec![bf16::ZERO; weight.len()]])
    }

    fn weight(&mut self) -> AdamWWeight<'_, bf16, bf16> {
        let [param, exp_avg, exp_avg_sq] = &mut self.0;
        AdamWWeight { param, rounded: None, exp_avg, exp_avg_sq }
    }
}

fn experts(c: &mut Criterion) {
    let mut group = c.benchmark_group("experts/bf16");
    for (size, experts, hidden, inter) in [("small", 32, 512, 256), ("medium", 64, 1024, 512)] {
        let gate_up = values::<bf16>(experts * 2 * inter * hidden);
        let down = values::<bf16>(experts * hidden * inter);
        for tokens in [1, 512] {
            let dims = ExpertDims { tokens, top_k: 4, experts, hidden, inter };
            let x = values::<bf16>(tokens * hidden);
            // Four experts for each token, spread by a multiplicative hash.
            let expert = |i: usize| ((i / 4 * 2_654_435_761) >> 7).wrapping_add(i % 4 * 7) % experts;
            let indices: Vec<i32> = (0..tokens * 4).map(|i| expert(i) as i32).collect();
            let weights = vec![0.25; indices.len()];
            let input = Experts {
                dims,
                activation: Activation::Silu,
                x: &x[..],
                indices: &indices[..],
                weights: &weights,
                gate_up: &gate_up[..],
                down: &down[..],
            };
            let mut out = x.clone();
            let products = (tokens * 4 * 3 * hidden * inter) as u64;
            let bytes = Throughput::Bytes(2 * products);
            group.throughput(if tokens == 1 { bytes } else { Throughput::Elements(2 * products) });
            group.bench_function(BenchmarkId::new(format!("forward/{size}"), tokens), |b| {
                b.iter(|| moe_experts(&input, &mut out));
            });
            if tokens > 1 {
                let (mut dx, mut dweights) = (x.clone(), weights.clone());
                let (mut dgate_up, mut ddown) = (gate_up.clone(), down.clone());
                let mut kept = values::<bf16>(indices.len() * 2 * inter);
                group.bench_function(BenchmarkId::new(format!("forward keeping/{size}"), tokens), |b| {
                    b.iter(|| moe_experts_keeping(&input, &mut kept, &mut out));
                });
                group.throughput(Throughput::Elements(2 * products * 2));
                let mut backward = |dgate_up: &mut [bf16], ddown: &mut [bf16]| {
                    let (x_grad, weights) = (Some(&mut dx[..]), Some(&mut dweights[..]));
                    let (gate_up, down) = (Some(dgate_up), Some(ddown));
                    moe_experts_backward(
                        &input,
                        &kept,
                        &x,
                        ExpertGrads { x: x_grad, weights, gate_up, down },
                    );
                };
                group.bench_function(BenchmarkId::new(format!("backward/{size}"), tokens), |b| {
                    b.iter(|| backward(&mut dgate_up, &mut ddown));
                });
                let [mut gate_up_state, mut down_state] = [&gate_up, &down].map(|w| State::of(w));
                group.bench_function(BenchmarkId::new(format!("backward, then step/{size}"), tokens), |b| {
                    b.iter(|| {
                        backward(&mut dgate_up, &mut ddown);
                        for (state, grad) in [(&mut gate_up_state, &dgate_up), (&mut down_state, &ddown)] {
                            let AdamWWeight { param, exp_avg, exp_avg_sq, .. } = state.weight();
                            adamw_step(&HYPER, 3, AdamWState { param, grad: &grad[..], exp_avg, exp_avg_sq });
                        }
                    });
                });
                group.bench_function(BenchmarkId::new(format!("backward with step/{size}"), tokens), |b| {
                    b.iter(|| {
                        let (dx, dweights) = (Some(&mut dx[..]), Some(&mut dweights[..]));
                        let [gate_up, down] = moe_experts_backward_deferring(&input, &kept, &x, dx, dweights);
                        gate_up.step(&HYPER, 3, gate_up_state.weight());
                        down.step(&HYPER, 3, down_state.weight());
                        gate_up.square() + down.square()
                    });
                });
            }
        }
    }
}

fn schemes() -> [(&'static str, Scheme); 5] {
    let int = |bits, group_size, symmetric| Scheme::Int { bits, group_size, symmetric };
    [
        ("int8-128", int(Bits::Eight, 128, true)),
        ("int4-32", int(Bits::Four, 32, true)),
        ("int4-128", int(Bits::Four, 128, true)),
        ("int4-128-asymmetric", int(Bits::Four, 128, false)),
        ("fp8", Scheme::Fp8 { block: usize::MAX }),
    ]
}

fn quantized(dims: StackDims, scheme: Scheme) -> QuantizedMatrix {
    QuantizedMatrix::quantize(dims, scheme, &values::<bf16>(dims.elements())).expect("finite weights")
}

fn quantized_linears(c: &mut Criterion) {
    let (outputs, inputs) = (8192, 4096);
    for (name, scheme) in schemes() {
        let mut group = c.benchmark_group(format!("quantized/{name}"));
        let w = quantized(StackDims { matrices: 1, rows: outputs, columns: inputs }, scheme);
        for rows in [1, 4, 16, 512] {
            let (x, mut y) = (values::<bf16>(rows * inputs), values::<bf16>(rows * outputs));
            group.throughput(match rows {
                512 => Throughput::Elements(2 * (rows * inputs * outputs) as u64),
                _ => Throughput::Bytes(w.bytes() as u64),
            });
            group.bench_function(BenchmarkId::new("linear", rows), |b| {
                b.iter(|| quantized_linear(rows, &x, &w, &mut y));
            });
        }
        let (experts, hidden, inter) = (64, 1024, 512);
        let gate_up = quantized(StackDims { matrices: 2 * experts, rows: inter, columns: hidden }, scheme);
        let down = quantized(StackDims { matrices: experts, rows: hidden, columns: inter }, scheme);
        for tokens in [1, 512] {
            let dims = ExpertDims { tokens, top_k: 4, experts, hidden, inter };
            let x = values::<bf16>(tokens * hidden);
            let indices: Vec<i32> = (0..tokens * 4).map(|i| (i * 7 % experts) as i32).collect();
            let weights = vec![0.25; indices.len()];
            let (gate_up, down) = (&gate_up, &down);
            let (x, indices, activation) = (&x[..], &indices[..], Activation::Silu);
            let input = QuantizedExperts { dims, activation, x, indices, weights: &weights, gate_up, down };
            let mut out = x.to_vec();
            let used = (gate_up.bytes() + down.bytes()) * 4 / experts;
            let products = (tokens * 4 * 3 * hidden * inter) as u64;
            let bytes = Throughput::Bytes(used as u64);
            group.throughput(if tokens == 1 { bytes } else { Throughput::Elements(2 * products) });
            group.bench_function(BenchmarkId::new("experts", tokens), |b| {
                b.iter(|| quantized_experts(&input, &mut out));
            });
        }
    }
}

fn attentions(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention/bf16");
    for tokens in [512, 2048] {
        let (heads, width) = (16, 128);
        let [q, k, v] = [(); 3].map(|()| values::<bf16>(tokens * heads * width));
        let segments = [Segment { q: 0..tokens, k: 0..tokens, causal: Some(0) }];
        let dims = AttentionDims::contiguous(heads, heads, width, width);
        let input = Attention { dims, q: &q, k: &k, v: &v, segments: &segments, scale: 0.1 };
        let (mut out, mut lse) = (q.clone(), vec![0.0; tokens * heads]);
        let operations = (2 * tokens * (tokens + 1) * heads * width) as u64;
        group.throughput(Throughput::Elements(operations));
        group.bench_function(BenchmarkId::new("forward", tokens), |b| {
            b.iter(|| attention(&input, &mut out, &mut lse));
        });
        let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
        group.throughput(Throughput::Elements(operations * 5 / 2));
        group.bench_function(BenchmarkId::new("backward", tokens), |b| {
            b.iter(|| {
                let grads = AttentionGrads { q: &mut dq, k: &mut dk, v: &mut dv };
                attention_backward(&input, AttentionSaved { out: &out, lse: &lse }, &q, grads);
            });
        });
    }
    // Latent attention of one new token: 16 heads share a cache of 256 + 64 numbers a position.
    for keys in [512, 8192] {
        let dims = AttentionDims { v_stride: 320, ..AttentionDims::contiguous(16, 1, 320, 256) };
        let (q, cache) = (values::<bf16>(16 * 320), values::<bf16>(keys * 320));
        let segments = [Segment { q: 0..1, k: 0..keys, causal: None }];
        let input = Attention { dims, q: &q, k: &cache, v: &cache, segments: &segments, scale: 0.1 };
        let (mut out, mut lse) = (values::<bf16>(16 * 256), vec![0.0; 16]);
        group.throughput(Throughput::Bytes((keys * 320 * 2) as u64));
        group.bench_function(BenchmarkId::new("decode", keys), |b| {
            b.iter(|| attention(&input, &mut out, &mut lse));
        });
    }
}

fn kernels(c: &mut Criterion) {
    println!(
        "peaks: {:.0} GFLOP/s bf16, {:.0} GFLOP/s f32, {:.1} GB/s read",
        peak_bf16_gflops(),
        peak_f32_gflops(),
        read_bandwidth()
    );
    for (name, section) in SECTIONS {
        if is_asked_for(name) {
            section(c);
        }
    }
}

type Section = fn(&mut Criterion);

/// Sections by the first part of their benchmarks' names.
const SECTIONS: [(&str, Section); 8] = [
    ("gemm", |c| {
        gemm::<bf16>(c);
        gemm::<f32>(c);
    }),
    ("matvec", |c| {
        matvec::<bf16>(c);
        matvec::<f32>(c);
    }),
    ("experts", experts),
    ("quantized", quantized_linears),
    ("packed", |c| {
        packed::linears(c);
        packed::experts(c);
    }),
    ("decode", packed::decoded_layers),
    ("attention", attentions),
    ("optimizer", optimizer),
];

/// Whether a filter on the command line may mean something in a section: making its operands takes long.
fn is_asked_for(name: &str) -> bool {
    let elsewhere = |filter: &String| {
        SECTIONS.iter().any(|(other, _)| *other != name && filter.starts_with(&format!("{other}/")))
    };
    !std::env::args().skip(1).any(|argument| elsewhere(&argument))
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = kernels
}
criterion_main!(benches);
