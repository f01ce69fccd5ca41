//! The fused operations with quantised weights against dense composite ones: outputs and gradients.

use super::*;
use crate::ops::tests::{assert_close, compare_within, random, values};
use mistral4_kernels::{Bits, Scheme};

fn quantized(dims: StackDims, scheme: Scheme, seed: u64) -> QuantizedWeight {
    let values = values(random([dims.elements()], seed));
    Arc::new(QuantizedMatrix::quantize(dims, scheme, &values).unwrap())
}

fn schemes() -> [Scheme; 3] {
    let int = |bits, symmetric| Scheme::Int { bits, group_size: 32, symmetric };
    [int(Bits::Four, false), int(Bits::Eight, true), Scheme::Fp8 { block: 1000 }]
}

/// The dense values of a stack, on the backend of `x`.
fn dense_like(weight: &QuantizedMatrix, x: &Tensor<2>) -> Tensor<3> {
    let dense = dense(weight, x.dtype(), &x.device());
    if x.is_autodiff() { dense.autodiff() } else { dense }
}

#[test]
fn linear_equals_composite() {
    for scheme in schemes() {
        for (rows, inputs, outputs) in [(1, 40, 5), (13, 33, 17)] {
            let weight = quantized(StackDims { matrices: 1, rows: outputs, columns: inputs }, scheme, 1);
            compare_within(
                1e-4,
                &format!("{scheme:?}"),
                [random([rows * inputs], 2)],
                |[x]| quantized_linear(x.reshape([rows, inputs]), &weight),
                |[x]| {
                    let x: Tensor<2> = x.reshape([rows, inputs]);
                    let dense = dense_like(&weight, &x).reshape([outputs, inputs]);
                    composite::linear(x, dense)
                },
            );
        }
    }
}

#[test]
fn grouped_linear_equals_composite_with_idle_experts() {
    let (parts, outputs, inputs) = (2, 11, 43);
    let offsets: Arc<[usize]> = [0, 0, 9, 9, 10, 21].into();
    for scheme in schemes() {
        let weight = quantized(StackDims { matrices: 5 * parts, rows: outputs, columns: inputs }, scheme, 9);
        compare_within(
            1e-4,
            &format!("{scheme:?}"),
            [random([21 * inputs], 10)],
            |[x]| quantized_grouped_linear(x.reshape([21, inputs]), &weight, offsets.clone()),
            |[x]| {
                let x: Tensor<2> = x.reshape([21, inputs]);
                let dense = dense_like(&weight, &x).reshape([5, parts * outputs, inputs]);
                composite::grouped_linear(x, dense, &offsets)
            },
        );
    }
}

#[test]
fn experts_equal_composite_with_idle_experts() {
    let (tokens, hidden, inter, experts, top_k) = (17, 48, 35, 5, 2);
    // Expert 3 gets no token.
    let choice: Vec<i32> = (0..tokens * top_k).map(|i| [0, 4, 2, 1][(i * 7 + i / 3) % 4]).collect();
    let indices = Tensor::<2, Int>::from_data(TensorData::new(choice, [tokens, top_k]), &Device::flex());
    for scheme in schemes() {
        let weights = QuantizedExpertWeights {
            gate_up: quantized(StackDims { matrices: 2 * experts, rows: inter, columns: hidden }, scheme, 3),
            down: quantized(StackDims { matrices: experts, rows: hidden, columns: inter }, scheme, 4),
        };
        let shaped = |[x, w]: [Tensor<1>; 2]| -> (Tensor<2>, Tensor<2>) {
            (x.reshape([tokens, hidden]), w.reshape([tokens, top_k]))
        };
        compare_within(
            2e-4,
            &format!("{scheme:?}"),
            [random([tokens * hidden], 5), random([tokens * top_k], 6)],
            |inputs| {
                let (x, w) = shaped(inputs);
                quantized_experts(x, indices.clone(), w, &weights, Activation::Silu)
            },
            |inputs| {
                let (x, w) = shaped(inputs);
                let gate_up = dense_like(&weights.gate_up, &x).reshape([experts, 2 * inter, hidden]);
                let down = dense_like(&weights.down, &x);
                composite::moe_experts(x, indices.clone(), w, gate_up, down, Activation::Silu)
            },
        );
    }
}

#[test]
fn other_backends_get_the_dense_values() {
    let weight = quantized(StackDims { matrices: 1, rows: 9, columns: 70 }, schemes()[0], 7);
    let x = random([4, 70], 8);
    let want = values(quantized_linear(x.clone(), &weight));
    let got = values(composite::linear(x, dense(&weight, DType::F32, &Device::flex()).reshape([9, 70])));
    assert_close("linear", &got, &want, 1e-4);
}
