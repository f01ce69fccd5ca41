//! The kernels as an extension of Burn's CPU backend, with their backward rules.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, Tensor};
use half::bf16;
use mistral4_checkpoint::config::Activation;
use mistral4_kernels as kernels;

use super::{QuantizedExpertWeights, QuantizedWeight};
use crate::ops::activation::kernel_activation;
use crate::ops::flex::{by_dtype, contiguous, output, slice, tensor, with_ints};

/// Operations with quantised weights; see the functions in [`super`].
#[backend_extension(Flex, Autodiff)]
trait QuantizedOps: Backend {
    /// See [`super::quantized_linear`].
    fn quantized_linear(x: FloatTensor<Self>, weight: QuantizedWeight) -> FloatTensor<Self>;

    /// See [`super::quantized_grouped_linear`].
    fn quantized_grouped_linear(
        x: FloatTensor<Self>,
        weight: QuantizedWeight,
        offsets: Arc<[usize]>,
    ) -> FloatTensor<Self>;

    /// See [`super::quantized_experts`].
    fn quantized_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        experts: QuantizedExpertWeights,
        activation: Activation,
    ) -> FloatTensor<Self>;
}

pub(super) fn linear(x: Tensor<2>, weight: QuantizedWeight) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::quantized_linear(x.into_dispatch(), weight))
}

pub(super) fn grouped_linear(x: Tensor<2>, weight: QuantizedWeight, offsets: Arc<[usize]>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::quantized_grouped_linear(x.into_dispatch(), weight, offsets))
}

pub(super) fn experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    experts: QuantizedExpertWeights,
    activation: Activation,
) -> Tensor<2> {
    let (x, indices, weights) = (x.into_dispatch(), indices.into_dispatch(), weights.into_dispatch());
    Tensor::from_dispatch(Dispatch::quantized_experts(x, indices, weights, experts, activation))
}

/// Inputs of [`QuantizedOps::quantized_experts`], kept for its backward pass.
#[derive(Debug, Clone)]
struct ExpertInputs<B: Backend> {
    x: FloatTensor<B>,
    indices: IntTensor<B>,
    weights: FloatTensor<B>,
    experts: QuantizedExpertWeights,
    activation: Activation,
}

trait BackwardKernels: QuantizedOps {
    /// `dy W`.
    fn quantized_linear_backward(dy: FloatTensor<Self>, weight: QuantizedWeight) -> FloatTensor<Self>;
    /// `dy[rows of e] W[e]`.
    fn quantized_grouped_linear_backward(
        dy: FloatTensor<Self>,
        weight: QuantizedWeight,
        offsets: &[usize],
    ) -> FloatTensor<Self>;
    /// Gradients of `(x, weights)`.
    fn quantized_experts_backward(
        inputs: ExpertInputs<Self>,
        dout: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];
}

#[derive(Debug)]
struct Linear;

impl<B: BackwardKernels> Backward<B, 1> for Linear {
    type State = QuantizedWeight;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [to_x] = ops.parents;
        if let Some(node) = to_x {
            grads.register::<B>(node.id, B::quantized_linear_backward(dy, ops.state));
        }
    }
}

#[derive(Debug)]
struct GroupedLinear;

impl<B: BackwardKernels> Backward<B, 1> for GroupedLinear {
    type State = (QuantizedWeight, Arc<[usize]>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (weight, offsets) = ops.state;
        let [to_x] = ops.parents;
        if let Some(node) = to_x {
            grads.register::<B>(node.id, B::quantized_grouped_linear_backward(dy, weight, &offsets));
        }
    }
}

#[derive(Debug)]
struct Experts;

