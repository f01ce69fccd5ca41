//! Attention over cached latents: `kv_b_proj` is applied to the query and to the output, never to the cache.
use super::forward::attention;
use super::{Attention, AttentionDims, Segment};
use crate::element::Element;
use crate::gemm::{GemmDims, Matrix, MatrixMut, gemm};
use crate::parallel::{self, Shared};
use crate::scratch;
use std::ops::Range;

/// Sizes of [`latent_attention`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentDims {
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
    /// Distance between the latents of neighbouring slots.
    pub latent_stride: usize,
}

impl LatentDims {
    /// Entries of a query in latent space, and of a cached slot.
    fn width(&self) -> usize {
        self.rank + self.rope
    }

    /// First row in `kv_b` of a head's key part, and of its value part.
    fn kv_b_rows(&self, head: usize) -> [usize; 2] {
        let first = head * (self.nope + self.value_dim);
        [first, first + self.nope]
    }
}

/// Inputs of [`latent_attention`].
#[derive(Clone, Copy, Debug)]
pub struct LatentAttention<'a, T> {
    /// Sizes.
    pub dims: LatentDims,
    /// Queries, rotated part last, `[T, N, nope + rope]`.
    pub q: &'a [T],
    /// Cached latents, then the rotated key part, `[slots, R + rope]` with rows `latent_stride` apart.
    pub latents: &'a [T],
    /// `kv_b_proj`, each head's keys before its values, `[N * (nope + value_dim), R]`.
    pub kv_b: &'a [T],
    /// Which queries attend which slots.
    pub segments: &'a [Segment],
    /// Factor on scores before the softmax.
    pub scale: f32,
}

/// Multi-head latent attention in its absorbed form: scores and weighted sums are taken in the latent space.
///
/// # Shapes
/// See [`LatentAttention`]; `out`: `[T, N, value_dim]`. Queries in no segment give zeros.
///
/// Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.2.
///
/// # Panics
/// When a slice has the wrong length or a segment lies outside.
pub fn latent_attention<T: Element>(input: &LatentAttention<'_, T>, out: &mut [T]) {
    let d = input.dims;
    let head_dim = d.nope + d.rope;
    let tokens = input.q.len().checked_div(d.heads * head_dim).unwrap_or(0);
    assert_eq!(input.q.len(), tokens * d.heads * head_dim, "q is [T, N, nope + rope]");
    assert_eq!(input.kv_b.len(), d.heads * (d.nope + d.value_dim) * d.rank, "kv_b is [N * (nope + v), R]");
    assert_eq!(out.len(), tokens * d.heads * d.value_dim, "out is [T, N, value_dim]");

    let mut q = scratch::take::<T>(tokens * d.heads * d.width());
    to_latent(input, tokens, &mut q);

    let mut sums = scratch::take::<T>(tokens * d.heads * d.rank);
    let mut lse = scratch::take::<f32>(tokens * d.heads);
    let dims = AttentionDims {
        k_stride: d.latent_stride,
        v_stride: d.latent_stride,
        ..AttentionDims::contiguous(d.heads, 1, d.width(), d.rank)
    };
    attention(
        &Attention {
            dims,
            q: &q,
            k: input.latents,
            v: input.latents,
            segments: input.segments,
            scale: input.scale,
        },
        &mut sums,
        &mut lse,
    );

    let out = Shared::new(out);
    for_each_head(d.heads, |heads| {
        let mut block = scratch::take::<f32>(tokens * d.value_dim);
        for head in heads {
            let [_, first] = d.kv_b_rows(head);
            let to_value = &input.kv_b[first * d.rank..(first + d.value_dim) * d.rank];
            let sums = Matrix { data: &sums[head * d.rank..], row_stride: d.heads * d.rank, col_stride: 1 };
            let product = GemmDims { m: tokens, n: d.value_dim, k: d.rank };
            let c = MatrixMut { data: &mut block, row_stride: d.value_dim };
            gemm(product, sums, Matrix::transposed(to_value, d.rank), c, false);
            for (token, values) in block.chunks_exact(d.value_dim.max(1)).enumerate() {
                let start = (token * d.heads + head) * d.value_dim;
                // SAFETY: a head belongs to one task.
                round(values, unsafe { out.slice(start..start + d.value_dim) });
            }
        }
    });
}

/// Queries in latent space, rotated part last, `[T, N, R + rope]`.
fn to_latent<T: Element>(input: &LatentAttention<'_, T>, tokens: usize, out: &mut [T]) {
    let d = input.dims;
    let (heads, head_dim) = (d.heads, d.nope + d.rope);
    let out = Shared::new(out);
    for_each_head(heads, |range| {
        let mut block = scratch::take::<f32>(tokens * d.rank);
        for head in range {
            let [first, _] = d.kv_b_rows(head);
            let to_key = &input.kv_b[first * d.rank..(first + d.nope) * d.rank];
            let q = &input.q[head * head_dim..];
            let queries = Matrix { data: q, row_stride: heads * head_dim, col_stride: 1 };
            let product = GemmDims { m: tokens, n: d.rank, k: d.nope };
            let c = MatrixMut { data: &mut block, row_stride: d.rank };
            gemm(product, queries, Matrix::rows(to_key, d.rank), c, false);
            for (token, values) in block.chunks_exact(d.rank.max(1)).enumerate() {
                let start = (token * heads + head) * d.width();
                // SAFETY: a head belongs to one task.
                let out = unsafe { out.slice(start..start + d.width()) };
                let (latent, rotated) = out.split_at_mut(d.rank);
                round(values, latent);
                rotated.copy_from_slice(&q[token * heads * head_dim + d.nope..][..d.rope]);
            }
        }
    });
}

/// Two heads a task, so that waking a thread pays.
fn for_each_head(heads: usize, task: impl Fn(Range<usize>) + Sync + Send) {
    parallel::for_each_chunk(heads, 2, task);
}

fn round<T: Element>(values: &[f32], out: &mut [T]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = T::from_f32(*value);
    }
}
