//! Adam and AdamW with `f32`, bf16 and 8-bit moments.

use half::bf16;

use super::CHUNK;
use super::dynamic8::{BLOCK_8BIT, DynamicMap, Quantized8bit, dequantize_block, quantize_block};
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::{convert, mul_add, per_isa};

/// Elements that are stepped and then rounded while they are in the first-level cache.
const CACHED: usize = 1024;

/// Hyperparameters of Adam, with the meaning of `torch.optim.AdamW`.
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
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether weight decay shrinks the weight itself (AdamW); otherwise it is added to the gradient (Adam).
    pub decoupled_weight_decay: bool,
    /// Factor on gradients before anything else, such as a clipping coefficient; 1 leaves them.
    pub grad_scale: f64,
}

/// Slices of one parameter, or of any part of it: elements do not depend on each other.
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

/// Slices of one parameter with 8-bit moments, or of a part of it that begins at a multiple of [`BLOCK_8BIT`].
#[derive(Debug)]
pub struct AdamW8bitState<'a, P, G> {
    /// Parameter, in full precision where it has a rounded copy.
    pub param: &'a mut [P],
    /// Where the parameter is rounded to, if it is kept in bf16 as well.
    pub rounded: Option<&'a mut [bf16]>,
    /// Gradient.
    pub grad: &'a [G],
    /// First moment, in the signed map.
    pub exp_avg: Quantized8bit<'a>,
    /// Second moment, in the unsigned map.
    pub exp_avg_sq: Quantized8bit<'a>,
}

/// The constants of one step.
#[derive(Clone, Copy)]
pub(super) struct Coefficients {
    grad_scale: f32,
    penalty: f32,
    keep: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    correction: f32,
    eps: f32,
    /// Where the random numbers of this step's rounding begin.
    seed: u32,
}

impl AdamW {
    pub(super) fn coefficients(&self, step: u64) -> Coefficients {
        assert!(step >= 1, "steps count from 1");
        let power = |beta: f64| beta.powf(step as f64);
        let decay = self.weight_decay;
        let (penalty, keep) =
            if self.decoupled_weight_decay { (0.0, 1.0 - self.lr * decay) } else { (decay, 1.0) };
        Coefficients {
            grad_scale: self.grad_scale as f32,
            penalty: penalty as f32,
            keep: keep as f32,
            beta2: self.beta2 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            step_size: (self.lr / (1.0 - power(self.beta1))) as f32,
            correction: (1.0 / (1.0 - power(self.beta2)).sqrt()) as f32,
            eps: self.eps as f32,
            seed: hash(step as u32),
        }
    }
}

impl Coefficients {
    /// New moments and the new parameter from the old ones.
    #[inline(always)]
    fn apply<const FMA: bool>(&self, param: f32, grad: f32, first: f32, second: f32) -> (f32, f32, f32) {
        let grad = mul_add::<FMA>(param, self.penalty, grad * self.grad_scale);
        let first = mul_add::<FMA>(grad - first, self.one_minus_beta1, first);
        let second = mul_add::<FMA>(grad * grad, self.one_minus_beta2, second * self.beta2);
        let step = self.step_size * first / mul_add::<FMA>(second.sqrt(), self.correction, self.eps);
        (mul_add::<FMA>(param, self.keep, -step), first, second)
    }
}

/// A 32-bit mix in which every bit of the input changes about half the bits of the output.
///
/// Source: Ellis, `lowbias32`.
#[inline(always)]
fn hash(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Adam step `step` (counted from 1) on a parameter, computed in `f32`.
///
/// bf16 moments and parameters are rounded up or down at random, as often as keeps their mean right: rounded to nearest,
/// a second moment would never follow changes of less than 1/512, nor a parameter small steps. The random numbers are a function of the step and the
/// element's place in the slice.
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
        let start = chunk.start as u32;
        // SAFETY: each task owns its chunk.
        let (param, exp_avg, exp_avg_sq) =
            unsafe { (param.slice(chunk.clone()), m.slice(chunk.clone()), v.slice(chunk.clone())) };
        step_chunk(isa, c, start, AdamWState { param, grad: &grad[chunk], exp_avg, exp_avg_sq });
    });
}

