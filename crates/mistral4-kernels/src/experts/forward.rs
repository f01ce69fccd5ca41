//! Forward pass of the routed experts.
use super::few::forward_few;
use super::groups::Groups;
use super::{Activation, ExpertDims, Experts};
use crate::element::{Element, Index};
use crate::gemm::{
    Bf16Pair, HALF, NR, Panel, Stretch, Target, few_rows, pack_lanes, pairs, panels, tiles, write_rows,
};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::{convert, erf, mul_add, per_isa, sigmoid, tanh};
use half::bf16;
use std::ops::Range;

/// Mixture of gated experts: `out[t] = sum_k weights[t, k] down[e] (act(gate[e] x[t]) * (up[e] x[t]))` with
/// `e = indices[t, k]`.
///
/// # Shapes
/// See [`Experts`]; `out`: `[T, D]`.
///
/// # Panics
/// When a slice has the wrong length or an index is not in `0..E`.
pub fn moe_experts<X: Element, W: Element, I: Index>(experts: &Experts<'_, X, W, I>, out: &mut [X]) {
    experts.check();
    assert_eq!(out.len(), experts.x.len(), "out is [T, D]");
    let isa = Isa::active();
    let groups = experts.groups();
    match (groups.most_rows() <= few_rows::<X, W>(isa), pairs::<X, W>(isa)) {
        (true, true) => forward_few::<bf16, X, W, I>(isa, experts, &groups, out),
        (true, false) => forward_few::<f32, X, W, I>(isa, experts, &groups, out),
        (false, true) => forward::<Bf16Pair, X>(isa, experts.tokens(), experts, &groups, None, out),
        (false, false) => forward::<f32, X>(isa, experts.tokens(), experts, &groups, None, out),
    }
}

/// As [`moe_experts`]; also keeps gates and ups for [`moe_experts_backward`](super::moe_experts_backward).
///
/// # Shapes
/// See [`moe_experts`]; `gate_up`: `[T * K, 2F]`, token slots sorted by expert.
///
/// # Panics
/// As [`moe_experts`].
pub fn moe_experts_keeping<X: Element, W: Element, I: Index>(
    experts: &Experts<'_, X, W, I>,
    gate_up: &mut [X],
    out: &mut [X],
) {
    experts.check();
    assert_eq!(out.len(), experts.x.len(), "out is [T, D]");
    assert_eq!(gate_up.len(), experts.indices.len() * 2 * experts.dims.inter, "gate_up is [T * K, 2F]");
    let (isa, groups, gate_up) = (Isa::active(), experts.groups(), Some(Shared::new(gate_up)));
    if pairs::<X, W>(isa) {
        forward::<Bf16Pair, X>(isa, experts.tokens(), experts, &groups, gate_up, out);
    } else {
        forward::<f32, X>(isa, experts.tokens(), experts, &groups, gate_up, out);
    }
}

/// The gates and ups that [`moe_experts_keeping`] keeps, alone.
pub(crate) fn gates_and_ups<X: Element, W: Element, I: Index>(
    experts: &Experts<'_, X, W, I>,
    gate_up: &mut [X],
) {
    let (isa, groups, tokens) = (Isa::active(), experts.groups(), experts.tokens());
    let gate_up = Some(Shared::new(gate_up));
    if pairs::<X, W>(isa) {
        gated::<Bf16Pair, X>(isa, tokens, experts, &groups, gate_up);
    } else {
        gated::<f32, X>(isa, tokens, experts, &groups, gate_up);
    }
}

/// The weights of all experts as right operands of products, for some columns at a time.
pub(super) trait RightOperands<P: Panel>: Sync {
    /// Multiplies with gate columns `cols`, at most [`HALF`], and the same columns of up: they lie in the two halves of a
    /// panel.
    fn gate_up(
        &self,
        isa: Isa,
        groups: &Groups,
        left: &[P],
        cols: Range<usize>,
        finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
    );

    /// Multiplies with columns `cols` of down.
    fn down(
        &self,
        isa: Isa,
        groups: &Groups,
        left: &[P],
        cols: Range<usize>,
        finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
    );
}

