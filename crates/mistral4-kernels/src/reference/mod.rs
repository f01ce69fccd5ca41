//! Plain scalar twins of the kernels: slow, simple, and what the kernels are tested against.
mod attention;
mod decode;
mod experts;
mod gemm;
mod loss;
mod norm;
mod optimizer;
mod quantized;
mod rope;
mod router;

pub use attention::{attention, attention_backward, latent_attention};
pub use decode::{decode_head, decode_layer};
pub use experts::{gated, gated_backward, moe_experts, moe_experts_backward};
pub use gemm::gemm;
pub use loss::linear_cross_entropy;
pub use norm::{rms_norm, rms_norm_backward};
pub use optimizer::{adamw_step, dequantize, dynamic_map, quantize};
pub use quantized::{
    dequantized, quantized_experts, quantized_experts_backward, quantized_grouped_linear,
    quantized_grouped_linear_backward_input, quantized_linear, quantized_linear_backward_input,
};
pub use rope::rope;
pub use router::{choose_experts, routing_weights, routing_weights_backward};

/// The error function by its Taylor series (small arguments) and continued fraction (large ones).
pub fn erf(x: f64) -> f64 {
    let z = x.abs();
    let value = if z < 3.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = z;
        for n in (1..60).rev() {
            fraction = z + f64::from(n) / 2.0 / fraction;
        }
        1.0 - (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}
