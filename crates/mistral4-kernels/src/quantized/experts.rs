//! Routed experts with quantised weights.
use super::LANES;
use super::activations::Activations;
use super::linear::panels_of_task;
use super::matrix::{QuantizedMatrix, StackDims};
use super::product::product;
use crate::element::{Element, Index};
use crate::experts::{
    Activation, ExpertDims, ExpertGrads, Experts, Groups, add_scaled, gate_slices, gates_and_ups,
    moe_experts_backward,
};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use half::bf16;

/// Inputs of [`quantized_experts`].
#[derive(Clone, Copy, Debug)]
pub struct QuantizedExperts<'a, X, I> {
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
    /// Gate and up of each expert in turn, `[2E, F, D]`.
    pub gate_up: &'a QuantizedMatrix,
    /// Down projections, `[E, D, F]`.
    pub down: &'a QuantizedMatrix,
}

impl<X: Element, I: Index> QuantizedExperts<'_, X, I> {
    fn check(&self) {
        let ExpertDims { tokens, top_k, experts, hidden, inter } = self.dims;
        assert_eq!(self.x.len(), tokens * hidden, "x is [T, D]");
        assert_eq!(self.indices.len(), tokens * top_k, "indices are [T, K]");
        assert_eq!(self.weights.len(), tokens * top_k, "weights are [T, K]");
        let gate_up = StackDims { matrices: 2 * experts, rows: inter, columns: hidden };
        assert_eq!(self.gate_up.dims, gate_up, "gate_up is [2E, F, D]");
        let down = StackDims { matrices: experts, rows: hidden, columns: inter };
        assert_eq!(self.down.dims, down, "down is [E, D, F]");
    }
}

/// Mixture of gated experts with quantised weights; see [`moe_experts`](crate::moe_experts).
///
/// # Shapes
/// See [`QuantizedExperts`]; `out`: `[T, D]`.
///
/// # Panics
/// When a slice has the wrong length or an index is not in `0..E`.
pub fn quantized_experts<X: Element, I: Index>(experts: &QuantizedExperts<'_, X, I>, out: &mut [X]) {
    experts.check();
    assert_eq!(out.len(), experts.x.len(), "out is [T, D]");
    let isa = Isa::active();
    let ExpertDims { tokens, top_k, experts: count, hidden, inter } = experts.dims;
    let groups = Groups::new(experts.indices, top_k, count);
    let inner = gated(isa, experts, &groups);
    let inner = Activations::new::<X, f32>(isa, experts.down, groups.rows(), |row| {
        &inner[row * inter..(row + 1) * inter]
    });

    let sorted = (0..groups.rows() as u32).collect::<Vec<_>>();
    let out = Shared::new(out);
    let used = groups.used.len().max(1);
    let chunk = panels_of_task(experts.down, groups.most_rows()).div_ceil(used.min(4));
    parallel::for_each_chunk(experts.down.panels(), chunk, |panels| {
        let width = panels.len() * LANES;
        let columns = panels.start * LANES..(panels.end * LANES).min(hidden);
        let mut block = scratch::zeros(tokens * width);
        let mut sums = scratch::take::<f32>(groups.most_rows() * width);
        for (expert, rows) in &groups.used {
            let sums = &mut sums[..rows.len() * width];
            product(isa, experts.down, *expert, panels.clone(), &inner, &sorted[rows.clone()], sums);
            for (row, sums) in rows.clone().zip(sums.chunks_exact(width)) {
                let (token, weight) = (groups.token(row), experts.weights[groups.slot(row)]);
                add_scaled(isa, &mut block[token * width..(token + 1) * width], weight, sums);
            }
        }
        for (token, sums) in block.chunks_exact(width).enumerate() {
            // SAFETY: each task owns its columns.
            let out = unsafe { out.slice(token * hidden + columns.start..token * hidden + columns.end) };
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = X::from_f32(*sum);
            }
        }
    });
}

/// `act(gate x) * (up x)` of every sorted row, `[rows, F]`.
fn gated<X: Element, I: Index>(
    isa: Isa,
    experts: &QuantizedExperts<'_, X, I>,
    groups: &Groups,
) -> scratch::Scratch<f32> {
    let ExpertDims { tokens, hidden, inter, .. } = experts.dims;
    let x = Activations::new::<X, X>(isa, experts.gate_up, tokens, |token| {
        &experts.x[token * hidden..(token + 1) * hidden]
    });
    let order: Vec<u32> = (0..groups.rows()).map(|row| groups.token(row) as u32).collect();
    let panels = experts.gate_up.panels();
    let chunk = panels_of_task(experts.gate_up, groups.most_rows()).min(panels.max(1));
    let chunks = panels.div_ceil(chunk);
    let mut inner = scratch::take::<f32>(groups.rows() * inter);
    let shared = Shared::new(&mut inner);
    parallel::for_each(groups.used.len() * chunks, |task| {
        let (expert, rows) = &groups.used[task / chunks];
        let first = task % chunks * chunk;
        let panels = first..(first + chunk).min(panels);
        let width = panels.len() * LANES;
        let columns = panels.start * LANES..(panels.end * LANES).min(inter);
        let mut sums = scratch::take::<f32>(2 * rows.len() * width);
        let (gate, up) = sums.split_at_mut(rows.len() * width);
        for (part, sums) in [&mut *gate, &mut *up].into_iter().enumerate() {
            let tokens = &order[rows.clone()];
            product(isa, experts.gate_up, 2 * expert + part, panels.clone(), &x, tokens, sums);
        }
        gate_slices(isa, experts.activation, gate, up);
        for (row, gate) in rows.clone().zip(gate.chunks_exact(width)) {
            // SAFETY: each task owns its columns of its expert's rows.
            let target = unsafe { shared.slice(row * inter + columns.start..row * inter + columns.end) };
            target.copy_from_slice(&gate[..columns.len()]);
        }
    });
    inner
}

