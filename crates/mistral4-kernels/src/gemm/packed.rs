//! Weights packed once: frozen bf16 matrices in the order in which products read them.
use super::{
    Bf16Pair, MR, NR, Panel, Stretch, Target, Upcoming, multiply_packed, pack_lanes, pack_left, pairs,
    row_parts, streamed_rows, tiles, write_rows,
};
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::quantized::StackDims;
use crate::scratch;
use half::bf16;
use std::ops::Range;

/// Gate rows in a panel of gate and up; the other half holds the same rows of up.
pub(crate) const HALF: usize = NR / 2;

/// A stack of bf16 matrices as panels of 32 rows: a product streams them, whether it has one row of activations or many,
/// and copies nothing.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    dims: StackDims,
    is_gated: bool,
    /// `[matrices, panels, steps]`; rows past the last repeat it, and an odd last column has a zero beside it.
    panels: Vec<Line>,
}

/// The pairs of [`NR`] rows at one step.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([Bf16Pair; NR]);

impl PackedMatrix {
    /// Packs matrices of `[rows, columns]`.
    ///
    /// # Shapes
    /// `values`: `[matrices, rows, columns]`.
    ///
    /// # Panics
    /// When `values` has another length.
    pub fn new(dims: StackDims, values: &[bf16]) -> Self {
        Self::pack(dims, values, false)
    }

    /// Packs matrices whose first half of rows is the gate, the second half up: panels hold 16 of both.
    ///
    /// # Shapes
    /// `values`: `[matrices, 2F, columns]`.
    ///
    /// # Panics
    /// When `values` has another length or `rows` is odd.
    pub fn gated(dims: StackDims, values: &[bf16]) -> Self {
        assert!(dims.rows.is_multiple_of(2), "gate and up have the same rows");
        Self::pack(dims, values, true)
    }

    fn pack(dims: StackDims, values: &[bf16], is_gated: bool) -> Self {
        assert_eq!(values.len(), dims.elements(), "values are [matrices, rows, columns]");
        let StackDims { matrices, rows, columns } = dims;
        let (panels, steps) = (panels(rows), columns.div_ceil(Bf16Pair::STEP));
        let mut lines = vec![Line([Bf16Pair::default(); NR]); matrices * panels * steps];
        let shared = Shared::new(flat_mut(&mut lines));
        let isa = Isa::active();
        parallel::for_each(matrices * panels, |index| {
            let (matrix, panel) = (index / panels, index % panels);
            let lane = |i: usize| {
                let row = match is_gated {
                    true => i / HALF * (rows / 2) + (panel * HALF + i % HALF).min(rows / 2 - 1),
                    false => (panel * NR + i).min(rows - 1),
                };
                &values[(matrix * rows + row) * columns..][..columns]
            };
            // SAFETY: each task owns its panel.
            let out = unsafe { shared.slice(index * steps * NR..(index + 1) * steps * NR) };
            pack_lanes(isa, columns, [NR, NR], lane, out);
        });
        Self { dims, is_gated, panels: lines }
    }

    /// Sizes.
    pub fn dims(&self) -> StackDims {
        self.dims
    }

    /// Whether gate and up share panels.
    pub fn is_gated(&self) -> bool {
        self.is_gated
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.panels[..])
    }

    /// Some panels of a matrix, one after the other, each over all columns.
    pub(crate) fn panels(&self, matrix: usize, panels: Range<usize>) -> &[Bf16Pair] {
        let steps = self.steps();
        let first = matrix * self::panels(self.dims.rows);
        flat(&self.panels[(first + panels.start) * steps..(first + panels.end) * steps])
    }

    /// Pairs in a panel.
    pub(crate) fn panel_len(&self) -> usize {
        self.steps() * NR
    }

    fn steps(&self) -> usize {
        self.dims.columns.div_ceil(Bf16Pair::STEP)
    }

    /// The values of one matrix.
    ///
    /// # Shapes
    /// `out`: `[rows, columns]`.
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn unpack(&self, matrix: usize, out: &mut [bf16]) {
        let StackDims { rows, columns, .. } = self.dims;
        assert_eq!(out.len(), rows * columns, "out is [rows, columns]");
        for (row, out) in out.chunks_exact_mut(columns.max(1)).enumerate() {
            let (panel, lane) = match self.is_gated {
                true => (row % (rows / 2) / HALF, row / (rows / 2) * HALF + row % (rows / 2) % HALF),
                false => (row / NR, row % NR),
            };
            let panel = self.panels(matrix, panel..panel + 1);
            for (column, out) in out.iter_mut().enumerate() {
                let pair = panel[column / 2 * NR + lane].0;
                *out = bf16::from_bits((pair >> (column % 2 * 16)) as u16);
            }
        }
    }
}