impl<B: BackwardKernels> Backward<B, 2> for Experts {
    type State = ExpertInputs<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let gradients = B::quantized_experts_backward(ops.state, dout);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = parent {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: BackwardKernels, C: CheckpointStrategy> QuantizedOps for Autodiff<B, C> {
    fn quantized_linear(x: FloatTensor<Self>, weight: QuantizedWeight) -> FloatTensor<Self> {
        let op = Linear.prepare::<C>([x.node()]).compute_bound().stateful();
        let out = B::quantized_linear(x.into_primitive(), weight.clone());
        match op {
            OpsKind::Tracked(op) => op.finish(weight, out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn quantized_grouped_linear(
        x: FloatTensor<Self>,
        weight: QuantizedWeight,
        offsets: Arc<[usize]>,
    ) -> FloatTensor<Self> {
        let op = GroupedLinear.prepare::<C>([x.node()]).compute_bound().stateful();
        let out = B::quantized_grouped_linear(x.into_primitive(), weight.clone(), offsets.clone());
        match op {
            OpsKind::Tracked(op) => op.finish((weight, offsets), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn quantized_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        experts: QuantizedExpertWeights,
        activation: Activation,
    ) -> FloatTensor<Self> {
        let op = Experts.prepare::<C>([x.node(), weights.node()]).compute_bound().stateful();
        let (x, weights) = (x.into_primitive(), weights.into_primitive());
        let inputs = ExpertInputs::<B> { x, indices, weights, experts, activation };
        let i = inputs.clone();
        let out = B::quantized_experts(i.x, i.indices, i.weights, i.experts, activation);
        match op {
            OpsKind::Tracked(op) => op.finish(inputs, out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }
}

fn expert_dims(
    x: &FloatTensor<Flex>,
    indices: &IntTensor<Flex>,
    experts: &QuantizedExpertWeights,
) -> kernels::ExpertDims {
    let [tokens, hidden] = x.shape().dims();
    let [_, top_k] = indices.shape().dims();
    let down = experts.down.dims();
    kernels::ExpertDims { tokens, top_k, experts: down.matrices, hidden, inter: down.columns }
}

impl QuantizedOps for Flex {
    fn quantized_linear(x: FloatTensor<Self>, weight: QuantizedWeight) -> FloatTensor<Self> {
        let [rows, _] = x.shape().dims();
        let outputs = weight.dims().rows;
        let x = contiguous(x);
        by_dtype!(x, T => {
            let mut y = output::<T>(rows * outputs);
            kernels::quantized_linear(rows, slice::<T>(&x), &weight, &mut y);
            tensor(y, [rows, outputs])
        })
    }

    fn quantized_grouped_linear(
        x: FloatTensor<Self>,
        weight: QuantizedWeight,
        offsets: Arc<[usize]>,
    ) -> FloatTensor<Self> {
        let [rows, _] = x.shape().dims();
        let outputs = weight.dims().matrices / (offsets.len() - 1) * weight.dims().rows;
        let x = contiguous(x);
        by_dtype!(x, T => {
            let mut y = output::<T>(rows * outputs);
            kernels::quantized_grouped_linear(&offsets, slice::<T>(&x), &weight, &mut y);
            tensor(y, [rows, outputs])
        })
    }

    fn quantized_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        experts: QuantizedExpertWeights,
        activation: Activation,
    ) -> FloatTensor<Self> {
        let dims = expert_dims(&x, &indices, &experts);
        let [x, weights] = [x, weights].map(contiguous);
        by_dtype!(x, T => with_ints!(indices, indices => {
            let mut out = output::<T>(dims.tokens * dims.hidden);
            let input = kernels::QuantizedExperts {
                dims,
                activation: kernel_activation(activation),
                x: slice::<T>(&x),
                indices,
                weights: slice(&weights),
                gate_up: &experts.gate_up,
                down: &experts.down,
            };
            kernels::quantized_experts(&input, &mut out);
            tensor(out, x.shape())
        }))
    }
}

impl BackwardKernels for Flex {
    fn quantized_linear_backward(dy: FloatTensor<Self>, weight: QuantizedWeight) -> FloatTensor<Self> {
        let [rows, _] = dy.shape().dims();
        let inputs = weight.dims().columns;
        let dy = contiguous(dy);
        by_dtype!(dy, T => {
            let mut dx = output::<T>(rows * inputs);
            kernels::quantized_linear_backward_input(rows, slice::<T>(&dy), &weight, &mut dx);
            tensor(dx, [rows, inputs])
        })
    }

    fn quantized_grouped_linear_backward(
        dy: FloatTensor<Self>,
        weight: QuantizedWeight,
        offsets: &[usize],
    ) -> FloatTensor<Self> {
        let [rows, _] = dy.shape().dims();
        let inputs = weight.dims().columns;
        let dy = contiguous(dy);
        by_dtype!(dy, T => {
            let mut dx = output::<T>(rows * inputs);
            kernels::quantized_grouped_linear_backward_input(offsets, slice::<T>(&dy), &weight, &mut dx);
            tensor(dx, [rows, inputs])
        })
    }

    fn quantized_experts_backward(
        inputs: ExpertInputs<Self>,
        dout: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2] {
        let ExpertInputs { x, indices, weights, experts, activation } = inputs;
        let dims = expert_dims(&x, &indices, &experts);
        let [x, weights, dout] = [x, weights, dout].map(contiguous);
        by_dtype!(x, T => with_ints!(indices, indices => {
            let mut dx = output::<T>(dims.tokens * dims.hidden);
            let mut dweights = output::<f32>(dims.tokens * dims.top_k);
            let input = kernels::QuantizedExperts {
                dims,
                activation: kernel_activation(activation),
                x: slice::<T>(&x),
                indices,
                weights: slice(&weights),
                gate_up: &experts.gate_up,
                down: &experts.down,
            };
            kernels::quantized_experts_backward(&input, slice::<T>(&dout), &mut dx, &mut dweights);
            [tensor(dx, x.shape()), tensor(dweights, weights.shape())]
        }))
    }
}
