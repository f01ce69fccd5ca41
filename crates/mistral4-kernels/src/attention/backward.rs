//! Attention backward; probabilities are computed again from the log-sum-exp.
use super::Attention;
use super::blocks::{self, KEYS, Lanes, key_blocks, lanes_panel, multiply, scores_panel};
use super::forward::probabilities;
use crate::element::Element;
use crate::gemm::{Bf16Pair, NR, Panel, Piece, TileOut, pack_rows, pairs, tiles};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::per_isa;

/// Where [`attention_backward`] writes gradients, all contiguous.
#[derive(Debug)]
pub struct AttentionGrads<'a, T> {
    /// Gradient of the queries, `[Tq, N, H]`.
    pub q: &'a mut [T],
    /// Gradient of the keys, `[Tk, Nkv, H]`.
    pub k: &'a mut [T],
    /// Gradient of the values, `[Tk, Nkv, Hv]`.
    pub v: &'a mut [T],
}

/// What [`attention_backward`] needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSaved<'a, T> {
    /// Output, `[Tq, N, Hv]`.
    pub out: &'a [T],
    /// Log-sum-exp, `[Tq, N]`.
    pub lse: &'a [f32],
}

/// Gradients of [`attention`](super::attention), overwritten; rows in no segment get zeros.
///
/// # Shapes
/// See [`Attention`], [`AttentionSaved`], [`AttentionGrads`]; `dout`: `[Tq, N, Hv]`.
///
/// # Panics
/// When a slice has the wrong length, a segment lies outside an input, or two segments share a query row.
pub fn attention_backward<T: Element>(
    input: &Attention<'_, T>,
    saved: AttentionSaved<'_, T>,
    dout: &[T],
    grads: AttentionGrads<'_, T>,
) {
    let dims = input.dims;
    let pairs_of_queries = saved.lse.len();
    assert_eq!(saved.out.len(), pairs_of_queries * dims.value_dim, "out is [Tq, N, Hv]");
    assert_eq!(dout.len(), saved.out.len(), "dout is [Tq, N, Hv]");
    assert_eq!(grads.q.len(), pairs_of_queries * dims.head_dim, "dq is [Tq, N, H]");
    let key_rows = grads.k.len().checked_div(dims.kv_heads * dims.head_dim).unwrap_or(0);
    assert_eq!(grads.k.len(), key_rows * dims.kv_heads * dims.head_dim, "dk is [Tk, Nkv, H]");
    assert_eq!(grads.v.len(), key_rows * dims.kv_heads * dims.value_dim, "dv is [Tk, Nkv, Hv]");
    input.check(pairs_of_queries / dims.heads.max(1));
    assert!(input.segments.iter().all(|s| s.k.end <= key_rows), "segment keys lie in dk");
    grads.q.fill(T::default());
    let isa = Isa::active();
    let work = Backward {
        input,
        saved,
        dout,
        key_rows,
        dq: Shared::new(grads.q),
        dk: Shared::new(grads.k),
        dv: Shared::new(grads.v),
    };
    parallel::for_each(dims.kv_heads, |kv_head| {
        if pairs::<T, T>(isa) {
            work.kv_head::<Bf16Pair>(isa, kv_head);
        } else {
            work.kv_head::<f32>(isa, kv_head);
        }
    });
}

struct Backward<'a, T> {
    input: &'a Attention<'a, T>,
    saved: AttentionSaved<'a, T>,
    dout: &'a [T],
    key_rows: usize,
    dq: Shared<'a, T>,
    dk: Shared<'a, T>,
    dv: Shared<'a, T>,
}

/// Keys and values of one segment as the three left operands of the backward products.
struct Packed<P: Panel> {
    keys: Scratch<P>,
    keys_columns: Scratch<P>,
    values: Scratch<P>,
}

