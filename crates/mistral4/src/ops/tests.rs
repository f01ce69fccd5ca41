//! The fused operations against their composite bodies: outputs and every gradient, at odd sizes.

use super::*;
use burn::tensor::{DType, TensorData};

pub(super) fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    // A fixed sequence of its own: the backend's generator is shared by all tests of the process.
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
    };
    let data: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_data(TensorData::new(data, shape), &Device::flex())
}

pub(super) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.inner().into_data_as::<f32>().try_into_vec().unwrap()
}

pub(super) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    let diff = square(&mut got.iter().zip(want).map(|(g, w)| f64::from(g - w)));
    let norm = square(&mut want.iter().map(|w| f64::from(*w)));
    let error = (diff / norm.max(1e-30)).sqrt();
    assert!(error < tolerance, "{what}: relative error {error:.2e}");
}

/// Runs `op` on tracked copies of `inputs` and returns its output and the gradients of a random functional of it.
fn with_gradients<const N: usize, const D: usize>(
    inputs: [Tensor<1>; N],
    op: impl Fn([Tensor<1>; N]) -> Tensor<D>,
) -> Vec<Vec<f32>> {
    let leaves = inputs.map(|t| t.autodiff().require_grad());
    let out = op(leaves.clone());
    let seed = random(out.dims(), 99).cast(out.dtype()).autodiff();
    let mut grads = (out.clone() * seed).sum().backward();
    let mut all = vec![values(out)];
    all.extend(leaves.map(|leaf| values(leaf.grad_remove(&mut grads).expect("every input has a gradient"))));
    all
}

fn compare<const N: usize, const D: usize>(
    name: &str,
    inputs: [Tensor<1>; N],
    fused: impl Fn([Tensor<1>; N]) -> Tensor<D>,
    composite: impl Fn([Tensor<1>; N]) -> Tensor<D>,
) {
    compare_within(2e-6, name, inputs, fused, composite);
}

pub(super) fn compare_within<const N: usize, const D: usize>(
    tolerance: f64,
    name: &str,
    inputs: [Tensor<1>; N],
    fused: impl Fn([Tensor<1>; N]) -> Tensor<D>,
    composite: impl Fn([Tensor<1>; N]) -> Tensor<D>,
) {
    let (got, want) = (with_gradients(inputs.clone(), fused), with_gradients(inputs.clone(), &composite));
    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_close(&format!("{name}, output or gradient {index}"), got, want, tolerance);
    }
}

#[test]
fn the_routers_linear_map_equals_composite() {
    for dtypes in [[DType::F32; 2], [DType::BF16; 2], [DType::BF16, DType::F32]] {
        let (rows, inputs, outputs) = (13, 33, 17);
        let flat = [random([rows * inputs], 1), random([outputs * inputs], 2)];
        let shaped = |[x, w]: [Tensor<1>; 2]| {
            (x.reshape([rows, inputs]).cast(dtypes[0]), w.reshape([outputs, inputs]).cast(dtypes[1]))
        };
        let f32 = |t: Tensor<2>| t.cast(DType::F32);
        compare_within(
            // Gradients are rounded to the inputs' dtype.
            if dtypes[0] == DType::F32 { 2e-6 } else { 4e-3 },
            "linear in f32",
            flat,
            |flat| {
                let (x, w) = shaped(flat);
                linear_f32(x, w)
            },
            |flat| {
                let (x, w) = shaped(flat);
                composite::linear(f32(x), f32(w))
            },
        );
    }
}

#[test]
fn routing_weights_equal_composite() {
    let dims = RouterDims {
        tokens: 19,
        experts: 11,
        top_k: 3,
        n_group: 1,
        topk_group: 1,
        norm_topk_prob: true,
        routed_scaling_factor: 1.5,
    };
    let chosen: Vec<i32> =
        (0..dims.tokens * dims.top_k).map(|slot| (slot * 4 % dims.experts) as i32).collect();
    let indices = || {
        let chosen = TensorData::new(chosen.clone(), [dims.tokens, dims.top_k]);
        Tensor::<2, Int>::from_data(chosen, &Device::flex())
    };
    for dims in [dims, RouterDims { norm_topk_prob: false, ..dims }] {
        let shape = [dims.tokens, dims.experts];
        compare(
            "routing weights",
            [random([dims.tokens * dims.experts], 7)],
            |[logits]| routing_weights(logits.reshape(shape), indices(), dims),
            |[logits]| composite::routing_weights(logits.reshape(shape), indices(), dims),
        );
    }
}

