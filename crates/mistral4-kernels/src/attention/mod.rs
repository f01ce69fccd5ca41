//! Softmax attention over segments of packed sequences, without a score matrix.
//!
//! Queries are laid across the lanes of a panel: one task holds [`NR`](crate::gemm::NR) pairs (query, head) that
//! share a key-value head and walks through blocks of keys. Scores come out as `[key, lane]`, so the running
//! maximum and sum need no horizontal steps, and the scores already are the right operand of the product
//! with the values.
mod backward;
mod blocks;
mod expanded;
mod few;
mod forward;
mod latent;

pub use backward::{AttentionGrads, AttentionSaved, attention_backward};
pub use expanded::{MlaAttention, MlaDims, MlaGrads, mla_attention, mla_attention_backward};
pub use forward::attention;
pub use latent::{LatentAttention, LatentDims, latent_attention};

use crate::element::Element;
use std::ops::Range;

/// Sizes of attention and distances between the rows of its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionDims {
    /// N: query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`, and head `n` reads key-value head `n / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// H: entries of a query and a key.
    pub head_dim: usize,
    /// Entries of a value.
    pub value_dim: usize,
    /// Distance between the queries of neighbouring tokens.
    pub q_stride: usize,
    /// Distance between the keys of neighbouring tokens.
    pub k_stride: usize,
    /// Distance between the values of neighbouring tokens.
    pub v_stride: usize,
    /// Distance between the values of neighbouring key-value heads.
    pub v_head_stride: usize,
}

impl AttentionDims {
    /// Sizes of contiguous inputs `[T, N, H]`.
    pub fn contiguous(heads: usize, kv_heads: usize, head_dim: usize, value_dim: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            q_stride: heads * head_dim,
            k_stride: kv_heads * head_dim,
            v_stride: kv_heads * value_dim,
            v_head_stride: value_dim,
        }
    }
}

/// Query rows and the key rows that they may attend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Query rows; no row is in two segments.
    pub q: Range<usize>,
    /// Key rows; segments may share them.
    pub k: Range<usize>,
    /// With `Some(offset)`, query `q.start + i` attends keys `k.start ..= k.start + i + offset` only.
    pub causal: Option<isize>,
}

impl Segment {
    /// Number of keys that query `q.start + i` attends.
    pub(crate) fn limit(&self, i: usize) -> usize {
        match self.causal {
            None => self.k.len(),
            Some(offset) => (i + 1).saturating_add_signed(offset).min(self.k.len()),
        }
    }
}

/// Inputs of [`attention`].
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a, T> {
    /// Sizes.
    pub dims: AttentionDims,
    /// Queries, `[Tq, N, H]` with rows `q_stride` apart.
    pub q: &'a [T],
    /// Keys, `[Tk, Nkv, H]` with rows `k_stride` apart.
    pub k: &'a [T],
    /// Values, `[Tk, Nkv, Hv]` with rows `v_stride` and heads `v_head_stride` apart; may be a part of the keys' memory.
    pub v: &'a [T],
    /// Which queries attend which keys.
    pub segments: &'a [Segment],
    /// Factor on scores before the softmax.
    pub scale: f32,
}

impl<'a, T: Element> Attention<'a, T> {
    fn check(&self, q_rows: usize) {
        let d = self.dims;
        assert!(
            d.kv_heads > 0 && d.heads.is_multiple_of(d.kv_heads),
            "kv_heads {} divides heads {}",
            d.kv_heads,
            d.heads
        );
        let last = |rows: usize, stride: usize, width: usize| {
            if rows == 0 { 0 } else { (rows - 1) * stride + width }
        };
        let mut queries: Vec<_> = self.segments.iter().map(|s| s.q.clone()).collect();
        queries.sort_by_key(|q| q.start);
        assert!(
            queries.windows(2).all(|w| w[0].end <= w[1].start || w[1].is_empty() || w[0].is_empty()),
            "no query row is in two segments"
        );
        for s in self.segments {
            assert!(s.q.start <= s.q.end && s.q.end <= q_rows, "segment queries {:?} of {q_rows} rows", s.q);
            assert!(s.k.start <= s.k.end, "segment keys {:?}", s.k);
            assert!(last(s.q.end, d.q_stride, d.heads * d.head_dim) <= self.q.len(), "q holds {:?}", s.q);
            assert!(last(s.k.end, d.k_stride, d.kv_heads * d.head_dim) <= self.k.len(), "k holds {:?}", s.k);
            let value_row = (d.kv_heads - 1) * d.v_head_stride + d.value_dim;
            assert!(last(s.k.end, d.v_stride, value_row) <= self.v.len(), "v holds {:?}", s.k);
        }
    }

    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.dims.heads / self.dims.kv_heads
    }

    fn q_row(&self, row: usize, head: usize) -> &'a [T] {
        &self.q[row * self.dims.q_stride + head * self.dims.head_dim..][..self.dims.head_dim]
    }

    fn k_row(&self, row: usize, kv_head: usize) -> &'a [T] {
        &self.k[row * self.dims.k_stride + kv_head * self.dims.head_dim..][..self.dims.head_dim]
    }

    fn v_row(&self, row: usize, kv_head: usize) -> &'a [T] {
        &self.v[row * self.dims.v_stride + kv_head * self.dims.v_head_stride..][..self.dims.value_dim]
    }
}
