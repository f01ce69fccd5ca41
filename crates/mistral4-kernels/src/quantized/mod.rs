//! Weights that stay quantised in memory and are dequantised in registers.
//!
//! Integer codes of 8 or 4 bits have a scale, and a zero point, for each row and group of neighbouring columns; FP8
//! (e4m3) codes have a scale for each row and block of columns. Products with integer codes run on integers
//! (AVX-512 VNNI, AVX2): activations are rounded to 15 bits, so that their rounding is far below that of bf16. Where
//! those instructions are missing, and for gradients, weights become floats panel by panel.
mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod experts;
mod linear;
mod matrix;
mod parts;
mod product;
mod quantize;

pub(crate) use activations::Activations;
pub use experts::{QuantizedExperts, quantized_experts, quantized_experts_backward};
pub use linear::{
    quantized_grouped_linear, quantized_grouped_linear_backward_input, quantized_linear,
    quantized_linear_backward_input,
};
pub use matrix::{Bits, QuantizedMatrix, Scales, Scheme, StackDims};
pub(crate) use product::product;
pub use quantize::QuantizeError;

/// Rows of a panel: as many as an AVX-512 register has 32-bit lanes.
pub(crate) const LANES: usize = 16;
