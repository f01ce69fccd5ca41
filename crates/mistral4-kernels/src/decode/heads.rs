//! Attention of one token over cached latents, some heads and some slots at a time.
use super::weight::store;
use crate::element::Element;
use crate::experts::add_scaled;
use crate::gemm::{Rows, combine_each, combine_rows, dot_rows};
use crate::isa::Isa;
use crate::rope::{RopeDims, rotate_token};
use crate::scratch;
use crate::vector::{LANES, exp, per_isa, reduce};
use half::bf16;
use std::ops::Range;

/// Heads of a task: they share what is read of the cache.
pub(super) const HEADS: usize = 4;
/// Slots of a task at most.
const SLOTS: usize = 256;

/// Sizes of the attention of a decoded token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeAttentionDims {
    /// N: heads.
    pub heads: usize,
    /// Entries of a query that meet the latent.
    pub nope: usize,
    /// Entries of a query that meet the rotated key part.
    pub rope: usize,
    /// R: entries of a latent.
    pub rank: usize,
    /// Entries of a head's output.
    pub value_dim: usize,
    /// Whether rotated pairs are neighbours before the rotation.
    pub interleaved: bool,
    /// Factor on scores before the softmax.
    pub scale: f32,
}

impl DecodeAttentionDims {
    /// Entries of a query.
    pub(super) fn head_dim(&self) -> usize {
        self.nope + self.rope
    }

    /// Entries of a cached slot.
    pub(super) fn width(&self) -> usize {
        self.rank + self.rope
    }

    /// Largest score, sum of exponentials, and weighted sum of latents, of one head over some slots.
    fn partial(&self) -> usize {
        2 + self.rank
    }

    fn rope_dims(&self, heads: usize, head_dim: usize, offset: usize) -> RopeDims {
        let (rope_dim, interleaved) = (self.rope, self.interleaved);
        RopeDims { tokens: 1, heads, head_dim, offset, rope_dim, interleaved }
    }
}

/// What a token attends with and over.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) dims: DecodeAttentionDims,
    /// Not yet rotated, `[N, nope + rope]`.
    pub(super) q: &'a [bf16],
    pub(super) rotary: Rotary<'a>,
    /// `[slots, R + rope]`
    pub(super) cached: &'a [bf16],
    /// The token's own slot, `[R + rope]`.
    pub(super) own: &'a [bf16],
    /// Each head's keys before its values, `[N * (nope + value_dim), R]`.
    pub(super) kv_b: &'a [bf16],
}

/// Cos and sin of the token's position, `[rope / 2]`, and the factor on its query.
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// `[rope / 2]`
    pub cos: &'a [f32],
    /// `[rope / 2]`
    pub sin: &'a [f32],
    /// Llama-4 factor on the query.
    pub query_scale: f32,
}

/// How heads and slots are cut into tasks, by sizes alone.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    heads: usize,
    slots: usize,
    groups: usize,
    splits: usize,
}

impl Cut {
    /// For `slots` cached slots and one more.
    pub(super) fn new(dims: &DecodeAttentionDims, slots: usize) -> Self {
        let (groups, splits) = (dims.heads.div_ceil(HEADS), (slots + 1).div_ceil(SLOTS));
        Self { heads: dims.heads, slots: slots + 1, groups, splits }
    }

    /// Tasks of [`Heads::partial`].
    pub(super) fn partials(&self) -> usize {
        self.groups * self.splits
    }

    /// Tasks of [`Heads::combine`].
    pub(super) fn groups(&self) -> usize {
        self.groups
    }

    fn group(&self, group: usize) -> Range<usize> {
        group * HEADS..((group + 1) * HEADS).min(self.heads)
    }

    /// Values that all partial results take.
    pub(super) fn partial_len(&self, dims: &DecodeAttentionDims) -> usize {
        self.splits * dims.heads * dims.partial()
    }

