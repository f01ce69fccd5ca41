//! Attention forward for few queries, as in decoding: keys are split over tasks, partial results combined.
use super::blocks::Lanes;
use super::{Attention, Segment};
use crate::element::Element;
use crate::gemm::{Left, NR, Panel, Stretch, multiply_rows, pack_lanes, pack_rows, tiles};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::{exp, per_isa};
use std::ops::Range;

/// Keys of one task.
const SPLIT: usize = 256;

/// Whether a segment has so few (query, head) pairs on each key-value head that they fit one lane block.
pub(super) fn is_few(segment: &Segment, group: usize) -> bool {
    segment.q.len() * group <= NR
}

/// Queries of one key-value head as rows, with what one split of the keys gives for them.
struct Partial {
    max: [f32; NR],
    sum: [f32; NR],
    /// `[panels of Hv, rows, NR]`.
    out: Scratch<f32>,
}

/// Attention of the segments that [`is_few`] selects.
pub(super) fn forward_few<P: Panel, T: Element>(
    isa: Isa,
    input: &Attention<'_, T>,
    segments: &[&Segment],
    out: Shared<'_, T>,
    lse: Shared<'_, f32>,
) {
    let kv_heads = input.dims.kv_heads;
    let mut tasks = Vec::new();
    for (s, segment) in segments.iter().enumerate() {
        for kv_head in 0..kv_heads {
            let splits = (0..segment.k.len()).step_by(SPLIT);
            tasks.extend(splits.map(|start| (s, kv_head, start..(start + SPLIT).min(segment.k.len()))));
        }
    }
    let mut partials: Vec<Option<Partial>> = Vec::new();
    partials.resize_with(tasks.len(), || None);
    let shared = Shared::new(&mut partials);
    parallel::for_each(tasks.len(), |task| {
        let (s, kv_head, keys) = tasks[task].clone();
        let lanes = Lanes::new(segments[s], input.group(), kv_head, 0);
        let partial = split::<P, T>(isa, input, segments[s], &lanes, kv_head, keys);
        // SAFETY: each task owns one entry.
        unsafe { shared.slice(task..task + 1)[0] = Some(partial) };
    });

    let mut next = 0;
    for segment in segments {
        let splits = segment.k.len().div_ceil(SPLIT);
        for kv_head in 0..kv_heads {
            let lanes = Lanes::new(segment, input.group(), kv_head, 0);
            let parts: Vec<&Partial> = partials[next..next + splits].iter().flatten().collect();
            next += splits;
            combine(input, &lanes, &parts, out, lse);
        }
    }
}

fn split<P: Panel, T: Element>(
    isa: Isa,
    input: &Attention<'_, T>,
    segment: &Segment,
    lanes: &Lanes,
    kv_head: usize,
    keys: Range<usize>,
) -> Partial {
    let (head_dim, value_dim) = (input.dims.head_dim, input.dims.value_dim);
    let (rows, count) = (lanes.len(), keys.len());
    let first = segment.k.start + keys.start;

    let steps = head_dim.div_ceil(P::STEP);
    let mut queries = scratch::take::<P>(rows * steps);
    for tile in tiles(0..rows) {
        let row = |i: usize| {
            let (row, head) = lanes.query(tile.start + i);
            input.q_row(row, head)
        };
        let out = &mut queries[tile.start * steps..tile.end * steps];
        pack_lanes(isa, head_dim, [tile.len(), tile.len()], row, out);
    }
    let panels = count.div_ceil(NR);
    let mut scores = scratch::take::<f32>(panels * rows * NR);
    let pack_keys = |depth: Range<usize>, out: &mut [P]| {
        let panel_len = depth.len().div_ceil(P::STEP) * NR;
        for (panel, out) in out.chunks_exact_mut(panel_len).enumerate() {
            let lanes = NR.min(count - panel * NR);
            let lane = |i: usize| &input.k_row(first + panel * NR + i, kv_head)[depth.start..];
            pack_lanes(isa, depth.len(), [lanes, NR], lane, out);
        }
    };
    let queries = Left::new(&queries, 0..rows, head_dim);
    multiply_rows(isa, &queries, pack_keys, |_| [Stretch::NONE; 2], [Stretch::NONE; 2], &mut scores);

    let mut partial = Partial {
        max: [f32::NEG_INFINITY; NR],
        sum: [0.0; NR],
        out: scratch::take(value_dim.div_ceil(NR) * rows * NR),
    };
    for row in 0..rows {
        let visible = (lanes.limits[row] as usize).saturating_sub(keys.start).min(count);
        let row = Row { row, rows, visible, scale: input.scale };
        (partial.max[row.row], partial.sum[row.row]) = exponentials(isa, row, &mut scores);
    }

    let steps = count.div_ceil(P::STEP);
    let mut left = scratch::take::<P>(rows * steps);
    for tile in tiles(0..rows) {
        let height = tile.len();
        for (panel, scores) in scores.chunks_exact(rows * NR).enumerate() {
            let depth = NR.min(count - panel * NR);
            let at = tile.start * steps + panel * NR / P::STEP * height;
            let out = &mut left[at..at + depth.div_ceil(P::STEP) * height];
            pack_lanes(isa, depth, [height, height], |i| &scores[(tile.start + i) * NR..], out);
        }
    }
    let width = value_dim.next_multiple_of(NR);
    let pack_values = |depth: Range<usize>, out: &mut [P]| {
        let row = |k: usize| input.v_row(first + depth.start + k, kv_head);
        pack_rows(isa, depth.len(), [value_dim, width], row, out);
    };
    let left = Left::new(&left, 0..rows, count);
    multiply_rows(isa, &left, pack_values, |_| [Stretch::NONE; 2], [Stretch::NONE; 2], &mut partial.out);
    partial
}

