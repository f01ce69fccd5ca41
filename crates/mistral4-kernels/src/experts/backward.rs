//! Backward pass of the routed experts.
use super::deferred::DeferredGradient;
use super::forward::{activate, gelu_tanh_argument, scatter};
use super::groups::Groups;
use super::sorted_rows::SortedRows;
use super::{Activation, ExpertDims, Experts};
use crate::element::{Element, Index};
use crate::gemm::{Bf16Pair, NR, Panel, Stretch, Target, pack_rows, pairs, panels, task_columns, write_rows};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::{LANES, erf, exp, per_isa, reduce, sigmoid, tanh};
use std::ops::Range;
use std::sync::Arc;

/// Panels of one task where weights are read along their rows: long pieces, so that memory delivers fast.
const WIDE: usize = 16;

/// Where [`moe_experts_backward`] writes gradients; those that are `None` are not computed.
#[derive(Debug)]
pub struct ExpertGrads<'a, X, W> {
    /// Gradient of the tokens, `[T, D]`.
    pub x: Option<&'a mut [X]>,
    /// Gradient of the routing weights, `[T, K]`.
    pub weights: Option<&'a mut [f32]>,
    /// Gradient of gate and up, `[E, 2F, D]`.
    pub gate_up: Option<&'a mut [W]>,
    /// Gradient of down, `[E, D, F]`.
    pub down: Option<&'a mut [W]>,
}

/// Gradients of [`moe_experts`](super::moe_experts), overwriting those asked for.
///
/// Experts without tokens get zero gradients.
///
/// `gate_up` is what [`moe_experts_keeping`](super::moe_experts_keeping) kept.
///
/// # Shapes
/// See [`Experts`] and [`ExpertGrads`]; `gate_up`: `[T * K, 2F]`; `dout`: `[T, D]`.
///
/// # Panics
/// When a slice has the wrong length or an index is not in `0..E`.
pub fn moe_experts_backward<X: Element, W: Element, I: Index>(
    experts: &Experts<'_, X, W, I>,
    gate_up: &[X],
    dout: &[X],
    grads: ExpertGrads<'_, X, W>,
) {
    let ExpertGrads { x, weights, gate_up: dgate_up, down } = grads;
    let deferred = moe_experts_backward_deferring(experts, gate_up, dout, x, weights);
    for (gradient, out) in deferred.iter().zip([dgate_up, down]) {
        if let Some(out) = out {
            gradient.write(out);
        }
    }
}

/// As [`moe_experts_backward`], but gives the gradients of gate and up and of down as products.
///
/// # Shapes
/// As [`moe_experts_backward`]; `dx`: `[T, D]`, `dweights`: `[T, K]`.
///
/// # Panics
/// As [`moe_experts_backward`].
pub fn moe_experts_backward_deferring<X: Element, W: Element, I: Index>(
    experts: &Experts<'_, X, W, I>,
    gate_up: &[X],
    dout: &[X],
    dx: Option<&mut [X]>,
    dweights: Option<&mut [f32]>,
) -> [DeferredGradient<X>; 2] {
    experts.check();
    assert_eq!(dout.len(), experts.x.len(), "dout is [T, D]");
    assert!(dx.as_ref().is_none_or(|dx| dx.len() == experts.x.len()), "dx is [T, D]");
    assert!(dweights.as_ref().is_none_or(|d| d.len() == experts.weights.len()), "dweights is [T, K]");
    assert_eq!(gate_up.len(), experts.indices.len() * 2 * experts.dims.inter, "gate_up is [T * K, 2F]");
    let isa = Isa::active();
    if pairs::<X, W>(isa) {
        backward::<Bf16Pair, X, W, I>(isa, experts, gate_up, dout, dx, dweights)
    } else {
        backward::<f32, X, W, I>(isa, experts, gate_up, dout, dx, dweights)
    }
}

