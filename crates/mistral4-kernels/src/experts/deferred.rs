//! Gradients of the experts' weights that are not multiplied out.
use super::ExpertDims;
use super::groups::Groups;
use super::sorted_rows::SortedRows;
use super::weight_gradient::{Sink, Write, weight_product};
use crate::element::Element;
use crate::gemm::{Bf16Pair, Left, NR, Panel, Stretch, multiply_rows, pack_lanes, pairs, tiles};
use crate::isa::Isa;
use crate::optimizer::{AdamW, AdamWWeight, StepSink};
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use std::ops::Range;
use std::sync::Arc;

/// The gradient of a stack of weights, `[E, m, n]`, as the product that it is: of each expert `left^T right` over its rows.
///
/// Multiplied out block by block, it can move the weight without ever being written.
pub struct DeferredGradient<X> {
    groups: Arc<Groups>,
    shape: [usize; 3],
    factors: Factors<X>,
}

/// Both factors have a row for each token slot, sorted by expert.
enum Factors<X> {
    /// Gradients of gates and ups, and the tokens `[T, D]`.
    GateUp(SortedRows, Vec<X>),
    /// Gradients of the outputs, `[T, D]`, and the weighted inner activations.
    Down(Vec<X>, SortedRows),
}

impl<X> std::fmt::Debug for DeferredGradient<X> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeferredGradient").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl<X: Element> DeferredGradient<X> {
    pub(super) fn gate_up(groups: Arc<Groups>, dims: ExpertDims, dgate_up: SortedRows, x: &[X]) -> Self {
        let shape = [dims.experts, 2 * dims.inter, dims.hidden];
        Self { groups, shape, factors: Factors::GateUp(dgate_up, x.to_vec()) }
    }

    pub(super) fn down(groups: Arc<Groups>, dims: ExpertDims, dout: &[X], inner: SortedRows) -> Self {
        let shape = [dims.experts, dims.hidden, dims.inter];
        Self { groups, shape, factors: Factors::Down(dout.to_vec(), inner) }
    }

    /// Writes the gradient, `[E, m, n]`; zero for experts without tokens.
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn write<W: Element>(&self, out: &mut [W]) {
        assert_eq!(out.len(), self.shape.iter().product::<usize>(), "the gradient has the weight's shape");
        self.product(&Write(Shared::new(out)));
    }

    /// Adam step `step` (counted from 1) on the weight, as [`adamw_step`](crate::adamw_step) with this gradient in `f32`.
    ///
    /// # Panics
    /// When a slice of `weight` has another length than the gradient, or `step` is 0.
    pub fn step<V: Element, S: Element>(&self, hyper: &AdamW, step: u64, weight: AdamWWeight<'_, V, S>) {
        self.product(&StepSink::new(hyper, step, weight, self.shape.iter().product()));
    }

    /// Sum of the gradient's squares, in `f64`, without multiplying it out: of each expert
    /// `sum_ij (left left^T)_ij (right right^T)_ij` over its rows, which costs little where these are few.
    pub fn square(&self) -> f64 {
        let isa = Isa::active();
        if pairs::<X, X>(isa) { self.square_as::<Bf16Pair>(isa) } else { self.square_as::<f32>(isa) }
    }

    fn square_as<P: Panel>(&self, isa: Isa) -> f64 {
        let (groups, [_, m, n]) = (&*self.groups, self.shape);
        let mut squares = vec![0.0; groups.used.len()];
        let shared = Shared::new(&mut squares);
        parallel::for_each(groups.used.len(), |i| {
            let rows = groups.used[i].1.clone();
            let (left, right) = match &self.factors {
                Factors::GateUp(dgate_up, x) => (
                    products_of_rows::<P, _>(isa, rows.clone(), m, |row| dgate_up.row(row)),
                    products_of_rows::<P, _>(isa, rows, n, |row| &x[groups.token(row) * n..][..n]),
                ),
                Factors::Down(dout, inner) => (
                    products_of_rows::<P, _>(isa, rows.clone(), m, |row| &dout[groups.token(row) * m..][..m]),
                    products_of_rows::<P, _>(isa, rows, n, |row| inner.row(row)),
                ),
            };
            // SAFETY: each task owns one sum.
            let square = unsafe { &mut shared.slice(i..i + 1)[0] };
            *square = left.iter().zip(&*right).map(|(l, r)| f64::from(*l) * f64::from(*r)).sum();
        });
        let square: f64 = squares.iter().sum();
        // Rounding could leave less than nothing; what is no number stays none.
        if square < 0.0 { 0.0 } else { square }
    }

    fn product<S: Sink>(&self, sink: &S) {
        let isa = Isa::active();
        if pairs::<X, X>(isa) {
            self.product_as::<Bf16Pair, S>(isa, sink);
        } else {
            self.product_as::<f32, S>(isa, sink);
        }
    }

    fn product_as<P: Panel, S: Sink>(&self, isa: Isa, sink: &S) {
        let (groups, [_, m, n]) = (&*self.groups, self.shape);
        match &self.factors {
            Factors::GateUp(dgate_up, x) => {
                let right = |row: usize| &x[groups.token(row) * n..][..n];
                weight_product::<P, _, _, _>(isa, groups, self.shape, |row| dgate_up.row(row), right, sink);
            }
            Factors::Down(dout, inner) => {
                let left = |row: usize| &dout[groups.token(row) * m..][..m];
                weight_product::<P, _, _, _>(isa, groups, self.shape, left, |row| inner.row(row), sink);
            }
        }
    }
}

/// The products of some rows with each other, `[panels, rows, NR]`; zero past the last row.
fn products_of_rows<'a, P: Panel, T: Element>(
    isa: Isa,
    rows: Range<usize>,
    depth: usize,
    row: impl Fn(usize) -> &'a [T],
) -> Scratch<f32> {
    let (count, steps) = (rows.len(), depth.div_ceil(P::STEP));
    let row = |i: usize| row(rows.start + i);
    let mut left = scratch::take::<P>(count * steps);
    for tile in tiles(0..count) {
        let out = &mut left[tile.start * steps..tile.end * steps];
        pack_lanes(isa, depth, [tile.len(), tile.len()], |lane| row(tile.start + lane), out);
    }
    let pack_right = |part: Range<usize>, out: &mut [P]| {
        let panel_len = part.len().div_ceil(P::STEP) * NR;
        for (panel, out) in out.chunks_exact_mut(panel_len).enumerate() {
            let lanes = NR.min(count - panel * NR);
            let lane = |i: usize| &row(panel * NR + i)[part.start..];
            pack_lanes(isa, part.len(), [lanes, NR], lane, out);
        }
    };
    let mut sums = scratch::take::<f32>(count.div_ceil(NR) * count * NR);
    let none = [Stretch::NONE; 2];
    multiply_rows(isa, &Left::new(&left, 0..count, depth), pack_right, |_| none, none, &mut sums);
    sums
}
