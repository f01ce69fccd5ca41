//! Weights of linear maps and experts: dense, packed for inference, or quantised in memory.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};
use half::bf16;
use mistral4_kernels::{PackedMatrix, StackDims};

use crate::ops;
use crate::ops::packed::{PackedWeight, packed_linear, unpacked};
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

/// A weight in the order in which the CPU's products read it; it is frozen, so it is no parameter.
#[derive(Module, Debug)]
pub struct Packed {
    /// The values, bf16.
    #[module(skip)]
    pub weight: PackedWeight,
    /// Where a dense copy of them lies.
    #[module(skip)]
    pub device: Device,
}

/// Whether packing pays for a dense weight: it is bf16, and the CPU kernels compute with it.
pub(super) fn packs<const D: usize>(weight: &Tensor<D>) -> bool {
    weight.dtype() == DType::BF16 && ops::is_fused(&weight.device())
}

/// The values of a bf16 tensor.
pub(super) fn bf16_values<const D: usize>(weight: Tensor<D>) -> Vec<bf16> {
    weight.inner().into_data().try_into_vec().expect("the dtype was checked")
}

/// The weight of a linear map, `[out, in]`.
#[derive(Module, Debug)]
pub enum LinearWeight {
    /// A parameter.
    Dense(Param<Tensor<2>>),
    /// Frozen, for inference.
    Packed(Packed),
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
            LinearWeight::Packed(packed) => packed_linear(x, &packed.weight),
            LinearWeight::Quantized(quantized) => quantized_linear(x, &quantized.weight),
        }
    }

    /// Packs a dense weight, if that pays.
    pub fn pack(&mut self) {
        let LinearWeight::Dense(weight) = self else { return };
        let weight = weight.val();
        if packs(&weight) {
            let ([rows, columns], device) = (weight.dims(), weight.device().without_autodiff());
            let dims = StackDims { matrices: 1, rows, columns };
            let weight = Arc::new(PackedMatrix::new(dims, &bf16_values(weight)));
            *self = LinearWeight::Packed(Packed { weight, device });
        }
    }

    /// The values as a dense tensor, which a packed or quantised weight makes anew each time.
    ///
    /// # Shapes
    /// - output: `[out, in]`
    pub fn val(&self) -> Tensor<2> {
        match self {
            LinearWeight::Dense(weight) => weight.val(),
            LinearWeight::Packed(Packed { weight, device }) => {
                let StackDims { rows, columns, .. } = weight.dims();
                unpacked(weight, device).reshape([rows, columns])
            }
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
    /// Frozen, for inference.
    Packed(Packed),
    /// Frozen codes; gate and up of an expert are two matrices.
    Quantized(Quantized),
}

impl ExpertWeight {
    /// Packs a dense weight, if that pays; `gated` if its rows are those of gate, then of up.
    pub fn pack(&mut self, gated: bool) {
        let ExpertWeight::Dense(weight) = self else { return };
        let weight = weight.val();
        if packs(&weight) {
            let ([matrices, rows, columns], device) = (weight.dims(), weight.device().without_autodiff());
            let dims = StackDims { matrices, rows, columns };
            let pack = if gated { PackedMatrix::gated } else { PackedMatrix::new };
            let weight = Arc::new(pack(dims, &bf16_values(weight)));
            *self = ExpertWeight::Packed(Packed { weight, device });
        }
    }

    /// `[E, out, in]`
    pub fn dims(&self) -> [usize; 3] {
        match self {
            ExpertWeight::Dense(weight) => weight.dims(),
            ExpertWeight::Packed(packed) => {
                let StackDims { matrices, rows, columns } = packed.weight.dims();
                [matrices, rows, columns]
            }
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
            ExpertWeight::Dense(_) | ExpertWeight::Packed(_) => {
                ops::grouped_linear(x, self.val(), offsets.clone())
            }
            ExpertWeight::Quantized(quantized) => {
                quantized_grouped_linear(x, &quantized.weight, offsets.clone())
            }
        }
    }

    /// The values as a dense tensor, which a packed or quantised weight makes anew each time.
    ///
    /// # Shapes
    /// - output: `[E, out, in]`
    pub fn val(&self) -> Tensor<3> {
        match self {
            ExpertWeight::Dense(weight) => weight.val(),
            ExpertWeight::Packed(Packed { weight, device }) => unpacked(weight, device),
            ExpertWeight::Quantized(quantized) => {
                let StackDims { rows, columns, .. } = quantized.weight.dims();
                quantized.dense().reshape([-1, (quantized.parts * rows) as i64, columns as i64])
            }
        }
    }
}
