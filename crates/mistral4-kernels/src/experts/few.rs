//! Forward pass when each expert has few tokens, as in decoding: weights are read once, in place.
use super::forward::{add_scaled, gate_slices};
use super::groups::Groups;
use super::{ExpertDims, Experts};
use crate::element::{Element, Index};
use crate::gemm::{Rows, dot_rows, streamed_rows};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use std::ops::Range;

/// As the packed forward pass; `H` is the type that inner activations are rounded to.
pub(super) fn forward_few<H: Element, X: Element, W: Element, I: Index>(
    isa: Isa,
    experts: &Experts<'_, X, W, I>,
    groups: &Groups,
    out: &mut [X],
) {
    let ExpertDims { tokens, hidden, inter, .. } = experts.dims;
    let mut x = scratch::take::<X>(groups.rows() * hidden);
    for row in 0..groups.rows() {
        x[row * hidden..(row + 1) * hidden].copy_from_slice(experts.x_row(groups.token(row)));
    }
    let x_rows = |rows: &Range<usize>| Rows {
        data: &x[rows.start * hidden..rows.end * hidden],
        stride: hidden,
        count: rows.len(),
    };

    let mut inner = scratch::take::<H>(groups.rows() * inter);
    let shared = Shared::new(&mut inner);
    let chunk = streamed_rows::<W>(2 * hidden);
    let chunks = inter.div_ceil(chunk);
    parallel::for_each(groups.used.len() * chunks, |task| {
        let (expert, rows) = &groups.used[task / chunks];
        let cols = task % chunks * chunk..((task % chunks + 1) * chunk).min(inter);
        let mut sums = scratch::take::<f32>(2 * rows.len() * cols.len());
        let (gate, up) = sums.split_at_mut(rows.len() * cols.len());
        for (first, sums) in [(cols.start, &mut *gate), (inter + cols.start, &mut *up)] {
            let data = &experts.gate_up[(expert * 2 * inter + first) * hidden..][..cols.len() * hidden];
            dot_rows(isa, x_rows(rows), Rows { data, stride: hidden, count: cols.len() }, hidden, sums);
        }
        gate_slices(isa, experts.activation, gate, up);
        for (row, gate) in rows.clone().zip(gate.chunks_exact(cols.len())) {
            // SAFETY: each task owns its columns of its expert's rows.
            let target = unsafe { shared.slice(row * inter + cols.start..row * inter + cols.end) };
            for (target, value) in target.iter_mut().zip(gate) {
                *target = H::from_f32(*value);
            }
        }
    });

    let (inner, out) = (&*inner, Shared::new(out));
    parallel::for_each_chunk(hidden, streamed_rows::<W>(inter * groups.used.len()), |cols| {
        let width = cols.len();
        let mut block = scratch::zeros(tokens * width);
        let mut sums = scratch::take::<f32>(groups.most_rows() * width);
        for (expert, rows) in &groups.used {
            let x =
                Rows { data: &inner[rows.start * inter..rows.end * inter], stride: inter, count: rows.len() };
            let data = &experts.down[(expert * hidden + cols.start) * inter..][..width * inter];
            let sums = &mut sums[..rows.len() * width];
            dot_rows(isa, x, Rows { data, stride: inter, count: width }, inter, sums);
            for (row, sums) in rows.clone().zip(sums.chunks_exact(width)) {
                let token = groups.token(row);
                let weight = experts.weights[groups.slot(row)];
                add_scaled(isa, &mut block[token * width..(token + 1) * width], weight, sums);
            }
        }
        for (token, sums) in block.chunks_exact(width).enumerate() {
            // SAFETY: each task owns its columns.
            let target = unsafe { out.slice(token * hidden + cols.start..token * hidden + cols.end) };
            for (target, sum) in target.iter_mut().zip(sums) {
                *target = X::from_f32(*sum);
            }
        }
    });
}
