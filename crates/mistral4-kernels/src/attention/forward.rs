//! Attention forward with an online softmax.
use super::blocks::{self, KEYS, Lanes, key_blocks, lanes_panel, multiply, scores_panel};
use super::few::{forward_few, is_few};
use super::{Attention, Segment};
use crate::element::Element;
use crate::gemm::{Bf16Pair, NR, Panel, pairs};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::{exp, mul_add, per_isa};
use std::ops::Range;

/// Softmax attention of each segment's queries over its keys.
///
/// Queries that attend no key, or are in no segment, get zeros and a log-sum-exp of minus infinity.
///
/// # Shapes
/// See [`Attention`]; `out`: `[Tq, N, Hv]`; `lse` (log of the sum of exponentials of scaled scores):
/// `[Tq, N]`.
///
/// # Panics
/// When a segment lies outside an input, or two segments share a query row.
pub fn attention<T: Element>(input: &Attention<'_, T>, out: &mut [T], lse: &mut [f32]) {
    let (heads, value_dim) = (input.dims.heads, input.dims.value_dim);
    assert_eq!(out.len(), lse.len() * value_dim, "out is [Tq, N, Hv] and lse [Tq, N]");
    let rows = lse.len() / heads.max(1);
    input.check(rows);
    for gap in gaps(input.segments, rows) {
        out[gap.start * heads * value_dim..gap.end * heads * value_dim].fill(T::default());
        lse[gap.start * heads..gap.end * heads].fill(f32::NEG_INFINITY);
    }
    let isa = Isa::active();
    if pairs::<T, T>(isa) {
        forward::<Bf16Pair, T>(isa, input, out, lse);
    } else {
        forward::<f32, T>(isa, input, out, lse);
    }
}

/// Query rows in no segment.
fn gaps(segments: &[Segment], rows: usize) -> Vec<Range<usize>> {
    let mut queries: Vec<_> = segments.iter().map(|segment| segment.q.clone()).collect();
    queries.sort_by_key(|q| q.start);
    let mut end = 0;
    let mut gaps = Vec::new();
    for q in queries.into_iter().chain(std::iter::once(rows..rows)) {
        if end < q.start {
            gaps.push(end..q.start);
        }
        end = end.max(q.end);
    }
    gaps
}

/// Keys and values of one segment and key-value head, packed block by block.
struct Packed<P: Panel> {
    keys: Scratch<P>,
    values: Scratch<P>,
}

fn pack<P: Panel, T: Element>(
    isa: Isa,
    input: &Attention<'_, T>,
    segment: &Segment,
    kv_head: usize,
) -> Packed<P> {
    let key_steps = input.dims.head_dim.div_ceil(P::STEP);
    let value_dim = input.dims.value_dim;
    let len = segment.k.len();
    let mut keys = scratch::take(len * key_steps);
    let mut values = scratch::take(value_dim * len.div_ceil(P::STEP));
    for block in key_blocks(len) {
        let rows = segment.k.start + block.start..segment.k.start + block.end;
        let out = &mut keys[block.start * key_steps..block.end * key_steps];
        blocks::pack_keys(isa, input, rows.clone(), kv_head, out);
        let steps = block.start / P::STEP..block.end.div_ceil(P::STEP);
        let out = &mut values[steps.start * value_dim..steps.end * value_dim];
        blocks::pack_values(isa, input, rows, kv_head, out);
    }
    Packed { keys, values }
}

fn forward<P: Panel, T: Element>(isa: Isa, input: &Attention<'_, T>, out: &mut [T], lse: &mut [f32]) {
    let kv_heads = input.dims.kv_heads;
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let (few, segments): (Vec<_>, Vec<_>) =
        input.segments.iter().partition(|segment| is_few(segment, input.group()));
    forward_few::<P, T>(isa, input, &few, out, lse);

    let mut packed: Vec<Option<Packed<P>>> = Vec::new();
    packed.resize_with(segments.len() * kv_heads, || None);
    let shared = Shared::new(&mut packed);
    parallel::for_each(segments.len() * kv_heads, |i| {
        // SAFETY: each task owns one entry.
        unsafe { shared.slice(i..i + 1)[0] = Some(pack(isa, input, segments[i / kv_heads], i % kv_heads)) };
    });
    let mut tasks = Vec::new();
    for (s, segment) in segments.iter().enumerate() {
        for kv_head in 0..kv_heads {
            tasks.extend((0..Lanes::blocks(segment, input.group())).map(|block| (s, kv_head, block)));
        }
    }
    parallel::for_each(tasks.len(), |task| {
        let (s, kv_head, block) = tasks[task];
        let lanes = Lanes::new(segments[s], input.group(), kv_head, block);
        if let Some(packed) = &packed[s * kv_heads + kv_head] {
            lane_block(isa, input, packed, segments[s].k.len(), &lanes, out, lse);
        }
    });
}

/// Running softmax of each lane.
struct Softmax {
    /// What exponentials are relative to: the maximum, or at most [`SLACK`] below it; minus infinity before the first
    /// visible key.
    max: [f32; NR],
    sum: [f32; NR],
    /// Factor on what was summed before the last block.
    rescale: [f32; NR],
    /// Whether some factor is not 1.
    rescales: bool,
}

/// A maximum that grows by less than this moves nothing: exponentials up to `e^8` lose nothing in floats, and the sums so
/// far need not be multiplied.
const SLACK: f32 = 8.0;

