//! Multi-head latent attention among the tokens of one pass: keys and values expanded by `kv_b_proj`.
use super::backward::{AttentionGrads, AttentionSaved, attention_backward};
use super::forward::attention;
use super::{Attention, AttentionDims, Segment};
use crate::element::Element;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};

/// Tokens of one task.
const ROWS: usize = 16;

/// Sizes of [`mla_attention`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlaDims {
    /// N: heads.
    pub heads: usize,
    /// Entries of a query and a key that are not rotated.
    pub nope: usize,
    /// Rotated entries, last in a query; those of the key are the same for all heads.
    pub rope: usize,
    /// Entries of a value.
    pub value_dim: usize,
}

impl MlaDims {
    fn head_dim(&self) -> usize {
        self.nope + self.rope
    }

    /// Entries of a head in the expanded keys and values.
    fn kv_dim(&self) -> usize {
        self.nope + self.value_dim
    }

    /// Values are read where they were expanded, behind each head's key part.
    fn attention(&self) -> AttentionDims {
        AttentionDims {
            v_stride: self.heads * self.kv_dim(),
            v_head_stride: self.kv_dim(),
            ..AttentionDims::contiguous(self.heads, self.heads, self.head_dim(), self.value_dim)
        }
    }
}

/// Inputs of [`mla_attention`].
#[derive(Clone, Copy, Debug)]
pub struct MlaAttention<'a, T> {
    /// Sizes.
    pub dims: MlaDims,
    /// Queries, rotated part last, `[T, N, nope + rope]`.
    pub q: &'a [T],
    /// Output of `kv_b_proj`, each head's key part before its value, `[slots, N, nope + value_dim]`; the slots are the
    /// tokens themselves unless those of a cache come before them.
    pub kv: &'a [T],
    /// Rotated part of the keys, `[slots, rope]`.
    pub k_pe: &'a [T],
    /// Which tokens attend which slots.
    pub segments: &'a [Segment],
    /// Factor on scores before the softmax.
    pub scale: f32,
}

/// Where [`mla_attention_backward`] writes gradients.
#[derive(Debug)]
pub struct MlaGrads<'a, T> {
    /// Gradient of the queries, `[T, N, nope + rope]`.
    pub q: &'a mut [T],
    /// Gradient of the expanded keys and values, `[T, N, nope + value_dim]`.
    pub kv: &'a mut [T],
    /// Gradient of the rotated part of the keys, `[T, rope]`.
    pub k_pe: &'a mut [T],
}

impl<T: Element> MlaAttention<'_, T> {
    fn slots(&self) -> usize {
        let d = self.dims;
        let slots = self.kv.len().checked_div(d.heads * d.kv_dim()).unwrap_or(0);
        assert_eq!(self.kv.len(), slots * d.heads * d.kv_dim(), "kv is [slots, N, nope + v]");
        assert_eq!(self.k_pe.len(), slots * d.rope, "k_pe is [slots, rope]");
        slots
    }

    /// Keys of all heads, `[slots, N, nope + rope]`.
    fn keys(&self, tokens: usize) -> Scratch<T> {
        let d = self.dims;
        let row = d.heads * d.head_dim();
        let mut keys = scratch::take::<T>(tokens * row);
        let shared = Shared::new(&mut keys);
        parallel::for_each_chunk(tokens, ROWS, |chunk| {
            for token in chunk {
                // SAFETY: each task owns its tokens.
                let keys = unsafe { shared.slice(token * row..(token + 1) * row) };
                let kv = &self.kv[token * d.heads * d.kv_dim()..][..d.heads * d.kv_dim()];
                let k_pe = &self.k_pe[token * d.rope..(token + 1) * d.rope];
                for head in 0..d.heads {
                    let key = &mut keys[head * d.head_dim()..(head + 1) * d.head_dim()];
                    key[..d.nope].copy_from_slice(&kv[head * d.kv_dim()..][..d.nope]);
                    key[d.nope..].copy_from_slice(k_pe);
                }
            }
        });
        keys
    }

    fn expanded<'a>(&'a self, keys: &'a [T]) -> Attention<'a, T> {
        // Without tokens there is no first value either.
        let v = &self.kv[self.dims.nope.min(self.kv.len())..];
        let (q, segments, scale) = (self.q, self.segments, self.scale);
        Attention { dims: self.dims.attention(), q, k: keys, v, segments, scale }
    }
}

/// Multi-head latent attention with expanded keys and values.
///
/// # Shapes
/// See [`MlaAttention`]; `out`: `[T, N, value_dim]`, `lse`: `[T, N]`. Queries in no segment give zeros.
///
/// # Panics
/// When a slice has the wrong length or a segment lies outside.
pub fn mla_attention<T: Element>(input: &MlaAttention<'_, T>, out: &mut [T], lse: &mut [f32]) {
    let d = input.dims;
    assert_eq!(input.q.len(), lse.len() * d.head_dim(), "q is [T, N, nope + rope]");
    let keys = input.keys(input.slots());
    attention(&input.expanded(&keys), out, lse);
}

/// Gradients of [`mla_attention`], overwritten.
///
/// # Shapes
/// See [`MlaAttention`], [`AttentionSaved`], [`MlaGrads`]; `dout`: `[T, N, value_dim]`.
///
/// # Panics
/// As [`mla_attention`].
pub fn mla_attention_backward<T: Element>(
    input: &MlaAttention<'_, T>,
    saved: AttentionSaved<'_, T>,
    dout: &[T],
    grads: MlaGrads<'_, T>,
) {
    let d = input.dims;
    let tokens = input.slots();
    assert_eq!(input.q.len(), tokens * d.heads * d.head_dim(), "q is [T, N, nope + rope]");
    assert_eq!(grads.kv.len(), input.kv.len(), "dkv is [T, N, nope + v]");
    assert_eq!(grads.k_pe.len(), input.k_pe.len(), "dk_pe is [T, rope]");
    let keys = input.keys(tokens);
    let mut dk = scratch::take::<T>(tokens * d.heads * d.head_dim());
    let mut dv = scratch::take::<T>(tokens * d.heads * d.value_dim);
    let parts = AttentionGrads { q: grads.q, k: &mut dk, v: &mut dv };
    attention_backward(&input.expanded(&keys), saved, dout, parts);

    let (dkv, dk_pe) = (Shared::new(grads.kv), Shared::new(grads.k_pe));
    let row = d.heads * d.kv_dim();
    parallel::for_each_chunk(tokens, ROWS, |chunk| {
        let mut sums = scratch::take::<f32>(d.rope);
        for token in chunk {
            // SAFETY: each task owns its tokens.
            let (dkv, dk_pe) = unsafe {
                (dkv.slice(token * row..(token + 1) * row), dk_pe.slice(token * d.rope..(token + 1) * d.rope))
            };
            sums.fill(0.0);
            for head in 0..d.heads {
                let dk = &dk[(token * d.heads + head) * d.head_dim()..][..d.head_dim()];
                let dv = &dv[(token * d.heads + head) * d.value_dim..][..d.value_dim];
                let (key, value) = dkv[head * d.kv_dim()..(head + 1) * d.kv_dim()].split_at_mut(d.nope);
                key.copy_from_slice(&dk[..d.nope]);
                value.copy_from_slice(dv);
                for (sum, dk) in sums.iter_mut().zip(&dk[d.nope..]) {
                    *sum += dk.to_f32();
                }
            }
            for (dk_pe, sum) in dk_pe.iter_mut().zip(&*sums) {
                *dk_pe = T::from_f32(*sum);
            }
        }
    });
}
