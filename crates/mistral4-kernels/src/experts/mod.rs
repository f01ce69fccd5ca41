//! Routed experts: gate and up projections, gated activation, down projection, weighting, sum per token.
//!
//! Tokens are sorted by expert, without padding. Work is cut by output columns, and each task walks through
//! all experts for its columns: tasks are equal however uneven the routing is, and the contributions to one
//! token are always added in the order of experts.
mod backward;
mod deferred;
mod few;
mod forward;
mod gated;
mod grouped;
mod groups;
mod packed;
mod sorted_rows;
mod weight_gradient;

pub use backward::{ExpertGrads, moe_experts_backward, moe_experts_backward_deferring};
pub use deferred::DeferredGradient;
pub(crate) use forward::{add_scaled, gate_slices, gates_and_ups};
pub use forward::{moe_experts, moe_experts_keeping};
pub use gated::{gated, gated_backward};
pub use grouped::{
    GroupedLinearDims, grouped_linear, grouped_linear_backward_input, grouped_linear_backward_weight,
};
pub(crate) use groups::Groups;
pub use packed::{PackedExperts, packed_experts};
pub(crate) use weight_gradient::{Block, Sink};

use crate::element::{Element, Index};
use forward::Tokens;

/// Sizes of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertDims {
    /// T: rows of `x`.
    pub tokens: usize,
    /// K: experts per token.
    pub top_k: usize,
    /// E: experts.
    pub experts: usize,
    /// D: columns of `x`.
    pub hidden: usize,
    /// F: inner size of one expert.
    pub inter: usize,
}

/// The function applied to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// Gaussian error linear unit with the error function.
    Gelu,
    /// Gaussian error linear unit with the hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Inputs of [`moe_experts`].
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a, X, W, I> {
    /// Sizes.
    pub dims: ExpertDims,
    /// Function applied to the gate.
    pub activation: Activation,
    /// Tokens, `[T, D]`.
    pub x: &'a [X],
    /// Chosen experts, `[T, K]`, each in `0..E`.
    pub indices: &'a [I],
    /// Routing weights, `[T, K]`.
    pub weights: &'a [f32],
    /// Gate rows, then up rows, of each expert, `[E, 2F, D]`.
    pub gate_up: &'a [W],
    /// Down projections, `[E, D, F]`.
    pub down: &'a [W],
}

impl<X: Element, W: Element, I: Index> Experts<'_, X, W, I> {
    fn check(&self) {
        let ExpertDims { tokens, top_k, experts, hidden, inter } = self.dims;
        assert_eq!(self.x.len(), tokens * hidden, "x is [T, D]");
        assert_eq!(self.indices.len(), tokens * top_k, "indices are [T, K]");
        assert_eq!(self.weights.len(), tokens * top_k, "weights are [T, K]");
        assert_eq!(self.gate_up.len(), experts * 2 * inter * hidden, "gate_up is [E, 2F, D]");
        assert_eq!(self.down.len(), experts * hidden * inter, "down is [E, D, F]");
    }

    fn groups(&self) -> Groups {
        Groups::new(self.indices, self.dims.top_k, self.dims.experts)
    }

    fn tokens(&self) -> Tokens<'_, X> {
        Tokens { dims: self.dims, activation: self.activation, x: self.x, weights: self.weights }
    }

    fn x_row(&self, token: usize) -> &[X] {
        &self.x[token * self.dims.hidden..][..self.dims.hidden]
    }

    /// Row `i` of the `[2F, D]` matrix of an expert.
    fn gate_up_row(&self, expert: usize, i: usize) -> &[W] {
        let ExpertDims { hidden, inter, .. } = self.dims;
        &self.gate_up[(expert * 2 * inter + i) * hidden..][..hidden]
    }

    /// Row `i` of the `[D, F]` matrix of an expert.
    fn down_row(&self, expert: usize, i: usize) -> &[W] {
        let ExpertDims { hidden, inter, .. } = self.dims;
        &self.down[(expert * hidden + i) * inter..][..inter]
    }
}