#[test]
fn linear_equals_composite() {
    for (rows, inputs, outputs) in [(1, 7, 5), (13, 33, 17), (64, 48, 100)] {
        let flat = [random([rows * inputs], 1), random([outputs * inputs], 2)];
        compare(
            "linear",
            flat,
            |[x, w]| linear(x.reshape([rows, inputs]), w.reshape([outputs, inputs])),
            |[x, w]| composite::linear(x.reshape([rows, inputs]), w.reshape([outputs, inputs])),
        );
    }
}

#[test]
fn rms_norm_equals_composite() {
    let (rows, width) = (19, 37);
    compare(
        "rms_norm",
        [random([rows * width], 3), random([width], 4)],
        |[x, w]| rms_norm(x.reshape([rows, width]), w, 1e-2),
        |[x, w]| composite::rms_norm(x.reshape([rows, width]), w, 1e-2),
    );
}

#[test]
fn rope_equals_composite_in_both_layouts_with_and_without_scale() {
    let (tokens, heads, width, pairs) = (11, 3, 13, 4);
    let (cos, sin) = (random([tokens, pairs], 5), random([tokens, pairs], 6));
    for interleaved in [false, true] {
        for (offset, scale) in [(0, None), (5, Some((0..tokens).map(|t| 1.0 + t as f32).collect()))] {
            let spec = RopeSpec { offset, interleaved, scale };
            let tables = |x: &Tensor<1>| {
                let on = |t: &Tensor<2>| if x.is_autodiff() { t.clone().autodiff() } else { t.clone() };
                (on(&cos), on(&sin))
            };
            compare(
                "rope",
                [random([tokens * heads * width], 7)],
                |[x]| {
                    let (cos, sin) = tables(&x);
                    rope(x.reshape([tokens, heads, width]), cos, sin, spec.clone())
                },
                |[x]| {
                    let (cos, sin) = tables(&x);
                    composite::rope(x.reshape([tokens, heads, width]), cos, sin, spec.clone())
                },
            );
        }
    }
}

#[test]
fn attention_equals_composite_over_segments_with_gaps() {
    let (heads, kv_heads, width, v_width) = (4, 2, 9, 7);
    let segments: Arc<[Segment]> = vec![
        Segment { q: 0..5, k: 0..5, causal: Some(0) },
        Segment { q: 6..13, k: 5..19, causal: Some(7) },
        Segment { q: 13..20, k: 19..26, causal: None },
    ]
    .into();
    let (rows, keys) = (23, 26);
    let spec = AttentionSpec { scale: 0.3, segments };
    let flat = [
        random([rows * heads * width], 8),
        random([keys * kv_heads * width], 9),
        random([keys * kv_heads * v_width], 10),
    ];
    let shaped = |[q, k, v]: [Tensor<1>; 3]| {
        (
            q.reshape([rows, heads, width]),
            k.reshape([keys, kv_heads, width]),
            v.reshape([keys, kv_heads, v_width]),
        )
    };
    compare(
        "attention",
        flat,
        |inputs| {
            let (q, k, v) = shaped(inputs);
            attention(q, k, v, spec.clone())
        },
        |inputs| {
            let (q, k, v) = shaped(inputs);
            composite::attention(q, k, v, spec.clone())
        },
    );
}

#[test]
fn attention_reads_values_inside_of_keys() {
    // The absorbed form: values are a prefix of each key row, in the same memory.
    let (rows, heads, rank, rope) = (3, 4, 10, 6);
    let k = random([8, 1, rank + rope], 11);
    let q = random([rows, heads, rank + rope], 12);
    let v = k.clone().slice_dim(2, 0..rank);
    let segments: Arc<[Segment]> = vec![Segment { q: 0..3, k: 1..8, causal: Some(4) }].into();
    let spec = AttentionSpec { scale: 0.5, segments };
    let got = values(attention(q.clone(), k.clone(), v.clone(), spec.clone()));
    assert_close("absorbed attention", &got, &values(composite::attention(q, k, v, spec)), 1e-6);
}

