//! Backward pass of the routed experts.
use super::forward::{activate, gelu_tanh_argument, scatter};
use super::groups::Groups;
use super::{Activation, ExpertDims, Experts};
use crate::element::{Element, Index};
use crate::gemm::{
    Bf16Pair, MR, NR, Panel, Piece, Stretch, Target, TileOut, pack_rows, pairs, panels, task_columns,
    task_target, tiles, write_rows,
};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::{LANES, convert, erf, exp, per_isa, reduce, sigmoid, tanh};
use std::ops::Range;

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
    experts.check();
    assert_eq!(dout.len(), experts.x.len(), "dout is [T, D]");
    let check = |len: Option<usize>, expected: usize, name: &str| {
        assert!(len.is_none_or(|len| len == expected), "the gradient of {name} has its shape");
    };
    check(grads.x.as_ref().map(|g| g.len()), experts.x.len(), "x");
    check(grads.weights.as_ref().map(|g| g.len()), experts.weights.len(), "weights");
    check(grads.gate_up.as_ref().map(|g| g.len()), experts.gate_up.len(), "gate_up");
    check(grads.down.as_ref().map(|g| g.len()), experts.down.len(), "down");
    assert_eq!(gate_up.len(), experts.indices.len() * 2 * experts.dims.inter, "gate_up is [T * K, 2F]");
    let isa = Isa::active();
    if pairs::<X, W>(isa) {
        backward::<Bf16Pair, X, W, I>(isa, experts, gate_up, dout, grads);
    } else {
        backward::<f32, X, W, I>(isa, experts, gate_up, dout, grads);
    }
}

fn backward<P: Panel, X: Element, W: Element, I: Index>(
    isa: Isa,
    experts: &Experts<'_, X, W, I>,
    gate_up: &[X],
    dout: &[X],
    grads: ExpertGrads<'_, X, W>,
) {
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
    differentiate(isa, experts, &groups, &mut gate_up, &mut inner, grads.weights);

    if let Some(dx) = grads.x {
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
    if let Some(dgate_up) = grads.gate_up {
        let left = |row: usize| gate_up.row(row);
        let right = |row: usize| experts.x_row(groups.token(row));
        weight_product::<P, _, _, _>(isa, &groups, [2 * inter, hidden], left, right, dgate_up);
    }
    if let Some(ddown) = grads.down {
        let left = |row: usize| dout_row(groups.token(row));
        let right = |row: usize| inner.row(row);
        weight_product::<P, _, _, _>(isa, &groups, [hidden, inter], left, right, ddown);
    }
}

/// One row for each sorted row; rows lie an odd number of cache lines apart, so that columns of neighbouring
/// rows do not compete for the same part of the cache.
struct SortedRows {
    data: Scratch<f32>,
    columns: usize,
    stride: usize,
}

impl SortedRows {
    fn new(rows: usize, columns: usize) -> Self {
        let stride = 16 * (columns.div_ceil(16) | 1);
        Self { data: scratch::take(rows * stride), columns, stride }
    }

    /// The rows of `[rows, columns]` values.
    fn widened<X: Element>(isa: Isa, values: &[X], columns: usize) -> Self {
        let mut out = Self::new(values.len().checked_div(columns).unwrap_or(0), columns);
        let (stride, shared) = (out.stride, Shared::new(&mut out.data));
        parallel::for_each_chunk(values.len() / columns.max(1), 16, |rows| {
            for row in rows {
                // SAFETY: each task owns its rows.
                let to = unsafe { shared.slice(row * stride..row * stride + columns) };
                convert(isa, &values[row * columns..][..columns], to);
            }
        });
        out
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..][..self.columns]
    }
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

/// `out[e] = left[rows of e]^T right[rows of e]`, `[m, n]` for each expert, zero for unused experts.
fn weight_product<'a, P: Panel, L: Element, R: Element, W: Element>(
    isa: Isa,
    groups: &Groups,
    [m, n]: [usize; 2],
    left: impl Fn(usize) -> &'a [L] + Sync + Send,
    right: impl Fn(usize) -> &'a [R] + Sync + Send,
    out: &mut [W],
) {
    let mut used = vec![None; out.len().checked_div(m * n).unwrap_or(0)];
    for (expert, rows) in &groups.used {
        used[*expert] = Some(rows.clone());
    }
    let parts = task_target().div_ceil(groups.used.len().max(1)).min(m.div_ceil(MR)).max(1);
    let out = Shared::new(out);
    parallel::for_each(used.len() * parts, |task| {
        let (expert, part) = (task / parts, task % parts);
        let outputs = m * part / parts..m * (part + 1) / parts;
        let first = (expert * m + outputs.start) * n;
        let Some(rows) = used[expert].clone() else {
            // SAFETY: each task owns its rows of one expert.
            unsafe { out.slice(first..first + outputs.len() * n) }.fill(W::default());
            return;
        };
        let depth = rows.len();
        let steps = depth.div_ceil(P::STEP);
        let mut packed = scratch::take::<P>(outputs.len() * steps);
        for tile in tiles(0..outputs.len()) {
            let row = |k: usize| &left(rows.start + k)[outputs.start + tile.start..];
            let out = &mut packed[tile.start * steps..tile.end * steps];
            pack_rows(isa, depth, [tile.len(), tile.len()], row, out);
        }
        let width = 4 * NR;
        let mut panels = scratch::take::<P>(width * steps);
        let mut sums = [0.0f32; MR * NR];
        for start in (0..n).step_by(width) {
            let columns = width.min(n - start);
            let panels = &mut panels[..columns.next_multiple_of(NR) * steps];
            let row = |k: usize| &right(rows.start + k)[start..];
            pack_rows(isa, depth, [columns, columns.next_multiple_of(NR)], row, panels);
            for (i, panel) in panels.chunks_exact(steps * NR).enumerate() {
                let start = start + i * NR;
                for tile in tiles(0..outputs.len()) {
                    let sums = &mut sums[..tile.len() * NR];
                    let left = &packed[tile.start * steps..tile.end * steps];
                    let tile_out = TileOut { ptr: sums.as_mut_ptr(), stride: NR, accumulate: false };
                    // SAFETY: `sums` holds the tile's rows of `NR` floats.
                    unsafe { P::tile(isa, tile.len(), left, panel, tile_out, Piece::NONE) };
                    let first = first + tile.start * n + start;
                    let target = Target { first, stride: n, columns: NR.min(n - start) };
                    // SAFETY: each task owns its rows of one expert.
                    unsafe { write_rows(isa, sums, out, target, false) };
                }
            }
        }
    });
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
