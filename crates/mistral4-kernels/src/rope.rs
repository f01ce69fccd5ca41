//! Rotary position embedding on part of each head.
use crate::element::Element;
use crate::parallel::{self, Shared};

/// Which entries of a head are rotated, and how they pair up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeDims {
    /// T: tokens.
    pub tokens: usize,
    /// N: heads of each token.
    pub heads: usize,
    /// H: entries of a head.
    pub head_dim: usize,
    /// First rotated entry of a head.
    pub offset: usize,
    /// Rotated entries of a head (even).
    pub rope_dim: usize,
    /// Pairs are entries `(2i, 2i + 1)` and come out as `[first of each pair | second of each pair]`, as in
    /// transformers; otherwise pairs are `(i, i + rope_dim / 2)` and stay in place.
    pub interleaved: bool,
}

/// Rotary embedding: each pair becomes `(a cos - b sin, b cos + a sin)`, then the whole head is multiplied by
/// the scale of its token, if there is one.
///
/// # Shapes
/// `x`, `y`: `[T, N, H]`; `cos`, `sin`: `[T, rope_dim / 2]`; `scale`: `[T]`.
pub fn rope<X: Element>(
    dims: RopeDims,
    x: &[X],
    cos: &[f32],
    sin: &[f32],
    scale: Option<&[f32]>,
    y: &mut [X],
) {
    run(dims, [x.len(), y.len()], [cos, sin], scale, Shared::new(y), |y, token| {
        for head in 0..dims.heads {
            let start = (token.index * dims.heads + head) * dims.head_dim;
            let x = &x[start..start + dims.head_dim];
            let y = &mut y[head * dims.head_dim..(head + 1) * dims.head_dim];
            for (y, x) in y.iter_mut().zip(x) {
                *y = X::from_f32(x.to_f32() * token.scale);
            }
            let half = dims.rope_dim / 2;
            for (i, (cos, sin)) in token.cos.iter().zip(token.sin).enumerate() {
                let [a, b] = if dims.interleaved { [2 * i, 2 * i + 1] } else { [i, i + half] };
                let (a, b) = (x[dims.offset + a].to_f32(), x[dims.offset + b].to_f32());
                y[dims.offset + i] = X::from_f32((a * cos - b * sin) * token.scale);
                y[dims.offset + half + i] = X::from_f32((b * cos + a * sin) * token.scale);
            }
        }
    });
}

/// Gradient of [`rope`]: the inverse rotation, with the same scale.
///
/// # Shapes
/// As in [`rope`], with `dy` and `dx` in place of `x` and `y`.
pub fn rope_backward<X: Element>(
    dims: RopeDims,
    dy: &[X],
    cos: &[f32],
    sin: &[f32],
    scale: Option<&[f32]>,
    dx: &mut [X],
) {
    run(dims, [dy.len(), dx.len()], [cos, sin], scale, Shared::new(dx), |dx, token| {
        for head in 0..dims.heads {
            let start = (token.index * dims.heads + head) * dims.head_dim;
            let dy = &dy[start..start + dims.head_dim];
            let dx = &mut dx[head * dims.head_dim..(head + 1) * dims.head_dim];
            for (dx, dy) in dx.iter_mut().zip(dy) {
                *dx = X::from_f32(dy.to_f32() * token.scale);
            }
            let half = dims.rope_dim / 2;
            for (i, (cos, sin)) in token.cos.iter().zip(token.sin).enumerate() {
                let (p, q) = (dy[dims.offset + i].to_f32(), dy[dims.offset + half + i].to_f32());
                let [a, b] = if dims.interleaved { [2 * i, 2 * i + 1] } else { [i, i + half] };
                dx[dims.offset + a] = X::from_f32((p * cos + q * sin) * token.scale);
                dx[dims.offset + b] = X::from_f32((q * cos - p * sin) * token.scale);
            }
        }
    });
}

struct Token<'a> {
    index: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    scale: f32,
}

fn run<X: Element>(
    dims: RopeDims,
    lengths: [usize; 2],
    [cos, sin]: [&[f32]; 2],
    scale: Option<&[f32]>,
    out: Shared<'_, X>,
    rotate: impl Fn(&mut [X], Token<'_>) + Sync + Send,
) {
    let RopeDims { tokens, heads, head_dim, offset, rope_dim, .. } = dims;
    assert!(rope_dim.is_multiple_of(2) && offset + rope_dim <= head_dim, "rotated entries lie in the head");
    assert_eq!(lengths, [tokens * heads * head_dim; 2], "input and output are [T, N, H]");
    let half = rope_dim / 2;
    assert_eq!([cos.len(), sin.len()], [tokens * half; 2], "cos and sin are [T, rope_dim / 2]");
    assert!(scale.is_none_or(|scale| scale.len() == tokens), "scale is [T]");
    parallel::for_each_chunk(tokens, 8, |chunk| {
        for index in chunk {
            let width = heads * head_dim;
            // SAFETY: each task owns its tokens.
            let out = unsafe { out.slice(index * width..(index + 1) * width) };
            let (cos, sin) = (&cos[index * half..][..half], &sin[index * half..][..half]);
            rotate(out, Token { index, cos, sin, scale: scale.map_or(1.0, |scale| scale[index]) });
        }
    });
}
