//! Products of rows of activations with panels of quantised weights.
use super::LANES;
use super::activations::Activations;
use super::matrix::{CHUNK, Panel, QuantizedMatrix, blocks};
use crate::isa::Isa;
use crate::vector::{mul_add, per_isa};
use std::ops::Range;

/// Rows whose products one pass over a panel computes.
pub(crate) const ROWS: usize = 6;
/// Rows that pass by a few panels before the next do, so that they stay in the second-level cache.
const ROW_BLOCK: usize = 48;

/// Bytes of weights that one task reads: enough to be worth waking a thread.
pub(crate) const TASK_BYTES: usize = 64 << 10;

/// Rows `matrix * weight^T` for some panels of a matrix: `out[i, j]` is row `rows[i]` of the activations times row
/// `panels.start * 16 + j` of the matrix. Rows of the matrix past its last give zeros.
///
/// # Shapes
/// `out`: `[rows.len(), panels.len() * 16]`
pub(crate) fn product(
    isa: Isa,
    stack: &QuantizedMatrix,
    matrix: usize,
    panels: Range<usize>,
    x: &Activations,
    rows: &[u32],
    out: &mut [f32],
) {
    let width = panels.len() * LANES;
    assert_eq!(out.len(), rows.len() * width);
    assert!(panels.end <= stack.panels() && matrix < stack.dims.matrices);
    if out.is_empty() {
        return;
    }
    for (rows, out) in rows.chunks(ROW_BLOCK).zip(out.chunks_mut(ROW_BLOCK * width)) {
        for (place, panel) in panels.clone().enumerate() {
            let panel = stack.panel(matrix, panel);
            for (rows, out) in even_chunks(rows, out, width) {
                panel_product(isa, panel, x, rows, &mut out[place * LANES..], width);
            }
        }
    }
}

/// Cuts rows into pieces of nearly equal length, at most [`ROWS`].
fn even_chunks<'a>(
    rows: &'a [u32],
    out: &'a mut [f32],
    width: usize,
) -> impl Iterator<Item = (&'a [u32], &'a mut [f32])> {
    let size = rows.len().div_ceil(rows.len().div_ceil(ROWS));
    rows.chunks(size).zip(out.chunks_mut(size * width))
}

/// Up to [`ROWS`] rows times one panel; row `i` of the result begins at `i * stride`.
fn panel_product(isa: Isa, panel: Panel<'_>, x: &Activations, rows: &[u32], out: &mut [f32], stride: usize) {
    assert!((1..=ROWS).contains(&rows.len()) && out.len() >= (rows.len() - 1) * stride + LANES);
    match x {
        #[cfg(target_arch = "x86_64")]
        Activations::Digits(digits) => super::avx512::int_rows(panel, digits, rows, out, stride),
        #[cfg(target_arch = "x86_64")]
        Activations::Bf16 { values, stride: x_stride } => {
            super::avx512::fp8_rows(panel, values, *x_stride, rows, out, stride);
        }
        #[cfg(target_arch = "x86_64")]
        Activations::Words(words) => super::avx2::int_rows(panel, words, rows, out, stride),
        #[cfg(not(target_arch = "x86_64"))]
        Activations::Digits(_) | Activations::Words(_) | Activations::Bf16 { .. } => {
            unreachable!("made for x86-64 only")
        }
        #[cfg(target_arch = "x86_64")]
        Activations::F32 { values, stride: x_stride } if super::avx2::has_fp8(isa, panel) => {
            super::avx2::fp8_rows(panel, values, *x_stride, rows, out, stride);
        }
        Activations::F32 { values, stride: x_stride } => {
            let columns = panel.stack.dims.columns;
            let row = |i: &u32| &values[*i as usize * x_stride..][..columns];
            // Missing rows repeat the last one; their sums are dropped.
            let last = rows.len() - 1;
            let rows: [&[f32]; ROWS] = std::array::from_fn(|i| row(&rows[i.min(last)]));
            let sums = float_rows(isa, panel, rows, last + 1);
            for (out, sums) in out.chunks_mut(stride).zip(&sums[..=last]) {
                out[..LANES].copy_from_slice(sums);
            }
        }
    }
}

per_isa! {
    /// Makes floats of some columns at a time, and multiplies every row with them.
    fn float_rows(panel: Panel<'_>, x: [&[f32]; ROWS], count: usize) -> [[f32; LANES]; ROWS] = float_rows_body;
}

#[inline(always)]
fn float_rows_body<const FMA: bool>(
    panel: Panel<'_>,
    x: [&[f32]; ROWS],
    count: usize,
) -> [[f32; LANES]; ROWS] {
    let mut sums = [[0.0f32; LANES]; ROWS];
    let mut block = [[0.0f32; LANES]; CHUNK];
    for columns in blocks(0..panel.stack.dims.columns, panel.stack.scheme.group()) {
        panel.block(columns.clone(), &mut block);
        for (x, sums) in x[..count].iter().zip(&mut sums) {
            let mut sum = *sums;
            for (x, w) in x[columns.clone()].iter().zip(&block) {
                for i in 0..LANES {
                    sum[i] = mul_add::<FMA>(*x, w[i], sum[i]);
                }
            }
            *sums = sum;
        }
    }
    sums
}
