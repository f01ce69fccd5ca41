//! Forward pass of the routed experts.
use super::groups::Groups;
use super::{Activation, ExpertDims, Experts};
use crate::element::{Element, Index};
use crate::gemm::{Bf16Pair, NR, Panel, pack_lanes, pairs};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::{erf, per_isa, sigmoid, tanh};

/// Gate columns in a panel; the other half holds the same columns of up.
const HALF: usize = NR / 2;

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
    if pairs::<X, W>(isa) {
        forward::<Bf16Pair, X, W, I>(isa, experts, out);
    } else {
        forward::<f32, X, W, I>(isa, experts, out);
    }
}

fn forward<P: Panel, X: Element, W: Element, I: Index>(
    isa: Isa,
    experts: &Experts<'_, X, W, I>,
    out: &mut [X],
) {
    let ExpertDims { top_k, experts: count, hidden, inter, .. } = experts.dims;
    let groups = Groups::new(experts.indices, top_k, count);
    let x = groups.pack_left::<P, X>(hidden, |row| experts.x_row(groups.token(row)));
    let inner = gated(isa, experts, &groups, &x);
    let steps = inter.div_ceil(P::STEP);
    scatter(
        &groups,
        out,
        hidden,
        |cols, add| {
            let pack = |expert: usize, right: &mut [P]| {
                let lane = |i: usize| experts.down_row(expert, cols.start + i);
                pack_lanes(inter, cols.len(), NR, lane, right);
            };
            groups.multiply(isa, &inner, steps, pack, |rows, tile| add(rows, tile));
        },
        |row| experts.weights[groups.slot(row)],
    );
}

/// `act(gate x) * (up x)` of every sorted row, packed as left tiles over F.
fn gated<P: Panel, X: Element, W: Element, I: Index>(
    isa: Isa,
    experts: &Experts<'_, X, W, I>,
    groups: &Groups,
    x: &[P],
) -> Scratch<P> {
    let ExpertDims { hidden, inter, .. } = experts.dims;
    let (x_steps, steps) = (hidden.div_ceil(P::STEP), inter.div_ceil(P::STEP));
    let mut inner = scratch::take::<P>(groups.rows() * steps);
    let shared = Shared::new(&mut inner);
    parallel::for_each_chunk(inter, HALF, |cols| {
        let pack = |expert: usize, right: &mut [P]| {
            // Lanes past the last column repeat it; their sums are not used.
            let lane = |i: usize| {
                let column = (cols.start + i % HALF).min(inter - 1);
                experts.gate_up_row(expert, if i < HALF { column } else { inter + column })
            };
            pack_lanes(hidden, NR, NR, lane, right);
        };
        groups.multiply(isa, x, x_steps, pack, |rows, tile| {
            gate(isa, experts.activation, tile);
            let height = rows.len();
            let first = rows.start * steps + cols.start / P::STEP * height;
            // SAFETY: each task owns its steps of every tile.
            let out = unsafe { shared.slice(first..first + cols.len().div_ceil(P::STEP) * height) };
            for (step, out) in out.chunks_exact_mut(height).enumerate() {
                let column = step * P::STEP;
                for (out, sums) in out.iter_mut().zip(tile.as_chunks::<NR>().0) {
                    let second = (column + 1 < cols.len()).then(|| sums[(column + 1) % NR]);
                    *out = P::pack(sums[column], second);
                }
            }
        });
    });
    inner
}

/// Adds row blocks into `out` (`[T, columns]`), with a weight for each sorted row.
///
/// `produce(cols, add)` calls `add(rows, tile)` in the order in which the rows are to be added.
pub(super) fn scatter<X: Element>(
    groups: &Groups,
    out: &mut [X],
    columns: usize,
    produce: impl Fn(std::ops::Range<usize>, &mut dyn FnMut(std::ops::Range<usize>, &[f32])) + Sync + Send,
    weight: impl Fn(usize) -> f32 + Sync + Send,
) {
    let tokens = out.len().checked_div(columns).unwrap_or(0);
    let out = Shared::new(out);
    parallel::for_each_chunk(columns, NR, |cols| {
        let mut block = scratch::zeros(tokens * NR);
        produce(cols.clone(), &mut |rows, tile| {
            for (row, sums) in rows.zip(tile.as_chunks::<NR>().0) {
                let weight = weight(row);
                let target = &mut block.as_chunks_mut::<NR>().0[groups.token(row)];
                for (target, sum) in target.iter_mut().zip(sums) {
                    *target += weight * sum;
                }
            }
        });
        for (token, sums) in block.as_chunks::<NR>().0.iter().enumerate() {
            let start = token * columns + cols.start;
            // SAFETY: each task owns its columns.
            let target = unsafe { out.slice(start..start + cols.len()) };
            for (target, sum) in target.iter_mut().zip(sums) {
                *target = X::from_f32(*sum);
            }
        }
    });
}

per_isa! {
    /// Replaces the gate half of each row of a tile by `act(gate) * up`.
    fn gate(activation: Activation, tile: &mut [f32]) = gate_body;
}

#[inline(always)]
fn gate_body<const FMA: bool>(activation: Activation, tile: &mut [f32]) {
    for row in tile.as_chunks_mut::<NR>().0 {
        let (gate, up) = row.split_at_mut(HALF);
        match activation {
            Activation::Silu => multiply(gate, up, |x| activate::<FMA>(Activation::Silu, x)),
            Activation::Gelu => multiply(gate, up, |x| activate::<FMA>(Activation::Gelu, x)),
            Activation::GeluTanh => multiply(gate, up, |x| activate::<FMA>(Activation::GeluTanh, x)),
            Activation::Relu => multiply(gate, up, |x| activate::<FMA>(Activation::Relu, x)),
        }
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
