//! The routed experts, stacked.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use mistral4_checkpoint::config::{Activation, TextConfig};

use crate::error::Result;
use crate::model::gate::Routing;
use crate::model::lora::{ExpertLora, ExpertOrder};
use crate::model::weight::ExpertWeight;
use crate::ops::packed::packed_experts;
use crate::ops::quantized::{QuantizedExpertWeights, quantized_experts};
use crate::ops::{self, Deferral, Group};
use crate::weights::Parameters;

/// The routed experts, stacked, with low-rank adapters where there are any.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[E, 2F, D]`, gate rows first.
    pub gate_up_proj: ExpertWeight,
    /// `[E, D, F]`
    pub down_proj: ExpertWeight,
    /// Adapters of `gate_up_proj`.
    pub gate_up_proj_lora: Option<ExpertLora>,
    /// Adapters of `down_proj`.
    pub down_proj_lora: Option<ExpertLora>,
    #[module(skip)]
    pub(super) act: Activation,
    /// Where the gradients of the weights may leave a backward pass as products, shared by clones.
    #[module(skip)]
    pub deferral: Deferral,
}

impl Experts {
    /// Takes the stacks, and the adapters they have here, from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(c: &TextConfig, parameters: &Parameters) -> Result<Self> {
        let (experts, hidden, inter) = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
        let (gate_up, down) = ([experts, 2 * inter, hidden], [experts, hidden, inter]);
        Ok(Self {
            gate_up_proj: parameters.expert_weight("gate_up_proj", gate_up)?,
            down_proj: parameters.expert_weight("down_proj", down)?,
            gate_up_proj_lora: parameters.expert_lora("gate_up_proj", gate_up)?,
            down_proj_lora: parameters.expert_lora("down_proj", down)?,
            act: c.hidden_act,
            deferral: Deferral::default(),
        })
    }

    /// Says that each rank of `group` holds a part of F.
    pub(crate) fn divide(&mut self, group: &Option<Arc<dyn Group>>) {
        if let Some(lora) = &mut self.gate_up_proj_lora {
            lora.divided.outputs = group.clone();
        }
        if let Some(lora) = &mut self.down_proj_lora {
            lora.divided.inputs = group.clone();
        }
    }

    /// Each token through its experts, weighted and summed.
    ///
    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(&self, x: Tensor<2>, routing: &Routing) -> Tensor<2> {
        let (indices, weights) = (routing.indices.clone(), routing.weights.clone());
        match (&self.gate_up_proj, &self.down_proj) {
            _ if self.gate_up_proj_lora.is_some() || self.down_proj_lora.is_some() => {
                self.forward_adapted(x, routing)
            }
            (ExpertWeight::Quantized(gate_up), ExpertWeight::Quantized(down)) => {
                let (gate_up, down) = (gate_up.weight.clone(), down.weight.clone());
                let experts = QuantizedExpertWeights { gate_up, down };
                quantized_experts(x, indices, weights, &experts, self.act)
            }
            (ExpertWeight::Packed(gate_up), ExpertWeight::Packed(down)) => {
                packed_experts(x, indices, weights, [&gate_up.weight, &down.weight], self.act)
            }
            (gate_up, down) => {
                let (gate_up, down) = (gate_up.val(), down.val());
                ops::moe_experts(x, indices, weights, gate_up, down, self.act, &self.deferral)
            }
        }
    }

    /// Packs dense weights for inference.
    pub(crate) fn pack(&mut self) {
        if self.gate_up_proj_lora.is_none() && self.down_proj_lora.is_none() {
            self.gate_up_proj.pack(true);
            self.down_proj.pack(false);
        }
    }

    /// The same in steps, base and adapter side by side.
    fn forward_adapted(&self, x: Tensor<2>, routing: &Routing) -> Tensor<2> {
        let [experts, _, inter] = self.down_proj.dims();
        let order = ExpertOrder::new(routing.indices.clone(), experts);
        let project = |x: Tensor<2>, weight: &ExpertWeight, lora: &Option<ExpertLora>| {
            let y = weight.forward(x.clone(), &order.offsets);
            match lora {
                Some(lora) => y + lora.change(x, &order.offsets),
                None => y,
            }
        };
        let both = project(order.gather(x), &self.gate_up_proj, &self.gate_up_proj_lora);
        let (gate, up) = (both.clone().slice_dim(1, 0..inter), both.slice_dim(1, inter..2 * inter));
        let y = project(ops::gated(gate, up, self.act), &self.down_proj, &self.down_proj_lora);
        order.combine(y, routing.weights.clone())
    }
}