fn backward<P: Panel, X: Element, W: Element, I: Index>(
    isa: Isa,
    experts: &Experts<'_, X, W, I>,
    gate_up: &[X],
    dout: &[X],
    dx: Option<&mut [X]>,
    dweights: Option<&mut [f32]>,
) -> [DeferredGradient<X>; 2] {
    let ExpertDims { hidden, inter, .. } = experts.dims;
    let groups = experts.groups();
    let dout_row = |token: usize| &dout[token * hidden..][..hidden];

    // `[rows, 2F]` gate and up, which become their gradients; `[rows, F]` gradient of the weighted inner
    // activation, which becomes that activation.
    let mut gate_up = SortedRows::widened(isa, gate_up, 2 * inter);
    let mut inner = {
        let dout = groups.pack_left::<P, X>(isa, hidden, |row| dout_row(groups.token(row)));
        let pack = |expert: usize, cols: Range<usize>, depth: Range<usize>, right: &mut [P]| {
            let row = |k: usize| &experts.down_row(expert, depth.start + k)[cols.start..];
            pack_rows(isa, depth.len(), [cols.len(), cols.len().next_multiple_of(NR)], row, right);
        };
        let memory = |expert: usize, cols: Range<usize>, depth: Range<usize>| {
            let first = &experts.down_row(expert, depth.start)[cols.start..];
            [Stretch::rows(first, [depth.len(), cols.len(), inter]), Stretch::NONE]
        };
        rows_product(isa, &groups, &dout, [hidden, inter], memory, pack)
    };
    differentiate(isa, experts, &groups, &mut gate_up, &mut inner, dweights);

    if let Some(dx) = dx {
        let left = groups.pack_left::<P, f32>(isa, 2 * inter, |row| gate_up.row(row));
        scatter(
            isa,
            &groups,
            dx,
            [hidden, task_columns(hidden, WIDE)],
            |cols, add| {
                let pack = |expert: usize, depth: Range<usize>, right: &mut [P]| {
                    let row = |k: usize| &experts.gate_up_row(expert, depth.start + k)[cols.start..];
                    pack_rows(isa, depth.len(), [cols.len(), cols.len().next_multiple_of(NR)], row, right);
                };
                let shape = [2 * inter, cols.len()];
                let memory = |expert: usize, depth: Range<usize>| {
                    let first = &experts.gate_up_row(expert, depth.start)[cols.start..];
                    [Stretch::rows(first, [depth.len(), cols.len(), hidden]), Stretch::NONE]
                };
                groups.multiply(isa, &left, shape, memory, pack, |rows, sums| add(rows, sums));
            },
            |_| 1.0,
        );
    }
    let groups = Arc::new(groups);
    [
        DeferredGradient::gate_up(groups.clone(), experts.dims, gate_up, experts.x),
        DeferredGradient::down(groups, experts.dims, dout, inner),
    ]
}

/// Product of packed sorted rows with a matrix of each expert, wide pieces of whose rows are packed at once; `memory` and
/// `pack_right` as for [`Groups::multiply`], with the columns of a task.
fn rows_product<P: Panel>(
    isa: Isa,
    groups: &Groups,
    left: &[P],
    [depth, columns]: [usize; 2],
    memory: impl Fn(usize, Range<usize>, Range<usize>) -> [Stretch; 2] + Sync + Send,
    pack_right: impl Fn(usize, Range<usize>, Range<usize>, &mut [P]) + Sync + Send,
) -> SortedRows {
    let mut out = SortedRows::new(groups.rows(), columns);
    let (stride, shared) = (out.stride, Shared::new(&mut out.data));
    parallel::for_each_chunk(columns, task_columns(columns, WIDE), |cols| {
        let pack = |expert: usize, depth: Range<usize>, right: &mut [P]| {
            pack_right(expert, cols.clone(), depth, right);
        };
        let memory = |expert: usize, depth: Range<usize>| memory(expert, cols.clone(), depth);
        groups.multiply(isa, left, [depth, cols.len()], memory, pack, |rows, sums| {
            for (cols, sums) in panels(cols.clone(), sums, rows.len()) {
                let target = Target { first: rows.start * stride + cols.start, stride, columns: cols.len() };
                // SAFETY: each task owns its columns.
                unsafe { write_rows(isa, sums, shared, target, false) };
            }
        });
    });
    out
}