#[test]
fn mla_attention_equals_composite() {
    let (tokens, heads, nope, rope, value_dim) = (20, 3, 5, 6, 7);
    let segments: Arc<[Segment]> =
        vec![Segment { q: 0..5, k: 0..5, causal: Some(0) }, Segment { q: 6..20, k: 6..20, causal: Some(0) }]
            .into();
    let spec = MlaSpec { attention: AttentionSpec { scale: 0.5, segments }, nope, value_dim };
    let flat = [
        random([tokens * heads * (nope + rope)], 37),
        random([tokens * heads * (nope + value_dim)], 38),
        random([tokens * rope], 39),
    ];
    let run = |[q, kv, k_pe]: [Tensor<1>; 3],
               op: fn(Tensor<3>, Tensor<3>, Tensor<2>, MlaSpec) -> Tensor<3>| {
        let q = q.reshape([tokens, heads, nope + rope]);
        let kv = kv.reshape([tokens, heads, nope + value_dim]);
        op(q, kv, k_pe.reshape([tokens, rope]), spec.clone())
    };
    compare("mla_attention", flat, |x| run(x, mla_attention), |x| run(x, composite::mla_attention));
}

#[test]
fn latent_attention_equals_composite_over_a_strided_cache() {
    let (tokens, heads, nope, rope, rank, value_dim) = (3, 4, 5, 6, 10, 7);
    // The cache has room for more slots than are read, as a growing cache has.
    let latents = random([9, rank + rope], 30).slice_dim(0, 0..8);
    let q = random([tokens, heads, nope + rope], 31);
    let kv_b = random([heads * (nope + value_dim), rank], 32);
    let segments: Arc<[Segment]> = vec![Segment { q: 0..3, k: 1..8, causal: Some(4) }].into();
    let spec = MlaSpec { attention: AttentionSpec { scale: 0.5, segments }, nope, value_dim };
    let got = values(latent_attention(q.clone(), latents.clone(), kv_b.clone(), spec.clone()));
    let want = values(composite::latent_attention(q.clone(), latents.clone(), kv_b.clone(), spec.clone()));
    assert_close("latent_attention", &got, &want, 1e-6);

    // Asked for a gradient, it gives one.
    let kv_b = kv_b.autodiff().require_grad();
    let out = latent_attention(q.autodiff(), latents.autodiff(), kv_b.clone(), spec);
    let mut grads = out.sum().backward();
    assert!(values(kv_b.grad_remove(&mut grads).unwrap()).iter().any(|&g| g != 0.0));
}

#[test]
fn gated_and_add_equal_composite() {
    let (rows, width) = (7, 13);
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let shaped = |x: Tensor<1>| x.reshape([rows, width]);
        compare(
            "gated",
            [random([rows * width], 33), random([rows * width], 34)],
            |[gate, up]| gated(shaped(gate), shaped(up), activation),
            |[gate, up]| composite::gated(shaped(gate), shaped(up), activation),
        );
        compare(
            "add",
            [random([rows * width], 35), random([rows * width], 36)],
            |[a, b]| add(shaped(a), shaped(b)),
            |[a, b]| shaped(a) + shaped(b),
        );
    }
}

#[test]
fn moe_experts_equals_composite_with_idle_experts() {
    let (tokens, hidden, inter, experts, top_k) = (17, 12, 9, 5, 2);
    // Expert 3 gets no token.
    let choice: Vec<i32> = (0..tokens * top_k).map(|i| [0, 4, 2, 1][(i * 7 + i / 3) % 4]).collect();
    let indices = Tensor::<2, Int>::from_data(TensorData::new(choice, [tokens, top_k]), &Device::flex());
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let flat = [
            random([tokens * hidden], 13),
            random([tokens * top_k], 14),
            random([experts * 2 * inter * hidden], 15),
            random([experts * hidden * inter], 16),
        ];
        let run = |[x, w, gate_up, down]: [Tensor<1>; 4], fused: bool| {
            let (x, w) = (x.reshape([tokens, hidden]), w.reshape([tokens, top_k]));
            let gate_up = gate_up.reshape([experts, 2 * inter, hidden]);
            let down = down.reshape([experts, hidden, inter]);
            let indices = indices.clone();
            match fused {
                true => moe_experts(x, indices, w, gate_up, down, activation, &Deferral::default()),
                false => composite::moe_experts(x, indices, w, gate_up, down, activation),
            }
        };
        compare("moe_experts", flat, |inputs| run(inputs, true), |inputs| run(inputs, false));
    }
}

