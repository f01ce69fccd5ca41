//! Plain rotary embedding.
use crate::{Element, RopeDims};

/// See [`crate::rope`].
pub fn rope<X: Element>(
    dims: RopeDims,
    x: &[X],
    cos: &[f32],
    sin: &[f32],
    scale: Option<&[f32]>,
    y: &mut [X],
) {
    let half = dims.rope_dim / 2;
    for t in 0..dims.tokens {
        let scale = scale.map_or(1.0, |scale| scale[t]);
        for n in 0..dims.heads {
            let start = (t * dims.heads + n) * dims.head_dim;
            let entry = |i: usize| x[start + i].to_f32();
            for i in 0..dims.head_dim {
                let rotated = i.checked_sub(dims.offset).filter(|i| *i < dims.rope_dim);
                let value = match rotated {
                    None => entry(i),
                    Some(r) => {
                        let pair = r % half;
                        let (first, second) =
                            if dims.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
                        let (a, b) = (entry(dims.offset + first), entry(dims.offset + second));
                        let (c, s) = (cos[t * half + pair], sin[t * half + pair]);
                        if r < half { a * c - b * s } else { b * c + a * s }
                    }
                };
                y[start + i] = X::from_f32(value * scale);
            }
        }
    }
}
