//! Plain root mean square normalisation.
use crate::{Element, RmsNormSaved};

/// See [`crate::rms_norm`].
pub fn rms_norm<X: Element, W: Element>(x: &[X], weight: &[W], eps: f32, y: &mut [X], rstd: &mut [f32]) {
    let width = weight.len();
    for (t, rstd) in rstd.iter_mut().enumerate() {
        let x = &x[t * width..(t + 1) * width];
        let squares: f64 = x.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
        *rstd = (1.0 / (squares / width as f64 + f64::from(eps)).sqrt()) as f32;
        for i in 0..width {
            let normed = X::from_f32(x[i].to_f32() * *rstd);
            y[t * width + i] = X::from_f32(weight[i].to_f32() * normed.to_f32());
        }
    }
}

/// See [`crate::rms_norm_backward`].
pub fn rms_norm_backward<X: Element, W: Element>(
    saved: RmsNormSaved<'_, X, W>,
    dy: &[X],
    dx: &mut [X],
    dweight: &mut [W],
) {
    let width = saved.weight.len();
    let mut sums = vec![0.0f64; width];
    for (t, rstd) in saved.rstd.iter().enumerate() {
        let r = f64::from(*rstd);
        let row = |values: &[X], i: usize| f64::from(values[t * width + i].to_f32());
        let weighted = |i: usize| row(dy, i) * f64::from(saved.weight[i].to_f32());
        let along: f64 = (0..width).map(|i| weighted(i) * row(saved.x, i)).sum();
        for (i, sum) in sums.iter_mut().enumerate() {
            let x = row(saved.x, i);
            *sum += row(dy, i) * x * r;
            let value = r * weighted(i) - r.powi(3) * x * along / width as f64;
            dx[t * width + i] = X::from_f32(value as f32);
        }
    }
    for (dweight, sum) in dweight.iter_mut().zip(sums) {
        *dweight = W::from_f32(sum as f32);
    }
}
