//! Linear layers with quantised weights: one, or one an expert over rows sorted by expert.
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
use std::ops::Range;

/// Linear layer `y = x weight^T` with a quantised weight.
///
/// # Shapes
/// `x`: `[rows, inputs]`, `weight`: one matrix `[outputs, inputs]`, `y`: `[rows, outputs]`.
///
/// # Panics
/// When a slice has the wrong length, or the weight is not one matrix.
pub fn quantized_linear<X: Element, Y: Element>(rows: usize, x: &[X], weight: &QuantizedMatrix, y: &mut [Y]) {
    one_matrix(weight);
    quantized_grouped_linear(&[0, rows], x, weight, y);
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
    one_matrix(weight);
    quantized_grouped_linear_backward_input(&[0, rows], dy, weight, dx);
}

fn one_matrix(weight: &QuantizedMatrix) {
    assert_eq!(weight.dims.matrices, 1, "the weight of a linear layer is one matrix");
}

/// Linear layer of each expert with quantised weights: `y[rows of e] = x[rows of e] weight[e]^T`, where the rows of
/// expert `e` are `offsets[e]..offsets[e + 1]`.
///
/// The weight of an expert may be several matrices of the stack, whose outputs lie side by side: gate and up.
///
/// # Shapes
/// `offsets`: `[E + 1]`, rising from 0 to M; `x`: `[M, inputs]`, `weight`: `[E * parts, outputs / parts, inputs]`,
/// `y`: `[M, outputs]`.
///
/// # Panics
/// When a slice has the wrong length, the offsets do not rise from 0 to M, or the matrices do not divide among experts.
pub fn quantized_grouped_linear<X: Element, Y: Element>(
    offsets: &[usize],
    x: &[X],
    weight: &QuantizedMatrix,
    y: &mut [Y],
) {
    /// Rows whose sums are held at once.
    const ROWS: usize = 192;
    let groups = Groups::new(offsets, weight, x.len(), y.len());
    let Groups { parts, outputs, .. } = groups;
    let StackDims { rows: part_outputs, columns: inputs, .. } = weight.dims;
    let isa = Isa::active();
    let x = Activations::new::<X, X>(isa, weight, groups.rows, |row| &x[row * inputs..(row + 1) * inputs]);
    let order = (0..groups.rows as u32).collect::<Vec<_>>();
    let chunk = panels_of_task(weight, groups.most_rows());
    let chunks = weight.panels().div_ceil(chunk);
    let y = Shared::new(y);
    parallel::for_each(groups.used.len() * parts * chunks, |task| {
        let (expert, rows) = &groups.used[task / chunks / parts];
        let (part, first) = (task / chunks % parts, task % chunks * chunk);
        let panels = first..(first + chunk).min(weight.panels());
        let width = panels.len() * LANES;
        let columns = panels.start * LANES..(panels.end * LANES).min(part_outputs);
        let mut sums = scratch::take::<f32>(width * rows.len().min(ROWS));
        for rows in order[rows.clone()].chunks(ROWS) {
            let sums = &mut sums[..width * rows.len()];
            product(isa, weight, expert * parts + part, panels.clone(), &x, rows, sums);
            for (row, sums) in rows.iter().zip(sums.chunks_exact(width)) {
                let start = *row as usize * outputs + part * part_outputs;
                // SAFETY: each task owns its columns of its expert's rows.
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

/// Input gradient of [`quantized_grouped_linear`]: `dx[rows of e] = dy[rows of e] weight[e]`.
///
/// Some columns of one expert's weight at a time become floats.
///
/// # Shapes
/// As [`quantized_grouped_linear`]; `dy`: `[M, outputs]`, `dx`: `[M, inputs]`.
///
/// # Panics
/// As [`quantized_grouped_linear`].
pub fn quantized_grouped_linear_backward_input<G: Element, X: Element>(
    offsets: &[usize],
    dy: &[G],
    weight: &QuantizedMatrix,
    dx: &mut [X],
) {
    if G::IS_BF16 {
        backward_input::<G, bf16, X>(offsets, dy, weight, dx);
    } else {
        backward_input::<G, f32, X>(offsets, dy, weight, dx);
    }
}

/// `W` is what weights become.
fn backward_input<G: Element, W: Element, X: Element>(
    offsets: &[usize],
    dy: &[G],
    weight: &QuantizedMatrix,
    dx: &mut [X],
) {
    /// Rows of `dy` that are packed at once.
    const ROWS: usize = 1024;
    /// Columns of a weight that are floats at once: a multiple of every tile, and at least and at most this many.
    const COLUMNS: [usize; 2] = [64, 512];
    let groups = Groups::new(offsets, weight, dx.len(), dy.len());
    let Groups { parts, outputs, .. } = groups;
    let StackDims { rows: part_outputs, columns: inputs, .. } = weight.dims;
    let isa = Isa::active();
    let share = (inputs * groups.used.len()).div_ceil(4 * rayon::current_num_threads());
    let block = share.next_multiple_of(COLUMNS[0]).clamp(COLUMNS[0], COLUMNS[1]);
    let blocks = inputs.div_ceil(block);
    let dx = Shared::new(dx);
    parallel::for_each(groups.used.len() * blocks, |task| {
        let (expert, rows) = &groups.used[task / blocks];
        let first = task % blocks * block;
        let columns = first..(first + block).min(inputs);
        let width = columns.len();
        isa.run(|| {
            let mut dense = scratch::take::<W>(outputs * width);
            for (part, dense) in dense.chunks_exact_mut((part_outputs * width).max(1)).enumerate() {
                weight.dequantize_columns(expert * parts + part, columns.clone(), dense);
            }
            let mut sums = scratch::take::<X>(rows.len().min(ROWS) * width);
            for start in rows.clone().step_by(ROWS) {
                let rows = start..(start + ROWS).min(rows.end);
                let dims = LinearDims { rows: rows.len(), inputs: width, outputs };
                let sums = &mut sums[..rows.len() * width];
                let dy = &dy[rows.start * outputs..rows.end * outputs];
                linear_backward_input(dims, dy, &dense, sums, false);
                for (row, sums) in rows.zip(sums.chunks_exact(width)) {
                    // SAFETY: each task owns its columns of its expert's rows.
                    let dx = unsafe { dx.slice(row * inputs + columns.start..row * inputs + columns.end) };
                    dx.copy_from_slice(sums);
                }
            }
        });
    });
}

/// The experts of a call and their rows.
struct Groups {
    /// Matrices of one expert.
    parts: usize,
    /// Columns of `y`.
    outputs: usize,
    /// M.
    rows: usize,
    /// Experts that have rows, with them.
    used: Vec<(usize, Range<usize>)>,
}

impl Groups {
    /// Checks sizes; `x` and `y` are lengths.
    fn new(offsets: &[usize], weight: &QuantizedMatrix, x: usize, y: usize) -> Self {
        let StackDims { matrices, rows: part_outputs, columns: inputs } = weight.dims;
        assert!(offsets.len() > 1, "offsets are [E + 1]");
        assert!(offsets[0] == 0 && offsets.is_sorted(), "offsets rise from 0");
        let (experts, rows) = (offsets.len() - 1, offsets[offsets.len() - 1]);
        assert!(matrices.is_multiple_of(experts), "{matrices} matrices are no whole number for each expert");
        let parts = matrices / experts;
        let outputs = parts * part_outputs;
        assert_eq!(x, rows * inputs, "x is [M, inputs]");
        assert_eq!(y, rows * outputs, "y is [M, outputs]");
        let ranges = offsets.windows(2).map(|ends| ends[0]..ends[1]).enumerate();
        Self { parts, outputs, rows, used: ranges.filter(|(_, rows)| !rows.is_empty()).collect() }
    }

    fn most_rows(&self) -> usize {
        self.used.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0)
    }
}