/// Panels of a matrix of so many rows.
fn panels(rows: usize) -> usize {
    rows.div_ceil(NR)
}

/// Linear layer `y = x weight^T` with a packed weight.
///
/// # Shapes
/// `x`: `[rows, inputs]`, `weight`: one matrix `[outputs, inputs]`, `y`: `[rows, outputs]`.
///
/// # Panics
/// When a slice has the wrong length, or the weight is not one plain matrix.
pub fn packed_linear<X: Element, Y: Element>(rows: usize, x: &[X], weight: &PackedMatrix, y: &mut [Y]) {
    let StackDims { matrices, rows: outputs, columns: inputs } = weight.dims;
    assert!(matrices == 1 && !weight.is_gated, "the weight of a linear layer is one matrix");
    assert_eq!(x.len(), rows * inputs, "x is [rows, inputs]");
    assert_eq!(y.len(), rows * outputs, "y is [rows, outputs]");
    let isa = Isa::active();
    if multiplies_pairs(isa, rows) {
        multiply::<Bf16Pair, X, Y>(isa, rows, x, weight, y);
    } else {
        multiply::<f32, X, Y>(isa, rows, x, weight, y);
    }
}

/// Whether products of so many rows with packed weights multiply the pairs themselves. Where the processor has no
/// instruction for that, pairs are taken apart in registers for each few rows; more rows multiply floats, which are made
/// from them once.
pub(crate) fn multiplies_pairs(isa: Isa, rows: usize) -> bool {
    /// Rows up to which taking pairs apart again and again costs less.
    const FEW: usize = 6;
    pairs::<bf16, bf16>(isa) || rows <= FEW
}

fn multiply<P: Panel, X: Element, Y: Element>(
    isa: Isa,
    rows: usize,
    x: &[X],
    weight: &PackedMatrix,
    y: &mut [Y],
) {
    let StackDims { rows: outputs, columns: inputs, .. } = weight.dims;
    let chunk = task_panels(weight, rows);
    let chunks = panels(outputs).div_ceil(chunk);
    let parts = row_parts(rows, chunks);
    let part_rows = |part: usize| rows * part / parts..rows * (part + 1) / parts;
    let tiles: Vec<_> = (0..parts).flat_map(|part| tiles(part_rows(part))).collect();
    let left = pack_left::<P, X>(isa, &tiles, inputs, |row| &x[row * inputs..(row + 1) * inputs]);
    let y = Shared::new(y);
    parallel::for_each(chunks * parts, |task| {
        let (rows, first) = (part_rows(task / chunks), task % chunks * chunk);
        let mut sums = scratch::take::<f32>(rows.len() * NR);
        for panel in first..(first + chunk).min(panels(outputs)) {
            let right = weight.panels(0, panel..panel + 1);
            let mut next = match rows.len() > MR && panel + 1 < panels(outputs) {
                true => {
                    let next = Stretch::all(weight.panels(0, panel + 1..panel + 2));
                    Upcoming::new(&[next], rows.len().div_ceil(MR))
                }
                // What passes by once is fetched as fast without being asked for.
                false => Upcoming::none(),
            };
            multiply_packed(isa, &left, rows.clone(), inputs, [right].into_iter(), &mut next, &mut sums);
            let columns = NR.min(outputs - panel * NR);
            let target = Target { first: rows.start * outputs + panel * NR, stride: outputs, columns };
            // SAFETY: each task owns its rectangle.
            unsafe { write_rows(isa, &sums, y, target, false) };
        }
    });
}

/// Panels of one task: enough bytes to be worth waking a thread, and several tasks for each where there are many rows.
fn task_panels(weight: &PackedMatrix, rows: usize) -> usize {
    let few = streamed_rows::<bf16>(weight.dims.columns).div_ceil(NR);
    (few / rows.div_ceil(MR).max(1)).max(1)
}

fn flat(lines: &[Line]) -> &[Bf16Pair] {
    // SAFETY: a line is `NR` pairs without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * NR) }
}

fn flat_mut(lines: &mut [Line]) -> &mut [Bf16Pair] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * NR) }
}
