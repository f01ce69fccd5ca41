//! Products with packed weights against the plain twins of unpacked ones.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Activation, Element, ExpertDims, Experts, GemmDims, Matrix, MatrixMut, PackedExperts, PackedMatrix,
    StackDims, bf16, packed_experts, packed_linear, reference,
};

#[test]
fn packing_keeps_every_value() {
    for [matrices, rows, columns] in [[1, 1, 1], [3, 34, 7], [2, 64, 33], [0, 4, 4], [1, 70, 0]] {
        let dims = StackDims { matrices, rows, columns };
        let values = Random::new(3).values::<bf16>(dims.elements(), 1.0);
        for packed in [
            PackedMatrix::new(dims, &values),
            PackedMatrix::gated(
                StackDims { rows: rows / 2 * 2, ..dims },
                &values[..matrices * (rows / 2 * 2) * columns],
            ),
        ] {
            let size = packed.dims().rows * columns;
            for matrix in 0..matrices {
                let mut out = vec![bf16::NAN; size];
                packed.unpack(matrix, &mut out);
                assert_eq!(out, values[matrix * size..(matrix + 1) * size], "{dims:?} {}", packed.is_gated());
            }
        }
    }
}

fn linear<X: Element, Y: Element>() {
    let sizes =
        [[1, 33, 7], [2, 64, 128], [5, 31, 32], [13, 200, 63], [64, 5, 301], [15, 300, 1100], [900, 40, 20]];
    for [rows, outputs, inputs] in sizes {
        let mut random = Random::new(rows as u64);
        let x = random.values::<X>(rows * inputs, 1.0);
        let weight = random.values::<bf16>(outputs * inputs, 1.0);
        let packed = PackedMatrix::new(StackDims { matrices: 1, rows: outputs, columns: inputs }, &weight);
        let (mut got, mut want) = (poison::<Y>(rows * outputs), poison::<Y>(rows * outputs));
        packed_linear(rows, &x, &packed, &mut got);
        let dims = GemmDims { m: rows, n: outputs, k: inputs };
        let c = MatrixMut { data: &mut want, row_stride: outputs };
        reference::gemm(dims, Matrix::rows(&x, inputs), Matrix::transposed(&weight, inputs), c, false);
        assert_close(&format!("{dims:?}"), &got, &want, tolerance::<bf16>());
    }
}

#[test]
fn linear_layers() {
    on_each_isa(|_| {
        linear::<bf16, bf16>();
        linear::<bf16, f32>();
        linear::<f32, f32>();
    });
}

#[test]
fn experts() {
    const SIZES: [ExpertDims; 5] = [
        ExpertDims { tokens: 1, top_k: 1, experts: 1, hidden: 1, inter: 1 },
        ExpertDims { tokens: 1, top_k: 2, experts: 5, hidden: 33, inter: 17 },
        ExpertDims { tokens: 50, top_k: 2, experts: 4, hidden: 64, inter: 32 },
        ExpertDims { tokens: 30, top_k: 1, experts: 2, hidden: 300, inter: 270 },
        ExpertDims { tokens: 41, top_k: 4, experts: 64, hidden: 35, inter: 50 },
    ];
    on_each_isa(|_| {
        for dims in SIZES {
            let ExpertDims { tokens, top_k, experts, hidden, inter } = dims;
            let mut random = Random::new(tokens as u64);
            // The last expert stays empty when there are enough of them.
            let choices = if experts > 4 { experts - 1 } else { experts };
            let indices: Vec<i32> = (0..tokens)
                .flat_map(|_| {
                    let first = random.below(choices);
                    (0..top_k).map(move |k| ((first + k) % choices) as i32)
                })
                .collect();
            let (x, weights) =
                (random.values::<bf16>(tokens * hidden, 1.0), random.values(tokens * top_k, 1.0));
            let gate_up = random.values::<bf16>(experts * 2 * inter * hidden, 0.5);
            let down = random.values::<bf16>(experts * hidden * inter, 0.5);
            let stack = |rows, columns| StackDims { matrices: experts, rows, columns };
            let packed = [
                PackedMatrix::gated(stack(2 * inter, hidden), &gate_up),
                PackedMatrix::new(stack(hidden, inter), &down),
            ];
            for activation in [Activation::Silu, Activation::Gelu] {
                let (mut got, mut want) = (poison::<bf16>(x.len()), poison::<bf16>(x.len()));
                let [packed_gate_up, packed_down] = &packed;
                packed_experts(
                    &PackedExperts {
                        dims,
                        activation,
                        x: &x,
                        indices: &indices,
                        weights: &weights,
                        gate_up: packed_gate_up,
                        down: packed_down,
                    },
                    &mut got,
                );
                reference::moe_experts(
                    &Experts {
                        dims,
                        activation,
                        x: &x,
                        indices: &indices,
                        weights: &weights,
                        gate_up: &gate_up,
                        down: &down,
                    },
                    &mut want,
                );
                assert_close(&format!("{activation:?} {dims:?}"), &got, &want, tolerance::<bf16>());
            }
        }
    });
}