/// Turns gate and up into their gradients, and the inner gradient into the weighted inner activation.
fn differentiate<X: Element, W: Element, I: Index>(
    isa: Isa,
    experts: &Experts<'_, X, W, I>,
    groups: &Groups,
    gate_up: &mut SortedRows,
    inner: &mut SortedRows,
    dweights: Option<&mut [f32]>,
) {
    let inter = experts.dims.inter;
    let strides = (gate_up.stride, inner.stride);
    let (gate_up, inner) = (Shared::new(&mut gate_up.data), Shared::new(&mut inner.data));
    let dweights = dweights.map(Shared::new);
    parallel::for_each_chunk(groups.rows(), 16, |rows| {
        for row in rows {
            let slot = groups.slot(row);
            // SAFETY: each task owns its rows, and each row has its own slot.
            unsafe {
                let gate_up = gate_up.slice(row * strides.0..row * strides.0 + 2 * inter);
                let inner = inner.slice(row * strides.1..row * strides.1 + inter);
                let (gate, up) = gate_up.split_at_mut(inter);
                let row = InnerRow { gate, up, inner, weight: experts.weights[slot] };
                let dweight = differentiate_row(isa, experts.activation, row);
                if let Some(dweights) = &dweights {
                    dweights.slice(slot..slot + 1)[0] = dweight;
                }
            }
        }
    });
}

/// Gate, up and the gradient of `act(gate) * up`, which are replaced by the gradients of gate and up and by
/// `weight * act(gate) * up`.
pub(super) struct InnerRow<'a> {
    pub(super) gate: &'a mut [f32],
    pub(super) up: &'a mut [f32],
    pub(super) inner: &'a mut [f32],
    pub(super) weight: f32,
}

per_isa! {
    fn differentiate_row(activation: Activation, row: InnerRow<'_>) -> f32 = differentiate_row_body;
}

#[inline(always)]
pub(super) fn differentiate_row_body<const FMA: bool>(activation: Activation, row: InnerRow<'_>) -> f32 {
    use Activation::{Gelu, GeluTanh, Relu, Silu};
    match activation {
        Silu => differentiate_with(row, |x| {
            let s = sigmoid::<FMA>(x);
            (x * s, s * (1.0 + x * (1.0 - s)))
        }),
        Gelu => differentiate_with(row, |x| {
            let cdf = 0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
            let pdf = 0.398_942_3 * exp::<FMA>(-0.5 * x * x);
            (x * cdf, cdf + x * pdf)
        }),
        GeluTanh => differentiate_with(row, |x| {
            let t = tanh::<FMA>(gelu_tanh_argument(x));
            let slope = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
        }),
        Relu => differentiate_with(row, |x| (activate::<FMA>(Relu, x), if x > 0.0 { 1.0 } else { 0.0 })),
    }
}

/// `value_and_slope(gate)` gives the activation and its derivative; returns the gradient of the weight.
#[inline(always)]
fn differentiate_with(row: InnerRow<'_>, value_and_slope: impl Fn(f32) -> (f32, f32)) -> f32 {
    let InnerRow { gate, up, inner, weight } = row;
    let mut dweight = [0.0f32; LANES];
    let mut run = |gate: &mut [f32], up: &mut [f32], inner: &mut [f32]| {
        let values = gate.iter_mut().zip(up).zip(inner).zip(&mut dweight);
        for (((gate, up), inner), dweight) in values {
            let (value, slope) = value_and_slope(*gate);
            let gradient = *inner * weight;
            let activation = value * *up;
            *dweight += activation * *inner;
            *inner = weight * activation;
            *gate = gradient * *up * slope;
            *up = gradient * value;
        }
    };
    let (gates, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (ups, up_tail) = up.as_chunks_mut::<LANES>();
    let (inners, inner_tail) = inner.as_chunks_mut::<LANES>();
    for ((gate, up), inner) in gates.iter_mut().zip(ups).zip(inners) {
        run(gate, up, inner);
    }
    run(gate_tail, up_tail, inner_tail);
    reduce(dweight)
}