/// Gradients of the tokens and the routing weights of [`quantized_experts`]; quantised weights have none.
///
/// Each expert's weights become floats while its rows are worked on.
///
/// # Shapes
/// See [`QuantizedExperts`]; `dout`, `dx`: `[T, D]`, `dweights`: `[T, K]`.
///
/// # Panics
/// As [`quantized_experts`].
pub fn quantized_experts_backward<X: Element, I: Index>(
    experts: &QuantizedExperts<'_, X, I>,
    dout: &[X],
    dx: &mut [X],
    dweights: &mut [f32],
) {
    experts.check();
    assert_eq!(dout.len(), experts.x.len(), "dout is [T, D]");
    assert_eq!(dx.len(), experts.x.len(), "dx is [T, D]");
    assert_eq!(dweights.len(), experts.weights.len(), "dweights is [T, K]");
    if X::IS_BF16 {
        backward::<X, bf16, I>(experts, dout, dx, dweights);
    } else {
        backward::<X, f32, I>(experts, dout, dx, dweights);
    }
}

/// `W` is what weights become.
fn backward<X: Element, W: Element, I: Index>(
    experts: &QuantizedExperts<'_, X, I>,
    dout: &[X],
    dx: &mut [X],
    dweights: &mut [f32],
) {
    let ExpertDims { top_k, experts: count, hidden, inter, .. } = experts.dims;
    let (isa, groups) = (Isa::active(), Groups::new(experts.indices, top_k, count));
    let mut dx_rows = scratch::take::<X>(groups.rows() * hidden);
    let (dx_shared, dweights) = (Shared::new(&mut dx_rows), Shared::new(dweights));
    parallel::for_each(groups.used.len(), |index| {
        let (expert, rows) = &groups.used[index];
        let mut gate_up = scratch::take::<W>(2 * inter * hidden);
        let mut down = scratch::take::<W>(hidden * inter);
        let mut gates = scratch::take::<X>(rows.len() * 2 * inter);
        let gather = |from: &[X]| {
            let mut to = scratch::take::<X>(rows.len() * hidden);
            for (row, to) in rows.clone().zip(to.chunks_exact_mut(hidden)) {
                to.copy_from_slice(&from[groups.token(row) * hidden..][..hidden]);
            }
            to
        };
        let (x, dout) = (gather(experts.x), gather(dout));
        let weights: Vec<f32> = rows.clone().map(|row| experts.weights[groups.slot(row)]).collect();
        let mut of_weights = vec![0.0; rows.len()];
        // SAFETY: each task owns its sorted rows.
        let dx = unsafe { dx_shared.slice(rows.start * hidden..rows.end * hidden) };
        isa.run(|| {
            for (part, half) in gate_up.chunks_exact_mut((inter * hidden).max(1)).enumerate() {
                experts.gate_up.dequantize(2 * expert + part, half);
            }
            experts.down.dequantize(*expert, &mut down);
            let one = Experts {
                dims: ExpertDims { tokens: rows.len(), top_k: 1, experts: 1, hidden, inter },
                activation: experts.activation,
                x: &x[..],
                indices: &vec![0i32; rows.len()][..],
                weights: &weights,
                gate_up: &gate_up[..],
                down: &down[..],
            };
            let grads =
                ExpertGrads { x: Some(dx), weights: Some(&mut of_weights), gate_up: None, down: None };
            gates_and_ups(&one, &mut gates);
            moe_experts_backward(&one, &gates, &dout, grads);
        });
        for (row, gradient) in rows.clone().zip(of_weights) {
            let slot = groups.slot(row);
            // SAFETY: every slot belongs to one sorted row.
            let target = unsafe { dweights.slice(slot..slot + 1) };
            target[0] = gradient;
        }
    });

    // A token's gradients are added in the order of experts.
    let mut row_of_slot = vec![0usize; groups.rows()];
    for row in 0..groups.rows() {
        row_of_slot[groups.slot(row)] = row;
    }
    let dx = Shared::new(dx);
    parallel::for_each_chunk(experts.dims.tokens, 16, |tokens| {
        let mut sum = scratch::take::<f32>(hidden);
        for token in tokens {
            let mut rows: Vec<usize> = row_of_slot[token * top_k..(token + 1) * top_k].to_vec();
            rows.sort_unstable();
            sum.fill(0.0);
            for row in rows {
                for (sum, value) in sum.iter_mut().zip(&dx_rows[row * hidden..(row + 1) * hidden]) {
                    *sum += value.to_f32();
                }
            }
            // SAFETY: each task owns its tokens.
            let dx = unsafe { dx.slice(token * hidden..(token + 1) * hidden) };
            for (dx, sum) in dx.iter_mut().zip(&sum[..]) {
                *dx = X::from_f32(*sum);
            }
        }
    });
}
