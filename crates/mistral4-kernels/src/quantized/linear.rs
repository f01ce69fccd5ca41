//! The linear layer with a quantised weight.
use super::LANES;
use super::activations::Activations;
use super::matrix::{QuantizedMatrix, StackDims};
use super::product::{TASK_BYTES, product};
use crate::element::Element;
use crate::gemm::{LinearDims, linear_backward_input};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use half::bf16;

/// Linear layer `y = x weight^T` with a quantised weight.
///
/// # Shapes
/// `x`: `[rows, inputs]`, `weight`: one matrix `[outputs, inputs]`, `y`: `[rows, outputs]`.
///
/// # Panics
/// When a slice has the wrong length, or the weight is not one matrix.
pub fn quantized_linear<X: Element, Y: Element>(rows: usize, x: &[X], weight: &QuantizedMatrix, y: &mut [Y]) {
    let StackDims { rows: outputs, columns: inputs, .. } = one_matrix(weight);
    assert_eq!(x.len(), rows * inputs, "x is [rows, inputs]");
    assert_eq!(y.len(), rows * outputs, "y is [rows, outputs]");
    let isa = Isa::active();
    let x = Activations::new::<X, X>(isa, weight, rows, |row| &x[row * inputs..(row + 1) * inputs]);
    let order = (0..rows as u32).collect::<Vec<_>>();
    let y = Shared::new(y);
    parallel::for_each_chunk(weight.panels(), panels_of_task(weight, rows), |panels| {
        /// Rows whose sums are held at once.
        const ROWS: usize = 192;
        let width = panels.len() * LANES;
        let columns = panels.start * LANES..(panels.end * LANES).min(outputs);
        let mut sums = scratch::take::<f32>(width * rows.min(ROWS));
        for rows in order.chunks(ROWS) {
            let sums = &mut sums[..width * rows.len()];
            product(isa, weight, 0, panels.clone(), &x, rows, sums);
            for (row, sums) in rows.iter().zip(sums.chunks_exact(width)) {
                let start = *row as usize * outputs;
                // SAFETY: each task owns its columns.
                let y = unsafe { y.slice(start + columns.start..start + columns.end) };
                for (y, sum) in y.iter_mut().zip(sums) {
                    *y = Y::from_f32(*sum);
                }
            }
        }
    });
}

/// Panels that one task takes: few enough to give every thread several, unless they hold little.
pub(super) fn panels_of_task(weight: &QuantizedMatrix, rows: usize) -> usize {
    let least = (TASK_BYTES / rows.max(1)).max(4 << 10).div_ceil(weight.panel_bytes().max(1));
    weight.panels().div_ceil(4 * rayon::current_num_threads()).clamp(1, least.max(8))
}

/// Input gradient of [`quantized_linear`]: `dx = dy weight`.
///
/// # Shapes
/// `dy`: `[rows, outputs]`, `weight`: one matrix `[outputs, inputs]`, `dx`: `[rows, inputs]`.
///
/// # Panics
/// As [`quantized_linear`].
pub fn quantized_linear_backward_input<G: Element, X: Element>(
    rows: usize,
    dy: &[G],
    weight: &QuantizedMatrix,
    dx: &mut [X],
) {
    let StackDims { rows: outputs, columns: inputs, .. } = one_matrix(weight);
    let dims = LinearDims { rows, inputs, outputs };
    if G::IS_BF16 {
        let mut dense = scratch::take::<bf16>(outputs * inputs);
        weight.dequantize(0, &mut dense);
        linear_backward_input(dims, dy, &dense, dx, false);
    } else {
        let mut dense = scratch::take::<f32>(outputs * inputs);
        weight.dequantize(0, &mut dense);
        linear_backward_input(dims, dy, &dense, dx, false);
    }
}

fn one_matrix(weight: &QuantizedMatrix) -> StackDims {
    assert_eq!(weight.dims.matrices, 1, "the weight of a linear layer is one matrix");
    weight.dims
}
