//! Gradients of the experts' weights that are not multiplied out.
use super::ExpertDims;
use super::groups::Groups;
use super::weights::{Sink, SortedRows, Write, weight_product};
use crate::element::Element;
use crate::gemm::{Bf16Pair, Panel, pairs};
use crate::isa::Isa;
use crate::optimizer::{AdamW, AdamWWeight, StepSink};
use crate::parallel::Shared;
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

    /// Adam step `step` (counted from 1) on the weight, as [`adamw_step`](crate::adamw_step) with this gradient in `f32`; returns the sum of
    /// the gradient's squares.
    ///
    /// Rows of the weight whose gradient is not finite stay as they are; then the sum is not finite.
    ///
    /// # Panics
    /// When a slice of `weight` has another length than the gradient, or `step` is 0.
    pub fn step<V: Element, S: Element>(
        &self,
        hyper: &AdamW,
        step: u64,
        weight: AdamWWeight<'_, V, S>,
    ) -> f64 {
        let sink = StepSink::new(hyper, step, weight, self.shape.iter().product());
        self.product(&sink)
    }

    fn product<S: Sink>(&self, sink: &S) -> f64 {
        let isa = Isa::active();
        if pairs::<X, X>(isa) {
            self.product_as::<Bf16Pair, S>(isa, sink)
        } else {
            self.product_as::<f32, S>(isa, sink)
        }
    }

    fn product_as<P: Panel, S: Sink>(&self, isa: Isa, sink: &S) -> f64 {
        let (groups, [_, m, n]) = (&*self.groups, self.shape);
        match &self.factors {
            Factors::GateUp(dgate_up, x) => {
                let right = |row: usize| &x[groups.token(row) * n..][..n];
                weight_product::<P, _, _, _>(isa, groups, self.shape, |row| dgate_up.row(row), right, sink)
            }
            Factors::Down(dout, inner) => {
                let left = |row: usize| &dout[groups.token(row) * m..][..m];
                weight_product::<P, _, _, _>(isa, groups, self.shape, left, |row| inner.row(row), sink)
            }
        }
    }
}
