//! Rotary position embedding on part of each head.
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::per_isa;

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
    let isa = Isa::active();
    run(dims, [x.len(), y.len()], [cos, sin], scale, Shared::new(y), |y, token| {
        let start = token.index * y.len();
        rotate(isa, dims, token, &x[start..start + y.len()], y);
    });
}

/// [`rope`] of one token on this thread, without checks of sizes.
pub(crate) fn rotate_token<X: Element>(
    isa: Isa,
    dims: RopeDims,
    [cos, sin]: [&[f32]; 2],
    scale: f32,
    x: &[X],
    y: &mut [X],
) {
    rotate(isa, dims, Token { index: 0, cos, sin, scale }, x, y);
}

per_isa! {
    /// Rotates the heads of one token.
    fn rotate<X: Element>(dims: RopeDims, token: Token<'_>, x: &[X], y: &mut [X]) = rotate_body;
}

#[inline(always)]
fn rotate_body<X: Element, const FMA: bool>(dims: RopeDims, token: Token<'_>, x: &[X], y: &mut [X]) {
    let half = dims.rope_dim / 2;
    for (x, y) in x.chunks_exact(dims.head_dim).zip(y.chunks_exact_mut(dims.head_dim)) {
        let (x_rotated, y_rotated) = copy_unrotated(dims, token.scale, x, y);
        let (y_first, y_second) = y_rotated.split_at_mut(half);
        let out = y_first.iter_mut().zip(y_second).zip(token.cos).zip(token.sin);
        let turn = |a: f32, b: f32, cos: f32, sin: f32| {
            (X::from_f32((a * cos - b * sin) * token.scale), X::from_f32((b * cos + a * sin) * token.scale))
        };
        if dims.interleaved {
            for ((((first, second), cos), sin), [a, b]) in out.zip(x_rotated.as_chunks::<2>().0) {
                (*first, *second) = turn(a.to_f32(), b.to_f32(), *cos, *sin);
            }
        } else {
            let (x_first, x_second) = x_rotated.split_at(half);
            for (((((first, second), cos), sin), a), b) in out.zip(x_first).zip(x_second) {
                (*first, *second) = turn(a.to_f32(), b.to_f32(), *cos, *sin);
            }
        }
    }
}

/// Scales the entries of a head that are not rotated, and returns the others.
#[inline(always)]
fn copy_unrotated<'a, X: Element>(
    dims: RopeDims,
    scale: f32,
    x: &'a [X],
    y: &'a mut [X],
) -> (&'a [X], &'a mut [X]) {
    let (x_before, x) = x.split_at(dims.offset);
    let (y_before, y) = y.split_at_mut(dims.offset);
    let (x, x_after) = x.split_at(dims.rope_dim);
    let (y, y_after) = y.split_at_mut(dims.rope_dim);
    for (y, x) in [(y_before, x_before), (y_after, x_after)] {
        for (y, x) in y.iter_mut().zip(x) {
            *y = X::from_f32(x.to_f32() * scale);
        }
    }
    (x, y)
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
    let isa = Isa::active();
    run(dims, [dy.len(), dx.len()], [cos, sin], scale, Shared::new(dx), |dx, token| {
        let start = token.index * dx.len();
        rotate_back(isa, dims, token, &dy[start..start + dx.len()], dx);
    });
}

per_isa! {
    /// Rotates the heads of one token back.
    fn rotate_back<X: Element>(dims: RopeDims, token: Token<'_>, dy: &[X], dx: &mut [X]) = rotate_back_body;
}

#[inline(always)]
fn rotate_back_body<X: Element, const FMA: bool>(dims: RopeDims, token: Token<'_>, dy: &[X], dx: &mut [X]) {
    let half = dims.rope_dim / 2;
    for (dy, dx) in dy.chunks_exact(dims.head_dim).zip(dx.chunks_exact_mut(dims.head_dim)) {
        let (dy_rotated, dx_rotated) = copy_unrotated(dims, token.scale, dy, dx);
        let (first, second) = dy_rotated.split_at(half);
        let input = first.iter().zip(second).zip(token.cos).zip(token.sin);
        let turn = |p: f32, q: f32, cos: f32, sin: f32| {
            (X::from_f32((p * cos + q * sin) * token.scale), X::from_f32((q * cos - p * sin) * token.scale))
        };
        if dims.interleaved {
            for ([a, b], (((p, q), cos), sin)) in dx_rotated.as_chunks_mut::<2>().0.iter_mut().zip(input) {
                (*a, *b) = turn(p.to_f32(), q.to_f32(), *cos, *sin);
            }
        } else {
            let (dx_first, dx_second) = dx_rotated.split_at_mut(half);
            for ((a, b), (((p, q), cos), sin)) in dx_first.iter_mut().zip(dx_second).zip(input) {
                (*a, *b) = turn(p.to_f32(), q.to_f32(), *cos, *sin);
            }
        }
    }
}

#[derive(Clone, Copy)]
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