/// Adam step on the `f32` master copy of a bf16 parameter, which is then rounded from it.
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
        for start in chunk.clone().step_by(CACHED) {
            let part = start..(start + CACHED).min(chunk.end);
            // SAFETY: each task owns its chunk.
            let (rounded, param, exp_avg, exp_avg_sq) = unsafe {
                (
                    param.slice(part.clone()),
                    master.slice(part.clone()),
                    m.slice(part.clone()),
                    v.slice(part.clone()),
                )
            };
            let state = AdamWState { param: &mut *param, grad: &grad[part], exp_avg, exp_avg_sq };
            step_chunk(isa, c, start as u32, state);
            convert(isa, param, rounded);
        }
    });
}

per_isa! {
    pub(super) fn step_chunk<P: Element, G: Element, S: Element>(c: Coefficients, start: u32, state: AdamWState<'_, P, G, S>)
        = step_chunk_body;
}

#[inline(always)]
fn step_chunk_body<P: Element, G: Element, S: Element, const FMA: bool>(
    c: Coefficients,
    start: u32,
    state: AdamWState<'_, P, G, S>,
) {
    let AdamWState { param, grad, exp_avg, exp_avg_sq } = state;
    for ((((p, g), m), v), i) in param.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq).zip(0u32..) {
        let (param, first, second) = c.apply::<FMA>(p.to_f32(), g.to_f32(), m.to_f32(), v.to_f32());
        // One number is enough: the moments take 16 of its bits each, and the sum of both halves without carries is
        // independent of either.
        let random =
            if S::IS_BF16 || P::IS_BF16 { hash(c.seed.wrapping_add(start.wrapping_add(i))) } else { 0 };
        let (low, high) = (random as u16, (random >> 16) as u16);
        *p = P::from_f32_random(param, low ^ high);
        *m = S::from_f32_random(first, low);
        *v = S::from_f32_random(second, high);
    }
}

/// Adam step with 8-bit moments: each block of [`BLOCK_8BIT`] elements is widened, stepped, and narrowed again by its
/// own largest magnitude.
///
/// Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"; `AdamW8bit` of bitsandbytes.
///
/// # Panics
/// When lengths differ or `step` is 0.
pub fn adamw_step_8bit<P: Element, G: Element>(hyper: &AdamW, step: u64, state: AdamW8bitState<'_, P, G>) {
    let AdamW8bitState { param, rounded, grad, exp_avg, exp_avg_sq } = state;
    let (c, isa, len) = (hyper.coefficients(step), Isa::active(), param.len());
    assert_eq!(grad.len(), len);
    exp_avg.check(len);
    exp_avg_sq.check(len);
    assert!(rounded.as_ref().is_none_or(|rounded| rounded.len() == len));
    let (param, rounded) = (Shared::new(param), rounded.map(Shared::new));
    let (m, v) = (exp_avg.shared(), exp_avg_sq.shared());
    parallel::for_each_chunk(len, CHUNK, |chunk| {
        for start in chunk.clone().step_by(BLOCK_8BIT) {
            let part = start..(start + BLOCK_8BIT).min(chunk.end);
            let block = start / BLOCK_8BIT;
            // SAFETY: each task owns its chunk, and chunks are whole blocks.
            let (param, first, second, rounded) = unsafe {
                (
                    param.slice(part.clone()),
                    (m.0.slice(part.clone()), &mut m.1.slice(block..block + 1)[0]),
                    (v.0.slice(part.clone()), &mut v.1.slice(block..block + 1)[0]),
                    rounded.map(|rounded| rounded.slice(part.clone())),
                )
            };
            step_block(isa, c, start as u32, (&mut *param, &grad[part]), [first, second]);
            if let Some(rounded) = rounded {
                convert(isa, param, rounded);
            }
        }
    });
}

const _: () = assert!(CHUNK.is_multiple_of(BLOCK_8BIT));

/// Steps a block of at most [`BLOCK_8BIT`] elements, the first of which is element `start`.
fn step_block<P: Element, G: Element>(
    isa: Isa,
    c: Coefficients,
    start: u32,
    (param, grad): (&mut [P], &[G]),
    [first, second]: [(&mut [u8], &mut f32); 2],
) {
    let (mut m, mut v) = ([0.0f32; BLOCK_8BIT], [0.0f32; BLOCK_8BIT]);
    dequantize_block(isa, DynamicMap::Signed, first.0, *first.1, &mut m);
    dequantize_block(isa, DynamicMap::Unsigned, second.0, *second.1, &mut v);
    let len = param.len();
    let state = AdamWState { param, grad, exp_avg: &mut m[..len], exp_avg_sq: &mut v[..len] };
    step_chunk(isa, c, start, state);
    *first.1 = quantize_block(isa, DynamicMap::Signed, &m, first.0);
    *second.1 = quantize_block(isa, DynamicMap::Unsigned, &v, second.0);
}