impl<P: Panel, X: Element, W: Element, I: Index> RightOperands<P> for Experts<'_, X, W, I> {
    fn gate_up(
        &self,
        isa: Isa,
        groups: &Groups,
        left: &[P],
        cols: Range<usize>,
        finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
    ) {
        let ExpertDims { hidden, inter, .. } = self.dims;
        let pack = |expert: usize, depth: Range<usize>, right: &mut [P]| {
            // Lanes past the last column repeat it; their sums are not used.
            let lane = |i: usize| {
                let column = (cols.start + i % HALF).min(inter - 1);
                let row = if i < HALF { column } else { inter + column };
                &self.gate_up_row(expert, row)[depth.start..]
            };
            pack_lanes(isa, depth.len(), [NR, NR], lane, right);
        };
        let memory = |expert: usize, depth: Range<usize>| {
            [0, inter].map(|up| {
                let first = &self.gate_up_row(expert, up + cols.start)[depth.start..];
                Stretch::rows(first, [cols.len(), depth.len(), hidden])
            })
        };
        groups.multiply(isa, left, [hidden, NR], memory, pack, finish);
    }

    fn down(
        &self,
        isa: Isa,
        groups: &Groups,
        left: &[P],
        cols: Range<usize>,
        finish: &mut dyn FnMut(Range<usize>, &mut [f32]),
    ) {
        let pack = |expert: usize, depth: Range<usize>, right: &mut [P]| {
            let lane = |i: usize| &self.down_row(expert, cols.start + i)[depth.start..];
            pack_lanes(isa, depth.len(), [cols.len(), NR], lane, right);
        };
        let inter = self.dims.inter;
        let memory = |expert: usize, depth: Range<usize>| {
            let first = &self.down_row(expert, cols.start)[depth.start..];
            [Stretch::rows(first, [cols.len(), depth.len(), inter]), Stretch::NONE]
        };
        groups.multiply(isa, left, [inter, cols.len()], memory, pack, finish);
    }
}

/// What goes through the experts.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a, X> {
    pub(super) dims: ExpertDims,
    pub(super) activation: Activation,
    /// `[T, D]`
    pub(super) x: &'a [X],
    /// Routing weights, `[T, K]`.
    pub(super) weights: &'a [f32],
}

pub(super) fn forward<P: Panel, X: Element>(
    isa: Isa,
    tokens: Tokens<'_, X>,
    experts: &impl RightOperands<P>,
    groups: &Groups,
    kept: Option<Shared<'_, X>>,
    out: &mut [X],
) {
    let inner = gated(isa, tokens, experts, groups, kept);
    scatter(
        isa,
        groups,
        out,
        [tokens.dims.hidden, NR],
        |cols, add| experts.down(isa, groups, &inner, cols, &mut |rows, sums| add(rows, sums)),
        |row| tokens.weights[groups.slot(row)],
    );
}

/// `act(gate x) * (up x)` of every sorted row, packed as left tiles over F; `kept` gets `gate x` and `up x`, `[rows, 2F]`.
fn gated<P: Panel, X: Element>(
    isa: Isa,
    tokens: Tokens<'_, X>,
    experts: &impl RightOperands<P>,
    groups: &Groups,
    kept: Option<Shared<'_, X>>,
) -> Scratch<P> {
    let ExpertDims { hidden, inter, .. } = tokens.dims;
    let row = |row: usize| &tokens.x[groups.token(row) * hidden..][..hidden];
    let x = groups.pack_left::<P, X>(isa, hidden, row);
    let steps = inter.div_ceil(P::STEP);
    let mut inner = scratch::take::<P>(groups.rows() * steps);
    let shared = Shared::new(&mut inner);
    parallel::for_each_chunk(inter, HALF, |cols| {
        experts.gate_up(isa, groups, &x, cols.clone(), &mut |rows, sums| {
            if let Some(kept) = kept {
                // SAFETY: each task owns its columns.
                unsafe { keep(isa, sums, kept, [rows.start, cols.start, cols.len()], inter) };
            }
            gate(isa, tokens.activation, sums);
            for tile in tiles(rows.clone()) {
                let height = tile.len();
                let first = tile.start * steps + cols.start / P::STEP * height;
                // SAFETY: each task owns its steps of every tile.
                let out = unsafe { shared.slice(first..first + cols.len().div_ceil(P::STEP) * height) };
                let row = |i: usize| &sums[(tile.start - rows.start + i) * NR..];
                pack_lanes(isa, cols.len(), [height, height], row, out);
            }
        });
    });
    inner
}