impl<T: Element> Backward<'_, T> {
    fn dout_row(&self, row: usize, head: usize) -> &[T] {
        let value_dim = self.input.dims.value_dim;
        &self.dout[(row * self.input.dims.heads + head) * value_dim..][..value_dim]
    }

    fn pack<P: Panel>(&self, isa: Isa, keys: std::ops::Range<usize>, kv_head: usize) -> Packed<P> {
        let (head_dim, value_dim) = (self.input.dims.head_dim, self.input.dims.value_dim);
        let (head_steps, value_steps) = (head_dim.div_ceil(P::STEP), value_dim.div_ceil(P::STEP));
        let len = keys.len();
        let mut packed = Packed {
            keys: scratch::take(len * head_steps),
            keys_columns: scratch::take(head_dim * len.div_ceil(P::STEP)),
            values: scratch::take(len * value_steps),
        };
        for block in key_blocks(len) {
            let row = |i: usize| keys.start + block.start + i;
            let out = &mut packed.keys[block.start * head_steps..block.end * head_steps];
            blocks::pack_vectors(isa, [block.len(), head_dim], |i| self.input.k_row(row(i), kv_head), out);
            let out = &mut packed.values[block.start * value_steps..block.end * value_steps];
            blocks::pack_vectors(isa, [block.len(), value_dim], |i| self.input.v_row(row(i), kv_head), out);
            let steps = block.start / P::STEP..block.end.div_ceil(P::STEP);
            let out = &mut packed.keys_columns[steps.start * head_dim..steps.end * head_dim];
            blocks::pack_columns(isa, [head_dim, block.len()], |i| self.input.k_row(row(i), kv_head), out);
        }
        packed
    }

    /// All segments of one key-value head, one after the other.
    fn kv_head<P: Panel>(&self, isa: Isa, kv_head: usize) {
        let dims = self.input.dims;
        let (dk_width, dv_width) = (padded(dims.head_dim), padded(dims.value_dim));
        let mut dk = scratch::zeros(self.key_rows * dk_width);
        let mut dv = scratch::zeros(self.key_rows * dv_width);
        for segment in self.input.segments {
            let packed = self.pack::<P>(isa, segment.k.clone(), kv_head);
            for block in 0..Lanes::blocks(segment, self.input.group()) {
                let lanes = Lanes::new(segment, self.input.group(), kv_head, block);
                let dk = &mut dk[segment.k.start * dk_width..segment.k.end * dk_width];
                let dv = &mut dv[segment.k.start * dv_width..segment.k.end * dv_width];
                self.lane_block::<P>(isa, &packed, segment.k.len(), &lanes, [dk, dv]);
            }
        }
        for row in 0..self.key_rows {
            let index = row * dims.kv_heads + kv_head;
            // SAFETY: each task owns one key-value head.
            let (dk_row, dv_row) = unsafe {
                (
                    self.dk.slice(index * dims.head_dim..(index + 1) * dims.head_dim),
                    self.dv.slice(index * dims.value_dim..(index + 1) * dims.value_dim),
                )
            };
            for (target, sum) in dk_row.iter_mut().zip(&dk[row * dk_width..]) {
                *target = T::from_f32(*sum);
            }
            for (target, sum) in dv_row.iter_mut().zip(&dv[row * dv_width..]) {
                *target = T::from_f32(*sum);
            }
        }
    }

    fn lane_block<P: Panel>(
        &self,
        isa: Isa,
        packed: &Packed<P>,
        key_count: usize,
        lanes: &Lanes,
        [dk, dv]: [&mut [f32]; 2],
    ) {
        let dims = self.input.dims;
        let (head_steps, value_steps) = (dims.head_dim.div_ceil(P::STEP), dims.value_dim.div_ceil(P::STEP));
        let q_row = |row: usize, head: usize| self.input.q_row(row, head);
        let dout_row = |row: usize, head: usize| self.dout_row(row, head);
        let queries = lanes_panel::<P, T>(isa, lanes, dims.head_dim, q_row);
        let douts = lanes_panel::<P, T>(isa, lanes, dims.value_dim, dout_row);
        let query_columns = columns_panels::<P, T>(isa, lanes, dims.head_dim, q_row);
        let dout_columns = columns_panels::<P, T>(isa, lanes, dims.value_dim, dout_row);
        // Lanes without keys have no probability to differentiate; any finite value does.
        let (mut lse, mut delta) = ([0.0f32; NR], [0.0f32; NR]);
        for lane in 0..lanes.len() {
            let (row, head) = lanes.query(lane);
            let index = row * dims.heads + head;
            if lanes.limits[lane] > 0 {
                lse[lane] = self.saved.lse[index];
                let out = &self.saved.out[index * dims.value_dim..][..dims.value_dim];
                delta[lane] = out.iter().zip(dout_row(row, head)).map(|(o, d)| o.to_f32() * d.to_f32()).sum();
            }
        }
        let mut dq = scratch::zeros(dims.head_dim * NR);
        let mut scores = scratch::take::<f32>(KEYS * NR);
        let mut dscores = scratch::take::<f32>(KEYS * NR);
        for block in key_blocks(key_count).take_while(|block| block.start < lanes.keys()) {
            let count = block.len();
            let (p, ds) = (&mut scores[..count * NR], &mut dscores[..count * NR]);
            let visible = lanes.limits.map(|limit| limit.saturating_sub(block.start as u32));
            let keys = &packed.keys[block.start * head_steps..block.end * head_steps];
            multiply(isa, keys, count, &queries, p, false);
            probabilities(isa, p, &visible, self.input.scale, &lse);
            let values = &packed.values[block.start * value_steps..block.end * value_steps];
            multiply(isa, values, count, &douts, ds, false);
            score_gradients(isa, p, ds, &delta, self.input.scale);

            add_lanes_product::<P>(isa, p, &dout_columns, &mut dv[block.start * padded(dims.value_dim)..]);
            add_lanes_product::<P>(isa, ds, &query_columns, &mut dk[block.start * padded(dims.head_dim)..]);
            let columns = &packed.keys_columns
                [block.start / P::STEP * dims.head_dim..block.end.div_ceil(P::STEP) * dims.head_dim];
            multiply(isa, columns, dims.head_dim, &scores_panel::<P>(isa, ds), &mut dq, true);
        }
        for lane in 0..lanes.len() {
            let (row, head) = lanes.query(lane);
            let index = row * dims.heads + head;
            // SAFETY: a (query, head) pair is in one lane of one task.
            let target = unsafe { self.dq.slice(index * dims.head_dim..(index + 1) * dims.head_dim) };
            for (target, sums) in target.iter_mut().zip(dq.as_chunks::<NR>().0) {
                *target = T::from_f32(sums[lane]);
            }
        }
    }
}

