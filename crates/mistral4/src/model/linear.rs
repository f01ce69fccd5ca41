//! Linear maps.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::error::Result;
use crate::model::weight::LinearWeight;
use crate::weights::Parameters;

/// `y = x W^T + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: LinearWeight,
    /// `[out]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Takes `weight` of `[out, in]` and, if `bias`, `bias` of `[out]` from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(input: usize, output: usize, bias: bool, parameters: &Parameters) -> Result<Self> {
        Ok(Self {
            weight: parameters.linear_weight("weight", [output, input])?,
            bias: bias.then(|| parameters.get("bias", [output])).transpose()?,
        })
    }

    /// # Shapes
    /// - `x`: `[rows, in]`, output: `[rows, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = self.weight.forward(x);
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }
}
