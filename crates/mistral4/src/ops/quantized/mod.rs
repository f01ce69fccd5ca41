//! Operations with weights that stay quantised: see [`mistral4_kernels::QuantizedMatrix`].
//!
//! Gradients flow to activations and routing weights alone; a quantised weight has none. Elsewhere than on the CPU's
//! kernels, weights become dense tensors for each call.

#[cfg(feature = "flex")]
mod fused;
#[cfg(all(test, feature = "flex"))]
mod tests;

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::bf16;
use mistral4_checkpoint::config::Activation;
use mistral4_kernels::{QuantizedMatrix, StackDims};

use super::composite;
#[cfg(feature = "flex")]
use super::is_fused;

/// Quantised weights, shared between the copies of a model.
pub type QuantizedWeight = Arc<QuantizedMatrix>;

/// The experts' weights: gate and up of each expert in turn, `[2E, F, D]`, and down, `[E, D, F]`.
#[derive(Debug, Clone)]
pub struct QuantizedExpertWeights {
    /// `[2E, F, D]`
    pub gate_up: QuantizedWeight,
    /// `[E, D, F]`
    pub down: QuantizedWeight,
}

/// A linear map `y = x W^T` with a quantised weight.
///
/// # Shapes
/// - `x`: `[rows, in]`, `weight`: one matrix `[out, in]`, output: `[rows, out]`
pub fn quantized_linear(x: Tensor<2>, weight: &QuantizedWeight) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return fused::linear(x, weight.clone());
    }
    let weight = dense(weight, x.dtype(), &x.device());
    let [_, outputs, inputs] = weight.dims();
    composite::linear(x, weight.reshape([outputs, inputs]))
}

/// One linear map an expert with quantised weights; see [`super::grouped_linear`].
///
/// The weight of an expert may be several matrices of the stack, whose outputs lie side by side: gate and up.
///
/// # Shapes
/// - `x`: `[M, in]`, `weight`: `[E * parts, out / parts, in]`, output: `[M, out]`
/// - `offsets`: `[E + 1]`, the rows of expert `e` are `offsets[e]..offsets[e + 1]`
pub fn quantized_grouped_linear(x: Tensor<2>, weight: &QuantizedWeight, offsets: Arc<[usize]>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return fused::grouped_linear(x, weight.clone(), offsets);
    }
    let weight = dense(weight, x.dtype(), &x.device());
    let [matrices, rows, inputs] = weight.dims();
    let experts = offsets.len() - 1;
    composite::grouped_linear(x, weight.reshape([experts, matrices / experts * rows, inputs]), &offsets)
}

/// Routed gated feed-forward with quantised weights; see [`super::moe_experts`].
///
/// # Shapes
/// - `x`: `[T, D]`; `indices`, `weights`: `[T, K]`; output: `[T, D]`
pub fn quantized_experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    experts: &QuantizedExpertWeights,
    activation: Activation,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return fused::experts(x, indices, weights, experts.clone(), activation);
    }
    let gate_up = dense(&experts.gate_up, x.dtype(), &x.device());
    let down = dense(&experts.down, x.dtype(), &x.device());
    let [matrices, inter, hidden] = gate_up.dims();
    let gate_up = gate_up.reshape([matrices / 2, 2 * inter, hidden]);
    composite::moe_experts(x, indices, weights, gate_up, down, activation)
}

/// The values of a stack as a tensor.
///
/// # Shapes
/// - output: `[matrices, rows, columns]`
pub fn dense(weight: &QuantizedMatrix, dtype: DType, device: &Device) -> Tensor<3> {
    let StackDims { matrices, rows, columns } = weight.dims();
    let size = rows * columns;
    let shape = [matrices, rows, columns];
    let data = match dtype {
        DType::BF16 => {
            let mut values = vec![bf16::ZERO; matrices * size];
            for (matrix, values) in values.chunks_exact_mut(size.max(1)).enumerate() {
                weight.dequantize(matrix, values);
            }
            TensorData::new(values, shape)
        }
        _ => {
            let mut values = vec![0.0f32; matrices * size];
            for (matrix, values) in values.chunks_exact_mut(size.max(1)).enumerate() {
                weight.dequantize(matrix, values);
            }
            TensorData::new(values, shape)
        }
    };
    Tensor::from_data(data, (&device.clone().without_autodiff(), dtype))
}
