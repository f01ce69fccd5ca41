//! Routed experts whose weights are packed.
use super::forward::{RightOperands, Tokens, forward};
use super::groups::Groups;
use super::{Activation, ExpertDims};
use crate::element::{Element, Index};
use crate::gemm::{
    Bf16Pair, HALF, NR, PackedMatrix, Panel, Stretch, Upcoming, multiplies_pairs, multiply_packed, tiles,
};
use crate::isa::Isa;
use crate::quantized::StackDims;
use std::ops::Range;

/// Inputs of [`packed_experts`].
#[derive(Clone, Copy, Debug)]
pub struct PackedExperts<'a, X, I> {
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
    /// Gate and up of each expert, `[E, 2F, D]`, packed by [`PackedMatrix::gated`].
    pub gate_up: &'a PackedMatrix,
    /// Down projections, `[E, D, F]`.
    pub down: &'a PackedMatrix,
}

/// Mixture of gated experts with packed weights; see [`moe_experts`](crate::moe_experts).
///
/// # Shapes
/// See [`PackedExperts`]; `out`: `[T, D]`.
///
/// # Panics
/// When a slice has the wrong length or an index is not in `0..E`.
pub fn packed_experts<X: Element, I: Index>(experts: &PackedExperts<'_, X, I>, out: &mut [X]) {
    let PackedExperts { dims, activation, x, indices, weights, gate_up, down } = *experts;
    let ExpertDims { tokens, top_k, experts: count, hidden, inter } = dims;
    assert_eq!(x.len(), tokens * hidden, "x is [T, D]");
    assert_eq!(indices.len(), tokens * top_k, "indices are [T, K]");
    assert_eq!(weights.len(), tokens * top_k, "weights are [T, K]");
    assert_eq!(out.len(), x.len(), "out is [T, D]");
    let stack = StackDims { matrices: count, rows: 2 * inter, columns: hidden };
    assert!(
        gate_up.dims() == stack && gate_up.is_gated(),
        "gate_up is [E, 2F, D], gate and up in each panel"
    );
    let stack = StackDims { matrices: count, rows: hidden, columns: inter };
    assert!(down.dims() == stack && !down.is_gated(), "down is [E, D, F]");
    let groups = Groups::new(indices, top_k, count);
    let tokens = Tokens { dims, activation, x, weights };
    let (isa, weights) = (Isa::active(), Weights { gate_up, down });
    if multiplies_pairs(isa, groups.most_rows()) {
        forward::<Bf16Pair, X>(isa, tokens, &weights, &groups, None, out);
    } else {
        forward::<f32, X>(isa, tokens, &weights, &groups, None, out);
    }
}

struct Weights<'a> {
    gate_up: &'a PackedMatrix,
    down: &'a PackedMatrix,
}

impl<P: Panel> RightOperands<P> for Weights<'_> {
    fn gate_up(
        &self,
        isa: Isa,
        groups: &Groups,
        left: &[P],
        cols: Range<usize>,
        finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
    ) {
        let panel = cols.start / HALF;
        multiply(isa, groups, left, self.gate_up, panel..panel + 1, finish);
    }

    fn down(
        &self,
        isa: Isa,
        groups: &Groups,
        left: &[P],
        cols: Range<usize>,
        finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
    ) {
        multiply(isa, groups, left, self.down, cols.start / NR..cols.end.div_ceil(NR), finish);
    }
}

/// Multiplies with some panels of every used expert.
fn multiply<P: Panel>(
    isa: Isa,
    groups: &Groups,
    left: &[P],
    weight: &PackedMatrix,
    panels: Range<usize>,
    finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
) {
    let depth = weight.dims().columns;
    let right = |expert: usize| weight.panels(expert, panels.clone());
    let product = |expert: usize, rows: Range<usize>, next: Option<usize>, sums: &mut [f32]| {
        let next = next.map_or(Stretch::NONE, |expert| Stretch::all(right(expert)));
        let mut next = Upcoming::new(&[next], panels.len() * tiles(rows.clone()).count());
        let right = right(expert).chunks_exact(weight.panel_len().max(1));
        multiply_packed(isa, left, rows, depth, right, &mut next, sums);
    };
    groups.multiply_with(panels.len() * NR, product, finish);
}