#[test]
fn frozen_experts_get_no_gradient_and_their_input_still_does() {
    let (tokens, hidden, inter, experts) = (5, 8, 6, 3);
    let indices =
        Tensor::<2, Int>::from_data(TensorData::new(vec![0i32, 1, 2, 1, 0], [tokens, 1]), &Device::flex());
    let x = random([tokens, hidden], 17).autodiff().require_grad();
    let gate_up = random([experts, 2 * inter, hidden], 18).autodiff();
    let down = random([experts, hidden, inter], 19).autodiff();
    let weights = random([tokens, 1], 20).autodiff();
    let out = moe_experts(
        x.clone(),
        indices,
        weights,
        gate_up.clone(),
        down,
        Activation::Silu,
        &Deferral::default(),
    );
    let mut grads = out.sum().backward();
    assert!(gate_up.grad(&grads).is_none());
    assert!(values(x.grad_remove(&mut grads).unwrap()).iter().any(|&g| g != 0.0));
}

#[test]
fn grouped_linear_equals_composite_and_spares_frozen_weights() {
    let (inputs, outputs) = (12, 7);
    for offsets in [vec![0, 3, 3, 10, 11], vec![0, 0, 0, 5, 5]] {
        let (rows, offsets): (usize, Arc<[usize]>) = (offsets[4], offsets.into());
        let flat = [random([rows * inputs], 31), random([4 * outputs * inputs], 32)];
        let shaped = |[x, w]: [Tensor<1>; 2]| (x.reshape([rows, inputs]), w.reshape([4, outputs, inputs]));
        let of = |inputs| {
            let (x, w) = shaped(inputs);
            grouped_linear(x, w, offsets.clone())
        };
        compare("grouped_linear", flat.clone(), of, |inputs| {
            let (x, w) = shaped(inputs);
            composite::grouped_linear(x, w, &offsets)
        });
        let (x, w) = shaped(flat.map(Tensor::autodiff));
        let x = x.require_grad();
        let grads = grouped_linear(x.clone(), w.clone(), offsets.clone()).sum().backward();
        assert!(w.grad(&grads).is_none() && x.grad(&grads).is_some());
    }
}

#[test]
fn linear_cross_entropy_equals_composite_and_ignores_unlabelled_tokens() {
    let (tokens, hidden, vocab) = (21, 10, 33);
    let labels: Vec<i64> = (0..tokens as i64).map(|t| if t % 4 == 0 { -100 } else { t * 5 % 33 }).collect();
    let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [tokens]), &Device::flex());
    let inputs = || [random([tokens * hidden], 21), random([vocab * hidden], 22)];
    let shaped = |[h, w]: [Tensor<1>; 2]| {
        (h.reshape([tokens, hidden]) * 2.0, w.reshape([vocab, hidden]), labels.clone())
    };
    for scale in [(1.0, 0.0), (0.04, 0.2)].map(|(per_token, z_loss)| TokenLossScale { per_token, z_loss }) {
        let fused = |inputs| {
            let (h, w, labels) = shaped(inputs);
            linear_cross_entropy(h, w, labels, scale)
        };
        let composite = |inputs| {
            let (h, w, labels) = shaped(inputs);
            composite::linear_cross_entropy(h, w, labels, scale)
        };
        let name = format!("linear_cross_entropy, {scale:?}");
        compare(&name, inputs(), |inputs| fused(inputs).total, |inputs| composite(inputs).total);
        let (got, want) = (fused(inputs()), composite(inputs()));
        let (got_z, want_z) = (values(got.z_loss)[0], values(want.z_loss)[0]);
        assert!((got_z - want_z).abs() <= 1e-5 * want_z && (want_z > 1.0) == (scale.z_loss > 0.0));
        assert_close("cross entropy", &values(got.cross_entropy.clone()), &values(want.cross_entropy), 1e-5);
        let sum = (values(got.cross_entropy)[0] + got_z) * scale.per_token as f32;
        assert_close("total", &values(got.total), &[sum], 1e-5);
    }
}

