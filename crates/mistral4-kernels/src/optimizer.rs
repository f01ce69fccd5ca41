//! Optimiser steps in one pass over parameters, gradients and states.

mod adamw;
mod dynamic8;
#[cfg(target_arch = "x86_64")]
mod dynamic8_avx512;
mod sink;

use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::{LANES, mul_add, per_isa, sum_by};

pub use adamw::{AdamW, AdamW8bitState, AdamWState, adamw_step, adamw_step_8bit, adamw_step_master};
pub use dynamic8::{BLOCK_8BIT, DynamicMap, Quantized8bit};
pub use sink::AdamWWeight;
pub(crate) use sink::StepSink;

/// Elements of one task.
const CHUNK: usize = 1 << 15;

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