    /// Where a task's results lie: `[splits, N, partial]`.
    pub(super) fn partial_range(&self, dims: &DecodeAttentionDims, task: usize) -> Range<usize> {
        let heads = self.group(task % self.groups);
        let first = task / self.groups * self.heads;
        (first + heads.start) * dims.partial()..(first + heads.end) * dims.partial()
    }

    /// Where a group's outputs lie in `[N, value_dim]`.
    pub(super) fn output_range(&self, dims: &DecodeAttentionDims, group: usize) -> Range<usize> {
        let heads = self.group(group);
        heads.start * dims.value_dim..heads.end * dims.value_dim
    }
}

/// Rotates the key part of a token.
pub(super) fn rotate_key(
    isa: Isa,
    dims: &DecodeAttentionDims,
    rotary: Rotary<'_>,
    from: &[bf16],
    to: &mut [bf16],
) {
    rotate_token(isa, dims.rope_dims(1, dims.rope, 0), [rotary.cos, rotary.sin], 1.0, from, to);
}

impl Heads<'_> {
    /// One group of heads over one split of the slots; `out` is the task's [`Cut::partial_range`].
    pub(super) fn partial(&self, isa: Isa, cut: &Cut, task: usize, out: &mut [f32]) {
        let d = &self.dims;
        let (width, heads) = (d.width(), cut.group(task % cut.groups));
        let split = task / cut.groups;
        let slots = cut.slots * split / cut.splits..cut.slots * (split + 1) / cut.splits;
        // The last slot of all is the token's own.
        let cached = slots.start..slots.end.min(cut.slots - 1);
        let (seen, count) = (cached.len(), slots.len());
        let cached = &self.cached[cached.start * width..cached.end * width];

        let q = self.latent_queries(isa, heads.clone());
        let q = Rows { data: &q, stride: width, count: heads.len() };
        let mut scores = scratch::take::<f32>(heads.len() * count);
        let mut block = scratch::take::<f32>(heads.len() * seen);
        dot_rows(isa, q, Rows { data: cached, stride: width, count: seen }, width, &mut block);
        for (scores, block) in scores.chunks_exact_mut(count).zip(block.chunks_exact(seen.max(1))) {
            scores[..seen].copy_from_slice(block);
        }
        if count > seen {
            let mut own = scratch::take::<f32>(heads.len());
            dot_rows(isa, q, Rows { data: self.own, stride: width, count: 1 }, width, &mut own);
            for (scores, own) in scores.chunks_exact_mut(count).zip(&own[..]) {
                scores[seen] = *own;
            }
        }

        for (scores, out) in scores.chunks_exact_mut(count).zip(out.chunks_exact_mut(d.partial())) {
            (out[0], out[1]) = exponentials(isa, d.scale, scores);
        }
        let own = (count > seen).then_some(self.own);
        self.weigh(isa, &scores, cached, own, &mut out[2..]);
    }

    /// Sums of latents weighed by each head's scores, `[heads, slots]`, as far apart in `out` as partial results are.
    fn weigh(&self, isa: Isa, scores: &[f32], cached: &[bf16], own: Option<&[bf16]>, out: &mut [f32]) {
        let (rank, width, stride) = (self.dims.rank, self.dims.width(), self.dims.partial());
        let seen = cached.len() / width;
        let count = seen + usize::from(own.is_some());
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512Bf16 {
            let row =
                |i: usize| own.filter(|_| i == seen).unwrap_or_else(|| &cached[i * width..(i + 1) * width]);
            // SAFETY: the processor has the instructions.
            unsafe { super::avx512::weigh(scores, (0..count).map(row), rank, stride, out) };
            return;
        }
        let factors = Rows { data: scores, stride: count, count: scores.len() / count };
        let rows = Rows { data: cached, stride: width, count: seen };
        combine_each(isa, factors, rows, &mut *out, [rank, stride]);
        for (scores, out) in scores.chunks_exact(count).zip(out.chunks_mut(stride)) {
            for (out, value) in out.iter_mut().zip(own.unwrap_or_default()).take(rank) {
                *out += scores[seen] * Element::to_f32(*value);
            }
        }
    }

    /// Queries of some heads in latent space, rotated part last, `[heads, R + rope]`.
    fn latent_queries(&self, isa: Isa, heads: Range<usize>) -> scratch::Scratch<bf16> {
        let d = &self.dims;
        let (head_dim, width) = (d.head_dim(), d.width());
        let mut rotated = scratch::take::<bf16>(heads.len() * head_dim);
        let dims = d.rope_dims(heads.len(), head_dim, d.nope);
        let q = &self.q[heads.start * head_dim..heads.end * head_dim];
        let Rotary { cos, sin, query_scale } = self.rotary;
        rotate_token(isa, dims, [cos, sin], query_scale, q, &mut rotated);
        let mut latent = scratch::take::<bf16>(heads.len() * width);
        let mut sums = scratch::take::<f32>(d.rank);
        let rows = rotated.chunks_exact(head_dim).zip(latent.chunks_exact_mut(width));
        for (head, (rotated, latent)) in heads.zip(rows) {
            let to_key = &self.kv_b[head * (d.nope + d.value_dim) * d.rank..][..d.nope * d.rank];
            let keys = Rows { data: to_key, stride: d.rank, count: d.nope };
            combine_rows(isa, &rotated[..d.nope], keys, &mut sums);
            store(isa, &sums, &mut latent[..d.rank]);
            latent[d.rank..].copy_from_slice(&rotated[d.nope..]);
        }
        latent
    }

    /// Adds up the splits of one group of heads and moves the sums to value space; `out` is its
    /// [`Cut::output_range`].
    pub(super) fn combine(&self, isa: Isa, cut: &Cut, group: usize, partials: &[f32], out: &mut [bf16]) {
        let d = &self.dims;
        let mut sums = scratch::take::<f32>(d.rank);
        let mut latent = scratch::take::<bf16>(d.rank);
        let mut values = scratch::take::<f32>(d.value_dim);
        for (head, out) in cut.group(group).zip(out.chunks_exact_mut(d.value_dim)) {
            let parts = (0..cut.splits).map(|split| &partials[(split * d.heads + head) * d.partial()..]);
            let max = parts.clone().map(|part| part[0]).fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            sums.fill(0.0);
            for part in parts {
                let factor = if part[0] == max { 1.0 } else { (part[0] - max).exp() };
                total += factor * part[1];
                add_scaled(isa, &mut sums, factor, &part[2..2 + d.rank]);
            }
            sums.iter_mut().for_each(|sum| *sum /= total);
            store(isa, &sums, &mut latent);
            let first = head * (d.nope + d.value_dim) + d.nope;
            let to_value = &self.kv_b[first * d.rank..(first + d.value_dim) * d.rank];
            let x = Rows { data: &latent[..], stride: d.rank, count: 1 };
            let rows = Rows { data: to_value, stride: d.rank, count: d.value_dim };
            dot_rows(isa, x, rows, d.rank, &mut values);
            store(isa, &values, out);
        }
    }
}

per_isa! {
    /// Replaces scores by exponentials relative to their maximum; gives the maximum and the sum.
    fn exponentials(scale: f32, scores: &mut [f32]) -> (f32, f32) = exponentials_body;
}

#[inline(always)]
fn exponentials_body<const FMA: bool>(scale: f32, scores: &mut [f32]) -> (f32, f32) {
    let (whole, rest) = scores.as_chunks_mut::<LANES>();
    // Lanes past the last score are those of none.
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    // A score that is not a number makes the sum one, whatever the maximum.
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for scores in whole.iter_mut().chain([&mut last]) {
        for (score, max) in scores.iter_mut().zip(&mut maxima) {
            *score *= scale;
            *max = if *score > *max { *score } else { *max };
        }
    }
    let max = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0f32; LANES];
    for scores in whole.iter_mut().chain([&mut last]) {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp::<FMA>(*score - shift);
            *sum += *score;
        }
    }
    rest.copy_from_slice(&last[..rest.len()]);
    (max, reduce(sums))
}
