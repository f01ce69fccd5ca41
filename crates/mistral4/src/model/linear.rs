//! Linear maps.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};

use crate::error::Result;
use crate::model::lora::{self, Lora};
use crate::model::weight::LinearWeight;
use crate::ops::{self, Group, TokenLoss, TokenLossScale, collective};
use crate::weights::Parameters;

/// `y = x W^T + b`, with a low-rank adapter on `W` where there is one.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: LinearWeight,
    /// `[out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// The adapter.
    pub lora: Option<Lora>,
}

impl Linear {
    /// Takes `weight` of `[out, in]` and, if `bias`, `bias` of `[out]` from `parameters`, and the adapter they have here.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(input: usize, output: usize, bias: bool, parameters: &Parameters) -> Result<Self> {
        Ok(Self {
            weight: parameters.linear_weight("weight", [output, input])?,
            bias: bias.then(|| parameters.get("bias", [output])).transpose()?,
            lora: parameters.lora([output, input])?,
        })
    }

    /// Says that each rank of `group` holds some of the outputs.
    pub(crate) fn divide_outputs(&mut self, group: &Option<Arc<dyn Group>>) {
        if let Some(lora) = &mut self.lora {
            lora.divided.outputs = group.clone();
        }
    }

    /// Says that each rank of `group` holds some of the inputs; see [`Linear::forward_row_parallel`].
    pub(crate) fn divide_inputs(&mut self, group: &Option<Arc<dyn Group>>) {
        if let Some(lora) = &mut self.lora {
            lora.divided.inputs = group.clone();
        }
    }

    /// # Shapes
    /// - `x`: `[rows, in]`, output: `[rows, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.forward_row_parallel(x, &None)
    }

    /// As [`Linear::forward`] where each rank of `group` holds some of the inputs: the ranks' sums are added up before
    /// the bias is.
    ///
    /// # Shapes
    /// - `x`: `[rows, in of this rank]`, output: `[rows, out]`
    pub fn forward_row_parallel(&self, x: Tensor<2>, group: &Option<Arc<dyn Group>>) -> Tensor<2> {
        let y = match &self.lora {
            Some(lora) => {
                let y = self.weight.forward(x.clone());
                lora.forward(x, y, || self.weight.val())
            }
            None => self.weight.forward(x),
        };
        let y = collective::reduce_from_group(y, group);
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    /// The weight that this map amounts to, its adapter included, `[out, in]`.
    pub fn merged_weight(&self) -> Tensor<2> {
        match &self.lora {
            Some(lora) => lora.merged(self.weight.val()),
            None => self.weight.val(),
        }
    }

    /// Sum over labelled rows of the cross entropy of this map's output with the labels and of the z-loss; see
    /// [`ops::linear_cross_entropy`].
    ///
    /// # Shapes
    /// - `x`: `[T, in]`, `labels`: `[T]`
    pub fn cross_entropy(&self, x: Tensor<2>, labels: Tensor<1, Int>, scale: TokenLossScale) -> TokenLoss {
        match &self.lora {
            None => ops::linear_cross_entropy(x, self.weight.val(), labels, scale),
            Some(_) => lora::cross_entropy(self, x, labels, scale),
        }
    }
}
