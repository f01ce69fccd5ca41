//! Weights of linear maps and experts: dense, or quantised in memory.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};
use mistral4_kernels::StackDims;

use crate::ops;
use crate::ops::quantized::{QuantizedWeight, dense, quantized_grouped_linear, quantized_linear};

/// A weight that stays quantised; it is frozen, so it is no parameter.
#[derive(Module, Debug)]
pub struct Quantized {
    /// Codes and scales.
    #[module(skip)]
    pub weight: QuantizedWeight,
    /// Matrices that are one after the other in the dense tensor: gate and up of an expert.
    #[module(skip)]
    pub parts: usize,
    /// What its values become where a dense tensor is needed.
    #[module(skip)]
    pub dtype: DType,
    /// Where they are then.
    #[module(skip)]
    pub device: Device,
}

impl Quantized {
    /// `[matrices, rows, columns]`
    fn dense(&self) -> Tensor<3> {
        dense(&self.weight, self.dtype, &self.device)
    }
}

/// The weight of a linear map, `[out, in]`.
#[derive(Module, Debug)]
pub enum LinearWeight {
    /// A parameter.
    Dense(Param<Tensor<2>>),
    /// Frozen codes.
    Quantized(Quantized),
}

impl LinearWeight {
    /// `x W^T`.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`, output: `[rows, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            LinearWeight::Dense(weight) => ops::linear(x, weight.val()),
            LinearWeight::Quantized(quantized) => quantized_linear(x, &quantized.weight),
        }
    }

    /// The values as a dense tensor, which a quantised weight makes anew each time.
    ///
    /// # Shapes
    /// - output: `[out, in]`
    pub fn val(&self) -> Tensor<2> {
        match self {
            LinearWeight::Dense(weight) => weight.val(),
            LinearWeight::Quantized(quantized) => {
                let StackDims { rows, columns, .. } = quantized.weight.dims();
                quantized.dense().reshape([rows, columns])
            }
        }
    }
}

/// A stacked weight of all experts, `[E, out, in]`.
#[derive(Module, Debug)]
pub enum ExpertWeight {
    /// A parameter.
    Dense(Param<Tensor<3>>),
    /// Frozen codes; gate and up of an expert are two matrices.
    Quantized(Quantized),
}

impl ExpertWeight {
    /// `[E, out, in]`
    pub fn dims(&self) -> [usize; 3] {
        match self {
            ExpertWeight::Dense(weight) => weight.dims(),
            ExpertWeight::Quantized(quantized) => {
                let StackDims { matrices, rows, columns } = quantized.weight.dims();
                [matrices / quantized.parts, quantized.parts * rows, columns]
            }
        }
    }

    /// `x[rows of e] W[e]^T` of each expert.
    ///
    /// # Shapes
    /// - `x`: `[M, in]`, rows sorted by expert, those of `e` at `offsets[e]..offsets[e + 1]`; output: `[M, out]`
    pub fn forward(&self, x: Tensor<2>, offsets: &Arc<[usize]>) -> Tensor<2> {
        match self {
            ExpertWeight::Dense(weight) => ops::grouped_linear(x, weight.val(), offsets.clone()),
            ExpertWeight::Quantized(quantized) => {
                quantized_grouped_linear(x, &quantized.weight, offsets.clone())
            }
        }
    }

    /// The values as a dense tensor, which a quantised weight makes anew each time.
    ///
    /// # Shapes
    /// - output: `[E, out, in]`
    pub fn val(&self) -> Tensor<3> {
        match self {
            ExpertWeight::Dense(weight) => weight.val(),
            ExpertWeight::Quantized(quantized) => {
                let StackDims { rows, columns, .. } = quantized.weight.dims();
                quantized.dense().reshape([-1, (quantized.parts * rows) as i64, columns as i64])
            }
        }
    }
}
