//! Activation functions of the feed-forwards and the projector.

use burn::tensor::{Tensor, activation as burn_activation};
use mistral4_checkpoint::config::Activation;

/// Applies `activation` to every entry.
pub fn apply<const D: usize>(activation: Activation, x: Tensor<D>) -> Tensor<D> {
    match activation {
        Activation::Silu => burn_activation::silu(x),
        Activation::Gelu => burn_activation::gelu(x),
        Activation::GeluTanh => burn_activation::gelu_approximate(x),
        Activation::Relu => burn_activation::relu(x),
    }
}

/// The same function by the kernels' name.
pub(crate) fn kernel_activation(activation: Activation) -> mistral4_kernels::Activation {
    match activation {
        Activation::Silu => mistral4_kernels::Activation::Silu,
        Activation::Gelu => mistral4_kernels::Activation::Gelu,
        Activation::GeluTanh => mistral4_kernels::Activation::GeluTanh,
        Activation::Relu => mistral4_kernels::Activation::Relu,
    }
}