/// Distance between rows of sums, which are padded to whole panels.
fn padded(width: usize) -> usize {
    width.next_multiple_of(NR)
}

/// The vectors of the lanes as right panels whose summed axis is the lanes: `[panel][lane steps, NR]`.
fn columns_panels<'a, P: Panel, T: Element>(
    isa: Isa,
    lanes: &Lanes,
    width: usize,
    vector: impl Fn(usize, usize) -> &'a [T],
) -> Scratch<P> {
    let panel_len = NR / P::STEP * NR;
    let mut panels = scratch::take(width.div_ceil(NR) * panel_len);
    for (i, panel) in panels.chunks_exact_mut(panel_len).enumerate() {
        let columns = i * NR..((i + 1) * NR).min(width);
        let row = |lane: usize| {
            let (row, head) = lanes.query(lane);
            &vector(row, head)[columns.start..]
        };
        let used = lanes.len().div_ceil(P::STEP) * NR;
        pack_rows(isa, lanes.len(), [columns.len(), NR], row, &mut panel[..used]);
        panel[used..].fill(P::default());
    }
    panels
}

/// `out[keys, columns] += scores[keys, lanes] panels[lanes, columns]`.
fn add_lanes_product<P: Panel>(isa: Isa, scores: &[f32], panels: &[P], out: &mut [f32]) {
    let keys = scores.len() / NR;
    let steps = NR / P::STEP;
    let mut left = scratch::take::<P>(keys * steps);
    blocks::pack_vectors(isa, [keys, NR], |key| &scores[key * NR..(key + 1) * NR], &mut left);
    let panel_len = steps * NR;
    let stride = panels.len() / panel_len * NR;
    assert!(out.len() >= keys * stride);
    for tile in tiles(0..keys) {
        let left = &left[tile.start * steps..tile.end * steps];
        for (i, panel) in panels.chunks_exact(panel_len).enumerate() {
            let ptr = out[tile.start * stride + i * NR..].as_mut_ptr();
            // SAFETY: `out` holds `keys` rows of `stride` floats, and the panel is inside a row.
            unsafe {
                P::tile(isa, tile.len(), left, panel, TileOut { ptr, stride, accumulate: true }, Piece::NONE)
            };
        }
    }
}

per_isa! {
    /// `ds = p (dp - delta) scale`, in place of `dp`.
    fn score_gradients(p: &[f32], dp: &mut [f32], delta: &[f32; NR], scale: f32) = score_gradients_body;
}

#[inline(always)]
fn score_gradients_body<const FMA: bool>(p: &[f32], dp: &mut [f32], delta: &[f32; NR], scale: f32) {
    for (p, dp) in p.as_chunks::<NR>().0.iter().zip(dp.as_chunks_mut::<NR>().0) {
        for lane in 0..NR {
            dp[lane] = p[lane] * (dp[lane] - delta[lane]) * scale;
        }
    }
}