#[test]
fn a_given_gradient_joins_those_of_other_terms() {
    let gradient = random([3, 5], 31);
    for dtype in [DType::F32, DType::BF16] {
        let gradient = gradient.clone().cast(dtype);
        for zero in [zero_with_gradient::<2>, composite::zero_with_gradient::<2>] {
            let x = random([3, 5], 30).cast(dtype).autodiff().require_grad();
            let zero = zero(x.clone() * 2.0, gradient.clone());
            assert_eq!(values(zero.clone()), [0.0]);
            let mut grads = (zero * 0.5 + x.clone().cast(DType::F32).sum()).backward();
            let want: Vec<f32> = values(gradient.clone()).iter().map(|gradient| gradient + 1.0).collect();
            assert_close("gradient", &values(x.grad_remove(&mut grads).unwrap()), &want, 4e-3);
        }
    }
}

#[test]
fn bf16_stays_within_its_rounding_of_f32() {
    let (tokens, hidden, out) = (16, 64, 48);
    let (x, w) = (random([tokens, hidden], 23), random([out, hidden], 24));
    let half = linear(x.clone().cast(DType::BF16), w.clone().cast(DType::BF16));
    assert_eq!(half.dtype(), DType::BF16);
    assert_close("bf16 linear", &values(half), &values(linear(x, w)), 1e-2);
}

#[test]
fn the_test_sequence_is_not_constant() {
    let v = values(random([100], 1));
    assert!(v.iter().any(|x| *x > 0.5) && v.iter().any(|x| *x < -0.5));
}

#[test]
fn packed_weights_give_what_dense_ones_do() {
    use super::packed::{packed_experts, packed_linear, unpacked};
    use mistral4_kernels::{PackedMatrix, StackDims};
    let bf16 = |t: Tensor<1>| t.cast(DType::BF16);
    let host = |t: Tensor<1>| t.into_data().try_into_vec::<half::bf16>().unwrap();

    let (rows, inputs, outputs) = (13, 33, 40);
    let x = bf16(random([rows * inputs], 1)).reshape([rows, inputs]);
    let flat = bf16(random([outputs * inputs], 2));
    let packed =
        PackedMatrix::new(StackDims { matrices: 1, rows: outputs, columns: inputs }, &host(flat.clone()));
    let (packed, weight) = (Arc::new(packed), flat.reshape([outputs, inputs]));
    let restored: Tensor<2> = unpacked(&packed, &Device::flex()).reshape([outputs, inputs]);
    assert_eq!(restored.into_data(), weight.clone().into_data());
    let want = values(composite::linear(x.clone(), weight));
    assert_close("packed linear", &values(packed_linear(x.clone(), &packed)), &want, 4e-3);
    // A tensor that asks for gradients goes through the unpacked weight.
    let x = x.autodiff().require_grad();
    let y = packed_linear(x.clone(), &packed);
    assert_close("tracked", &values(y.clone()), &want, 4e-3);
    assert!(x.grad_remove(&mut y.sum().backward()).is_some());

    let (tokens, experts, hidden, inter) = (7, 3, 20, 18);
    let x = bf16(random([tokens * hidden], 3)).reshape([tokens, hidden]);
    let flat = [bf16(random([experts * 2 * inter * hidden], 4)), bf16(random([experts * hidden * inter], 5))];
    let stack = |rows, columns| StackDims { matrices: experts, rows, columns };
    let gate_up = Arc::new(PackedMatrix::gated(stack(2 * inter, hidden), &host(flat[0].clone())));
    let down = Arc::new(PackedMatrix::new(stack(hidden, inter), &host(flat[1].clone())));
    let chosen = TensorData::new((0..tokens * 2).map(|i| (i % 3) as i32).collect::<Vec<_>>(), [tokens, 2]);
    let indices = Tensor::<2, Int>::from_data(chosen, &Device::flex());
    let weights = random([tokens, 2], 6);
    let [dense_gate_up, dense_down] = flat;
    let want = composite::moe_experts(
        x.clone(),
        indices.clone(),
        weights.clone(),
        dense_gate_up.reshape([experts, 2 * inter, hidden]),
        dense_down.reshape([experts, hidden, inter]),
        Activation::Silu,
    );
    let got = packed_experts(x, indices, weights, [&gate_up, &down], Activation::Silu);
    assert_close("packed experts", &values(got), &values(want), 1e-2);
}