/// Writes both halves of each row of sums, some columns of gate and of up, to rows `[gate, up]` of `2 * inter` elements.
///
/// # Safety
/// No other task borrows these columns.
unsafe fn keep<X: Element>(
    isa: Isa,
    sums: &[f32],
    kept: Shared<'_, X>,
    [first_row, first_column, columns]: [usize; 3],
    inter: usize,
) {
    for (row, sums) in sums.as_chunks::<NR>().0.iter().enumerate() {
        let start = (first_row + row) * 2 * inter + first_column;
        for (start, sums) in [(start, &sums[..HALF]), (start + inter, &sums[HALF..])] {
            // SAFETY: promised by the caller.
            convert(isa, &sums[..columns], unsafe { kept.slice(start..start + columns) });
        }
    }
}

/// Adds row blocks into `out` (`[T, columns]`), with a weight for each sorted row, `width` columns a task.
///
/// `produce(cols, add)` calls `add(rows, sums)` in the order in which the rows are to be added.
pub(super) fn scatter<X: Element>(
    isa: Isa,
    groups: &Groups,
    out: &mut [X],
    [columns, width]: [usize; 2],
    produce: impl Fn(Range<usize>, &mut dyn FnMut(Range<usize>, &[f32])) + Sync + Send,
    weight: impl Fn(usize) -> f32 + Sync + Send,
) {
    let tokens = out.len().checked_div(columns).unwrap_or(0);
    let out = Shared::new(out);
    parallel::for_each_chunk(columns, width, |cols| {
        let mut block = scratch::zeros(tokens * cols.len().next_multiple_of(NR));
        produce(cols.clone(), &mut |rows, sums| {
            let parts = block.chunks_exact_mut(tokens * NR).zip(sums.chunks_exact(rows.len() * NR));
            for (block, sums) in parts {
                for (row, sums) in rows.clone().zip(sums.as_chunks::<NR>().0) {
                    let target = &mut block.as_chunks_mut::<NR>().0[groups.token(row)];
                    add_scaled(isa, target, weight(row), sums);
                }
            }
        });
        for (cols, sums) in panels(cols, &block, tokens) {
            let target = Target { first: cols.start, stride: columns, columns: cols.len() };
            // SAFETY: each task owns its columns.
            unsafe { write_rows(isa, sums, out, target, false) };
        }
    });
}

per_isa! {
    /// `target += factor * values`.
    pub(crate) fn add_scaled(target: &mut [f32], factor: f32, values: &[f32]) = add_scaled_body;
}

#[inline(always)]
fn add_scaled_body<const FMA: bool>(target: &mut [f32], factor: f32, values: &[f32]) {
    for (target, value) in target.iter_mut().zip(values) {
        *target = mul_add::<FMA>(factor, *value, *target);
    }
}

per_isa! {
    /// Replaces the gate half of each row of a tile by `act(gate) * up`.
    fn gate(activation: Activation, tile: &mut [f32]) = gate_body;
}

#[inline(always)]
fn gate_body<const FMA: bool>(activation: Activation, tile: &mut [f32]) {
    for row in tile.as_chunks_mut::<NR>().0 {
        let (gate, up) = row.split_at_mut(HALF);
        gate_slices_body::<FMA>(activation, gate, up);
    }
}

per_isa! {
    /// `gate = act(gate) * up`.
    pub(crate) fn gate_slices(activation: Activation, gate: &mut [f32], up: &[f32]) = gate_slices_body;
}

#[inline(always)]
pub(super) fn gate_slices_body<const FMA: bool>(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => multiply(gate, up, |x| activate::<FMA>(Activation::Silu, x)),
        Activation::Gelu => multiply(gate, up, |x| activate::<FMA>(Activation::Gelu, x)),
        Activation::GeluTanh => multiply(gate, up, |x| activate::<FMA>(Activation::GeluTanh, x)),
        Activation::Relu => multiply(gate, up, |x| activate::<FMA>(Activation::Relu, x)),
    }
}

#[inline(always)]
fn multiply(gate: &mut [f32], up: &[f32], activate: impl Fn(f32) -> f32) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = activate(*gate) * up;
    }
}

/// The value of an activation.
#[inline(always)]
pub(super) fn activate<const FMA: bool>(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x * sigmoid::<FMA>(x),
        Activation::Gelu => 0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + tanh::<FMA>(gelu_tanh_argument(x))),
        Activation::Relu => x.max(0.0),
    }
}

/// `sqrt(2 / pi) (x + 0.044715 x^3)`.
#[inline(always)]
pub(super) fn gelu_tanh_argument(x: f32) -> f32 {
    0.797_884_6 * (x + 0.044_715 * x * x * x)
}
