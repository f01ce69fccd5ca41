//! Normalisation and rotary embedding against their plain twins.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Element, RmsNormSaved, RopeDims, bf16, reference, rms_norm, rms_norm_backward, rope, rope_backward,
};

fn norms<X: Element + PartialEq, W: Element>() {
    for (tokens, width) in [(0, 8), (1, 2), (3, 33), (70, 64), (600, 5)] {
        let mut random = Random::new(width as u64);
        let x = random.values::<X>(tokens * width, 3.0);
        let dy = random.values::<X>(tokens * width, 1.0);
        let weight = random.values::<W>(width, 1.0);
        let (mut y, mut want_y) = (poison::<X>(x.len()), poison::<X>(x.len()));
        let (mut rstd, mut want_rstd) = (poison::<f32>(tokens), poison::<f32>(tokens));
        rms_norm(&x, &weight, 1e-5, &mut y, &mut rstd);
        reference::rms_norm(&x, &weight, 1e-5, &mut want_y, &mut want_rstd);
        assert_close("y", &y, &want_y, tolerance::<X>());
        assert_close("rstd", &rstd, &want_rstd, 1e-6);

        let saved = RmsNormSaved { x: &x, weight: &weight, rstd: &rstd };
        let (mut dx, mut want_dx) = (poison::<X>(x.len()), poison::<X>(x.len()));
        let (mut dw, mut want_dw) = (poison::<W>(width), poison::<W>(width));
        rms_norm_backward(saved, &dy, &mut dx, Some(&mut dw));
        reference::rms_norm_backward(saved, &dy, &mut want_dx, &mut want_dw);
        assert_close("dx", &dx, &want_dx, tolerance::<X>());
        assert_close("dweight", &dw, &want_dw, tolerance::<W>());
        let mut alone = poison::<X>(x.len());
        rms_norm_backward(saved, &dy, &mut alone, None::<&mut [W]>);
        assert_eq!(alone, dx);
    }
}

#[test]
fn rms_norms() {
    on_each_isa(|_| {
        norms::<f32, f32>();
        norms::<bf16, bf16>();
        norms::<bf16, f32>();
    });
}

/// `x * rstd` is rounded to bf16 before the weight is applied, as in transformers.
#[test]
fn norm_rounds_before_the_weight() {
    let x: Vec<bf16> = [1.0, 3.0, 7.0, 0.5].map(bf16::from_f32).to_vec();
    let weight = vec![1.01f32; 4];
    let (mut y, mut rstd) = (poison::<bf16>(4), poison::<f32>(1));
    rms_norm(&x, &weight, 1e-6, &mut y, &mut rstd);
    for (x, y) in x.iter().zip(&y) {
        let normed = bf16::from_f32(x.to_f32() * rstd[0]).to_f32();
        assert_eq!(*y, bf16::from_f32(normed * 1.01));
    }
}

fn rotations<X: Element>() {
    let sizes = [(1, 1, 2, 0, 2), (3, 2, 10, 4, 6), (9, 4, 16, 0, 16), (5, 3, 12, 2, 8)];
    for (tokens, heads, head_dim, offset, rope_dim) in sizes {
        for interleaved in [false, true] {
            let dims = RopeDims { tokens, heads, head_dim, offset, rope_dim, interleaved };
            let mut random = Random::new(head_dim as u64);
            let x = random.values::<X>(tokens * heads * head_dim, 1.0);
            let angles = random.values::<f32>(tokens * rope_dim / 2, 3.0);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let scales = random.values::<f32>(tokens, 2.0);
            for scale in [None, Some(&scales[..])] {
                let (mut y, mut want) = (poison::<X>(x.len()), poison::<X>(x.len()));
                rope(dims, &x, &cos, &sin, scale, &mut y);
                reference::rope(dims, &x, &cos, &sin, scale, &mut want);
                assert_close("y", &y, &want, tolerance::<X>());
                // The gradient is the transpose: <rope(x), g> = <x, rope_backward(g)>.
                let g = random.values::<X>(x.len(), 1.0);
                let mut dx = poison::<X>(x.len());
                rope_backward(dims, &g, &cos, &sin, scale, &mut dx);
                let dot =
                    |a: &[X], b: &[X]| -> f32 { a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum() };
                let (left, right) = (dot(&y, &g), dot(&x, &dx));
                let size = x.len() as f32;
                assert!((left - right).abs() <= tolerance::<X>() * size.sqrt(), "{left} {right}");
            }
        }
    }
}

#[test]
fn rotary_embeddings() {
    rotations::<f32>();
    rotations::<bf16>();
}

/// Two pairs turned by 90 degrees: neighbours pair up, and come out as `[first halves | second halves]`.
#[test]
fn interleaved_layout() {
    let dims = RopeDims { tokens: 1, heads: 1, head_dim: 5, offset: 1, rope_dim: 4, interleaved: true };
    let mut y = poison::<f32>(5);
    rope(dims, &[9.0f32, 1.0, 2.0, 3.0, 4.0], &[0.0, 0.0], &[1.0, 1.0], None, &mut y);
    assert_eq!(y, [9.0, -2.0, -4.0, 1.0, 3.0]);
}