fn lane_block<P: Panel, T: Element>(
    isa: Isa,
    input: &Attention<'_, T>,
    packed: &Packed<P>,
    keys: usize,
    lanes: &Lanes,
    out: Shared<'_, T>,
    lse: Shared<'_, f32>,
) {
    let dims = input.dims;
    let queries = lanes_panel::<P, T>(isa, lanes, dims.head_dim, |row, head| input.q_row(row, head));
    let mut softmax =
        Softmax { max: [f32::NEG_INFINITY; NR], sum: [0.0; NR], rescale: [1.0; NR], rescales: false };
    let mut sums = scratch::zeros(dims.value_dim * NR);
    let mut scores = scratch::take::<f32>(KEYS * NR);
    let key_steps = dims.head_dim.div_ceil(P::STEP);
    for block in key_blocks(keys).take_while(|block| block.start < lanes.keys()) {
        let scores = &mut scores[..block.len() * NR];
        let left = &packed.keys[block.start * key_steps..block.end * key_steps];
        multiply(isa, left, block.len(), &queries, scores, false);
        let visible = lanes.limits.map(|limit| limit.saturating_sub(block.start as u32));
        softmax_block(isa, scores, &visible, input.scale, &mut softmax);
        if softmax.rescales {
            rescale(isa, &mut sums, &softmax.rescale);
        }
        let left = &packed.values
            [block.start / P::STEP * dims.value_dim..block.end.div_ceil(P::STEP) * dims.value_dim];
        multiply(isa, left, dims.value_dim, &scores_panel::<P>(isa, scores), &mut sums, true);
    }
    for lane in 0..lanes.len() {
        let (row, head) = lanes.query(lane);
        let index = row * dims.heads + head;
        // SAFETY: a (query, head) pair is in one lane of one task.
        let (out, lse) = unsafe {
            (out.slice(index * dims.value_dim..(index + 1) * dims.value_dim), lse.slice(index..index + 1))
        };
        let sum = softmax.sum[lane];
        if sum > 0.0 || sum.is_nan() {
            for (out, sums) in out.iter_mut().zip(sums.as_chunks::<NR>().0) {
                *out = T::from_f32(sums[lane] / sum);
            }
            lse[0] = softmax.max[lane] + sum.ln();
        } else {
            out.fill(T::default());
            lse[0] = f32::NEG_INFINITY;
        }
    }
}

per_isa! {
    /// Turns scores into exponentials relative to the running maximum; the first `visible` keys of each lane
    /// count.
    fn softmax_block(scores: &mut [f32], visible: &[u32; NR], scale: f32, state: &mut Softmax)
        = softmax_block_body;
}

#[inline(always)]
fn softmax_block_body<const FMA: bool>(
    scores: &mut [f32],
    visible: &[u32; NR],
    scale: f32,
    state: &mut Softmax,
) {
    let rows = scores.as_chunks_mut::<NR>().0;
    let mut max = state.max;
    for (key, row) in rows.iter_mut().enumerate() {
        for lane in 0..NR {
            let seen = (key as u32) < visible[lane];
            let score = if seen { row[lane] * scale } else { f32::NEG_INFINITY };
            row[lane] = score;
            max[lane] = if score > max[lane] { score } else { max[lane] };
        }
    }
    for (max, before) in max.iter_mut().zip(&state.max) {
        *max = if *max > before + SLACK { *max } else { *before };
    }
    // A lane that has seen no key yet keeps a finite shift, so that its exponentials are zero.
    let shift = max.map(|max| if max == f32::NEG_INFINITY { 0.0 } else { max });
    let before = state.max.iter().zip(&shift);
    for ((rescale, sum), (max, shift)) in state.rescale.iter_mut().zip(&mut state.sum).zip(before) {
        // Nothing was summed before the first visible key.
        *rescale = if *max == f32::NEG_INFINITY { 1.0 } else { exp::<FMA>(max - shift) };
        *sum *= *rescale;
    }
    state.rescales = state.rescale.iter().any(|rescale| *rescale != 1.0);
    for row in rows {
        for lane in 0..NR {
            row[lane] = exp::<FMA>(row[lane] - shift[lane]);
            state.sum[lane] += row[lane];
        }
    }
    state.max = max;
}

per_isa! {
    /// Multiplies each lane of `[rows, NR]` sums by its factor.
    fn rescale(sums: &mut [f32], factors: &[f32; NR]) = rescale_body;
}

#[inline(always)]
fn rescale_body<const FMA: bool>(sums: &mut [f32], factors: &[f32; NR]) {
    for row in sums.as_chunks_mut::<NR>().0 {
        for lane in 0..NR {
            row[lane] *= factors[lane];
        }
    }
}

per_isa! {
    /// Turns scores into probabilities by the log-sum-exp of each lane.
    pub(super) fn probabilities(scores: &mut [f32], visible: &[u32; NR], scale: f32, lse: &[f32; NR])
        = probabilities_body;
}

#[inline(always)]
fn probabilities_body<const FMA: bool>(scores: &mut [f32], visible: &[u32; NR], scale: f32, lse: &[f32; NR]) {
    for (key, row) in scores.as_chunks_mut::<NR>().0.iter_mut().enumerate() {
        for lane in 0..NR {
            let p = exp::<FMA>(mul_add::<FMA>(row[lane], scale, -lse[lane]));
            row[lane] = if (key as u32) < visible[lane] { p } else { 0.0 };
        }
    }
}
