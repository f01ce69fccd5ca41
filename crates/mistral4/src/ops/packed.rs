//! Operations with weights packed once for inference: see [`mistral4_kernels::PackedMatrix`].
//!
//! They have no gradients: tensors that ask for one, and other backends, go through the unpacked weight.

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::bf16;
use mistral4_checkpoint::config::Activation;
use mistral4_kernels::{PackedMatrix, StackDims};

use super::composite;
#[cfg(feature = "flex")]
use super::{extension, is_fused};

/// Packed weights, shared between the copies of a model.
pub type PackedWeight = Arc<PackedMatrix>;

/// A linear map `y = x W^T` with a packed weight.
///
/// # Shapes
/// - `x`: `[rows, in]`, `weight`: one matrix `[out, in]`, output: `[rows, out]`
pub fn packed_linear(x: Tensor<2>, weight: &PackedWeight) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) && !x.is_tracked() {
        return extension::packed_linear(x, weight.clone());
    }
    let weight = unpacked(weight, &x.device()).cast(x.dtype());
    let [_, outputs, inputs] = weight.dims();
    composite::linear(x, weight.reshape([outputs, inputs]))
}

/// Routed gated feed-forward with packed weights; see [`super::moe_experts`].
///
/// # Shapes
/// - `x`: `[T, D]`; `indices`, `weights`: `[T, K]`; output: `[T, D]`
pub fn packed_experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    [gate_up, down]: [&PackedWeight; 2],
    activation: Activation,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) && !x.is_tracked() && !weights.is_tracked() {
        let experts = [gate_up.clone(), down.clone()];
        return extension::packed_experts(x, indices, weights, experts, activation);
    }
    let [gate_up, down] = [gate_up, down].map(|w| unpacked(w, &x.device()).cast(x.dtype()));
    composite::moe_experts(x, indices, weights, gate_up, down, activation)
}

/// The values of a stack as a tensor, in bf16.
///
/// # Shapes
/// - output: `[matrices, rows, columns]`
pub fn unpacked(weight: &PackedMatrix, device: &Device) -> Tensor<3> {
    let StackDims { matrices, rows, columns } = weight.dims();
    let mut values = vec![bf16::ZERO; matrices * rows * columns];
    for (matrix, values) in values.chunks_exact_mut((rows * columns).max(1)).enumerate() {
        weight.unpack(matrix, values);
    }
    let data = TensorData::new(values, [matrices, rows, columns]);
    Tensor::from_data(data, (&device.clone().without_autodiff(), DType::BF16))
}
