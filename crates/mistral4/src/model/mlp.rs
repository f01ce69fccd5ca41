//! The dense gated feed-forward: leading dense layers, shared experts, and the vision tower's layers.

use burn::module::Module;
use burn::tensor::Tensor;
use mistral4_checkpoint::config::Activation;

use crate::error::Result;
use crate::model::linear::Linear;
use crate::ops;
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
    act: Activation,
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
        })
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(ops::gated(gate, self.up_proj.forward(x), self.act))
    }
}