/// One row of `[panels, rows, NR]` scores, of which the first `visible` count.
#[derive(Clone, Copy)]
struct Row {
    row: usize,
    rows: usize,
    visible: usize,
    scale: f32,
}

per_isa! {
    /// Replaces the scores of a row by exponentials relative to their maximum; gives the maximum and the sum.
    fn exponentials(row: Row, scores: &mut [f32]) -> (f32, f32) = exponentials_body;
}

#[inline(always)]
fn exponentials_body<const FMA: bool>(row: Row, scores: &mut [f32]) -> (f32, f32) {
    let Row { row, rows, visible, scale } = row;
    let (panels, _) = scores.as_chunks_mut::<NR>();
    let mut maxima = [f32::NEG_INFINITY; NR];
    for (panel, scores) in panels.iter_mut().skip(row).step_by(rows).enumerate() {
        let seen = visible.saturating_sub(panel * NR);
        for (lane, (score, max)) in scores.iter_mut().zip(&mut maxima).enumerate() {
            *score = if lane < seen { *score * scale } else { f32::NEG_INFINITY };
            *max = if *score > *max { *score } else { *max };
        }
    }
    let max = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0f32; NR];
    for scores in panels.iter_mut().skip(row).step_by(rows) {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp::<FMA>(*score - shift);
            *sum += *score;
        }
    }
    (max, crate::vector::reduce(sums))
}

/// Adds up the splits of one key-value head, in order.
fn combine<T: Element>(
    input: &Attention<'_, T>,
    lanes: &Lanes,
    parts: &[&Partial],
    out: Shared<'_, T>,
    lse: Shared<'_, f32>,
) {
    let (rows, value_dim) = (lanes.len(), input.dims.value_dim);
    let mut sums = scratch::take::<f32>(value_dim);
    for row in 0..rows {
        let max = parts.iter().map(|part| part.max[row]).fold(f32::NEG_INFINITY, f32::max);
        let (query, head) = lanes.query(row);
        let index = query * input.dims.heads + head;
        // SAFETY: a (query, head) pair is in one segment.
        let (out, lse) =
            unsafe { (out.slice(index * value_dim..(index + 1) * value_dim), lse.slice(index..index + 1)) };
        if max == f32::NEG_INFINITY && parts.iter().all(|part| part.sum[row] == 0.0) {
            out.fill(T::default());
            lse[0] = f32::NEG_INFINITY;
            continue;
        }
        let mut sum = 0.0f32;
        sums.fill(0.0);
        for part in parts {
            let factor = if part.max[row] == f32::NEG_INFINITY { 0.0 } else { (part.max[row] - max).exp() };
            sum += factor * part.sum[row];
            for (panel, sums) in sums.chunks_mut(NR).enumerate() {
                let values = &part.out[(panel * rows + row) * NR..];
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += factor * value;
                }
            }
        }
        for (out, value) in out.iter_mut().zip(&*sums) {
            *out = T::from_f32(value / sum);
        }
        lse[0] = max + sum.ln();
    }
}
