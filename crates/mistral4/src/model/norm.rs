//! Root-mean-square norm.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::error::Result;
use crate::ops;
use crate::weights::Parameters;

/// Epsilon of `q_a_layernorm` and `kv_a_layernorm`, whatever `rms_norm_eps` says.
///
/// Source: `Mistral4Attention.__init__` in transformers.
pub const LATENT_NORM_EPS: f64 = 1e-6;

/// `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[D]`
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Takes `weight` of `[width]` from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(width: usize, eps: f64, parameters: &Parameters) -> Result<Self> {
        Ok(Self { weight: parameters.get("weight", [width])?, eps })
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}
