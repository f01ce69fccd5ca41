//! Root mean square normalisation.
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use crate::vector::{LANES, mul_add, per_isa, reduce, sum_by};

/// Rows of one task.
const ROWS: usize = 16;

/// Root mean square normalisation: `y = weight * (x * rstd)` with `rstd = 1 / sqrt(mean(x^2) + eps)`.
///
/// As in transformers, `x * rstd` is rounded to the type of `x` before the weight is applied.
///
/// # Shapes
/// `x`, `y`: `[T, D]` with D the length of `weight`; `rstd`: `[T]`.
pub fn rms_norm<X: Element, W: Element>(x: &[X], weight: &[W], eps: f32, y: &mut [X], rstd: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), rstd.len() * width, "x is [T, D]");
    assert_eq!(y.len(), x.len(), "y is [T, D]");
    let isa = Isa::active();
    let (rows, y, all_rstd) = (rstd.len(), Shared::new(y), Shared::new(rstd));
    parallel::for_each_chunk(rows, ROWS, |chunk| {
        // SAFETY: each task owns its rows.
        let (y, rstd) =
            unsafe { (y.slice(chunk.start * width..chunk.end * width), all_rstd.slice(chunk.clone())) };
        let x = &x[chunk.start * width..chunk.end * width];
        forward_rows(isa, x, weight, eps, y, rstd);
    });
}

per_isa! {
    pub(crate) fn forward_rows<X: Element, W: Element>(x: &[X], weight: &[W], eps: f32, y: &mut [X], rstd: &mut [f32])
        = forward_rows_body;
}

#[inline(always)]
fn forward_rows_body<X: Element, W: Element, const FMA: bool>(
    x: &[X],
    weight: &[W],
    eps: f32,
    y: &mut [X],
    rstd: &mut [f32],
) {
    let width = weight.len();
    for (i, rstd) in rstd.iter_mut().enumerate() {
        let x = &x[i * width..(i + 1) * width];
        let y = &mut y[i * width..(i + 1) * width];
        let squares = sum_by(x, |x, sum| mul_add::<FMA>(x.to_f32(), x.to_f32(), sum));
        *rstd = 1.0 / (squares / width as f32 + eps).sqrt();
        let rstd = *rstd;
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            let normed = X::from_f32(x.to_f32() * rstd).to_f32();
            *y = X::from_f32(normed * weight.to_f32());
        }
    }
}

/// Inputs of [`rms_norm_backward`].
#[derive(Clone, Copy, Debug)]
pub struct RmsNormSaved<'a, X, W> {
    /// Input of the forward pass, `[T, D]`.
    pub x: &'a [X],
    /// Weight, `[D]`.
    pub weight: &'a [W],
    /// Reciprocal standard deviations that the forward pass wrote, `[T]`.
    pub rstd: &'a [f32],
}

/// Gradients of [`rms_norm`]; the weight gradient is computed only where asked for.
///
/// # Shapes
/// `dy`, `dx`: `[T, D]`; `dweight`: `[D]`.
pub fn rms_norm_backward<X: Element, W: Element>(
    saved: RmsNormSaved<'_, X, W>,
    dy: &[X],
    dx: &mut [X],
    dweight: Option<&mut [W]>,
) {
    let RmsNormSaved { x, weight, rstd } = saved;
    let width = weight.len();
    let rows = rstd.len();
    assert_eq!(x.len(), rows * width, "x is [T, D]");
    assert!(dy.len() == x.len() && dx.len() == x.len(), "dy and dx are [T, D]");
    let isa = Isa::active();
    let dx = Shared::new(dx);
    parallel::for_each_chunk(rows, ROWS, |chunk| {
        // SAFETY: each task owns its rows.
        let dx = unsafe { dx.slice(chunk.start * width..chunk.end * width) };
        let part = chunk.start * width..chunk.end * width;
        let saved = RmsNormSaved { x: &x[part.clone()], weight, rstd: &rstd[chunk] };
        input_rows(isa, saved, &dy[part], dx);
    });
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), width, "dweight is [D]");
        // Blocks of rows are summed in parallel, then the blocks in order.
        const BLOCK: usize = 256;
        let blocks = rows.div_ceil(BLOCK);
        let mut partial = scratch::zeros(blocks * width);
        let shared = Shared::new(&mut partial);
        parallel::for_each_chunk(rows, BLOCK, |chunk| {
            let block = chunk.start / BLOCK;
            // SAFETY: each task owns its block.
            let sums = unsafe { shared.slice(block * width..(block + 1) * width) };
            let part = chunk.start * width..chunk.end * width;
            let saved = RmsNormSaved { x: &x[part.clone()], weight, rstd: &rstd[chunk] };
            weight_rows(isa, saved, &dy[part], sums);
        });
        for (i, dweight) in dweight.iter_mut().enumerate() {
            *dweight = W::from_f32((0..blocks).map(|block| partial[block * width + i]).sum());
        }
    }
}

per_isa! {
    fn input_rows<X: Element, W: Element>(saved: RmsNormSaved<'_, X, W>, dy: &[X], dx: &mut [X])
        = input_rows_body;
}

#[inline(always)]
fn input_rows_body<X: Element, W: Element, const FMA: bool>(
    saved: RmsNormSaved<'_, X, W>,
    dy: &[X],
    dx: &mut [X],
) {
    let weight = saved.weight;
    let width = weight.len();
    for (i, rstd) in saved.rstd.iter().enumerate() {
        let row = i * width..(i + 1) * width;
        let (x, dy, dx) = (&saved.x[row.clone()], &dy[row.clone()], &mut dx[row]);
        let mut products = [0.0f32; LANES];
        let mut add = |x: &[X], dy: &[X], weight: &[W]| {
            for (((sum, x), dy), weight) in products.iter_mut().zip(x).zip(dy).zip(weight) {
                *sum = mul_add::<FMA>(dy.to_f32() * weight.to_f32(), x.to_f32(), *sum);
            }
        };
        let (x_chunks, x_tail) = x.as_chunks::<LANES>();
        let (dy_chunks, dy_tail) = dy.as_chunks::<LANES>();
        let (weight_chunks, weight_tail) = weight.as_chunks::<LANES>();
        for ((x, dy), weight) in x_chunks.iter().zip(dy_chunks).zip(weight_chunks) {
            add(x, dy, weight);
        }
        add(x_tail, dy_tail, weight_tail);
        let along = reduce(products) * rstd * rstd / width as f32;
        for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
            *dx = X::from_f32(rstd * (dy.to_f32() * weight.to_f32() - along * x.to_f32()));
        }
    }
}

per_isa! {
    /// Adds `dy * x * rstd` of some rows to `sums`.
    fn weight_rows<X: Element, W: Element>(saved: RmsNormSaved<'_, X, W>, dy: &[X], sums: &mut [f32])
        = weight_rows_body;
}

#[inline(always)]
fn weight_rows_body<X: Element, W: Element, const FMA: bool>(
    saved: RmsNormSaved<'_, X, W>,
    dy: &[X],
    sums: &mut [f32],
) {
    let width = saved.weight.len();
    for (i, rstd) in saved.rstd.iter().enumerate() {
        let row = i * width..(i + 1) * width;
        for ((sum, x), dy) in sums.iter_mut().zip(&saved.x[row.clone()]).zip(&dy[row]) {
            *sum = mul_add::<FMA>(dy.to_f32(), x.to_f32() * rstd, *sum);
        }
    }
}
