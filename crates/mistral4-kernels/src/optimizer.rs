//! Optimiser steps in one pass over parameters, gradients and states.
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::{LANES, mul_add, per_isa, sum_by};
use half::bf16;

/// Elements of one task.
const CHUNK: usize = 1 << 15;

/// Hyperparameters of AdamW, with the meaning of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Factor on gradients before anything else, such as a clipping coefficient; 1 leaves them.
    pub grad_scale: f64,
}

/// Slices of one parameter.
#[derive(Debug)]
pub struct AdamWState<'a, P, G, S> {
    /// Parameter.
    pub param: &'a mut [P],
    /// Gradient.
    pub grad: &'a [G],
    /// First moment.
    pub exp_avg: &'a mut [S],
    /// Second moment.
    pub exp_avg_sq: &'a mut [S],
}

/// The constants of one step.
#[derive(Clone, Copy)]
struct Coefficients {
    grad_scale: f32,
    keep: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    correction: f32,
    eps: f32,
}

impl AdamW {
    fn coefficients(&self, step: u64) -> Coefficients {
        assert!(step >= 1, "steps count from 1");
        let power = |beta: f64| beta.powf(step as f64);
        Coefficients {
            grad_scale: self.grad_scale as f32,
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            step_size: (self.lr / (1.0 - power(self.beta1))) as f32,
            correction: (1.0 / (1.0 - power(self.beta2)).sqrt()) as f32,
            eps: self.eps as f32,
        }
    }
}

/// AdamW step `step` (counted from 1) on a parameter, computed in `f32`.
///
/// # Panics
/// When lengths differ or `step` is 0.
pub fn adamw_step<P: Element, G: Element, S: Element>(
    hyper: &AdamW,
    step: u64,
    state: AdamWState<'_, P, G, S>,
) {
    let AdamWState { param, grad, exp_avg, exp_avg_sq } = state;
    assert!(grad.len() == param.len() && exp_avg.len() == param.len() && exp_avg_sq.len() == param.len());
    let (c, isa, len) = (hyper.coefficients(step), Isa::active(), param.len());
    let (param, m, v) = (Shared::new(param), Shared::new(exp_avg), Shared::new(exp_avg_sq));
    parallel::for_each_chunk(len, CHUNK, |chunk| {
        // SAFETY: each task owns its chunk.
        let (param, exp_avg, exp_avg_sq) =
            unsafe { (param.slice(chunk.clone()), m.slice(chunk.clone()), v.slice(chunk.clone())) };
        step_chunk(isa, c, AdamWState { param, grad: &grad[chunk], exp_avg, exp_avg_sq });
    });
}

/// AdamW step on the `f32` master copy of a bf16 parameter, which is then rounded from it.
///
/// # Panics
/// When lengths differ or `step` is 0.
pub fn adamw_step_master<G: Element, S: Element>(
    hyper: &AdamW,
    step: u64,
    param: &mut [bf16],
    master: AdamWState<'_, f32, G, S>,
) {
    let AdamWState { param: master, grad, exp_avg, exp_avg_sq } = master;
    assert!(grad.len() == param.len() && exp_avg.len() == param.len() && exp_avg_sq.len() == param.len());
    assert_eq!(master.len(), param.len());
    let (c, isa, len) = (hyper.coefficients(step), Isa::active(), param.len());
    let (param, master) = (Shared::new(param), Shared::new(master));
    let (m, v) = (Shared::new(exp_avg), Shared::new(exp_avg_sq));
    parallel::for_each_chunk(len, CHUNK, |chunk| {
        // SAFETY: each task owns its chunk.
        let (rounded, param, exp_avg, exp_avg_sq) = unsafe {
            (
                param.slice(chunk.clone()),
                master.slice(chunk.clone()),
                m.slice(chunk.clone()),
                v.slice(chunk.clone()),
            )
        };
        step_chunk(isa, c, AdamWState { param: &mut *param, grad: &grad[chunk], exp_avg, exp_avg_sq });
        round_chunk(isa, param, rounded);
    });
}

per_isa! {
    fn step_chunk<P: Element, G: Element, S: Element>(c: Coefficients, state: AdamWState<'_, P, G, S>)
        = step_chunk_body;
}

#[inline(always)]
fn step_chunk_body<P: Element, G: Element, S: Element, const FMA: bool>(
    c: Coefficients,
    state: AdamWState<'_, P, G, S>,
) {
    let AdamWState { param, grad, exp_avg, exp_avg_sq } = state;
    for (((p, g), m), v) in param.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq) {
        let g = g.to_f32() * c.grad_scale;
        let first = m.to_f32();
        let first = mul_add::<FMA>(g - first, c.one_minus_beta1, first);
        let second = mul_add::<FMA>(g * g, c.one_minus_beta2, v.to_f32() * c.beta2);
        let step = c.step_size * first / mul_add::<FMA>(second.sqrt(), c.correction, c.eps);
        *p = P::from_f32(mul_add::<FMA>(p.to_f32(), c.keep, -step));
        *m = S::from_f32(first);
        *v = S::from_f32(second);
    }
}

per_isa! {
    fn round_chunk(from: &[f32], to: &mut [bf16]) = round_chunk_body;
}

#[inline(always)]
fn round_chunk_body<const FMA: bool>(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = <bf16 as Element>::from_f32(*from);
    }
}

/// Sum of squares, in `f64` over blocks of `f32` sums.
pub fn sum_of_squares<T: Element>(values: &[T]) -> f64 {
    const BLOCK: usize = LANES * 32;
    let isa = Isa::active();
    let mut sums = vec![0.0f64; values.len().div_ceil(CHUNK)];
    let shared = Shared::new(&mut sums);
    parallel::for_each_chunk(values.len(), CHUNK, |chunk| {
        let i = chunk.start / CHUNK;
        // SAFETY: each task owns one sum.
        let sum = unsafe { &mut shared.slice(i..i + 1)[0] };
        *sum = values[chunk].chunks(BLOCK).map(|block| f64::from(squares(isa, block))).sum();
    });
    sums.iter().sum()
}

per_isa! {
    fn squares<T: Element>(values: &[T]) -> f32 = squares_body;
}

#[inline(always)]
fn squares_body<T: Element, const FMA: bool>(values: &[T]) -> f32 {
    sum_by(values, |x, sum| mul_add::<FMA>(x.to_f32(), x.to_f32(), sum))
}

/// Multiplies every value by `factor`.
pub fn scale<T: Element>(values: &mut [T], factor: f32) {
    let (isa, len) = (Isa::active(), values.len());
    let values = Shared::new(values);
    parallel::for_each_chunk(len, CHUNK, |chunk| {
        // SAFETY: each task owns its chunk.
        scale_chunk(isa, unsafe { values.slice(chunk) }, factor);
    });
}

per_isa! {
    fn scale_chunk<T: Element>(values: &mut [T], factor: f32) = scale_chunk_body;
}

#[inline(always)]
fn scale_chunk_body<T: Element, const FMA: bool>(values: &mut [T], factor: f32) {
    for x in values {
        *x = T::from_f32(x.to_f32() * factor);
    }
}
