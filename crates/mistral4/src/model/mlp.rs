//! The dense gated feed-forward: leading dense layers, shared experts, and the vision tower's layers.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use mistral4_checkpoint::config::Activation;

use crate::error::Result;
use crate::model::linear::Linear;
use crate::ops::collective::copy_to_group;
use crate::ops::{self, Group};
use crate::weights::Parameters;

/// `down_proj(act(gate_proj(x)) * up_proj(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[F, D]`
    pub gate_proj: Linear,
    /// `[F, D]`
    pub up_proj: Linear,
    /// `[D, F]`
    pub down_proj: Linear,
    #[module(skip)]
    pub(super) act: Activation,
    /// Ranks that hold a part of F each.
    #[module(skip)]
    pub(crate) tensor_group: Option<Arc<dyn Group>>,
}

impl Mlp {
    /// Takes the three projections from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(hidden: usize, inter: usize, act: Activation, parameters: &Parameters) -> Result<Self> {
        Ok(Self {
            gate_proj: Linear::new(hidden, inter, false, &parameters.pp("gate_proj"))?,
            up_proj: Linear::new(hidden, inter, false, &parameters.pp("up_proj"))?,
            down_proj: Linear::new(inter, hidden, false, &parameters.pp("down_proj"))?,
            act,
            tensor_group: None,
        })
    }

    /// Packs dense weights for inference.
    pub(crate) fn pack(&mut self) {
        for linear in [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj] {
            linear.weight.pack();
        }
    }

    /// Says that each rank of `group` holds a part of F; who sums up the ranks' outputs is the caller's business.
    pub(crate) fn divide(&mut self, group: &Option<Arc<dyn Group>>) {
        self.gate_proj.divide_outputs(group);
        self.up_proj.divide_outputs(group);
        self.down_proj.divide_inputs(group);
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = copy_to_group(x, &self.tensor_group);
        let gate = self.gate_proj.forward(x.clone());
        let inner = ops::gated(gate, self.up_proj.forward(x), self.act);
        self.down_proj.forward_row_parallel(inner, &self.tensor_group)
    }
}
