//! The mixture of experts: routed experts beside shared ones.

use burn::module::Module;
use burn::tensor::Tensor;
use mistral4_checkpoint::config::{Activation, TextConfig};

use crate::error::Result;
use crate::model::gate::{Gate, Routing};
use crate::model::mlp::Mlp;
use crate::model::weight::ExpertWeight;
use crate::ops;
use crate::ops::quantized::{QuantizedExpertWeights, quantized_experts};
use crate::weights::Parameters;

/// What a caller may choose about the mixture beyond `config.json`.
///
/// Source: `MoEConfig` in NeMo AutoModel.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeOptions {
    /// Step of the bias that balances the experts' load; 0 keeps it.
    pub gate_bias_update_factor: f64,
    /// Factor of the load-balancing loss; 0: none.
    pub aux_loss_coeff: f64,
    /// Whether the router's weight is trained.
    pub train_gate: bool,
    /// Send tokens to experts in turn instead of by score, for measuring speed.
    pub fake_balanced_gate: bool,
}

impl Default for MoeOptions {
    fn default() -> Self {
        Self {
            gate_bias_update_factor: 1e-3,
            aux_loss_coeff: 0.0,
            train_gate: true,
            fake_balanced_gate: false,
        }
    }
}

/// The routed experts, stacked.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[E, 2F, D]`, gate rows first.
    pub gate_up_proj: ExpertWeight,
    /// `[E, D, F]`
    pub down_proj: ExpertWeight,
    #[module(skip)]
    act: Activation,
}

impl Experts {
    /// Each token through its experts, weighted and summed.
    ///
    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    fn forward(&self, x: Tensor<2>, routing: &Routing) -> Tensor<2> {
        let (indices, weights) = (routing.indices.clone(), routing.weights.clone());
        match (&self.gate_up_proj, &self.down_proj) {
            (ExpertWeight::Quantized(gate_up), ExpertWeight::Quantized(down)) => {
                let (gate_up, down) = (gate_up.weight.clone(), down.weight.clone());
                let experts = QuantizedExpertWeights { gate_up, down };
                quantized_experts(x, indices, weights, &experts, self.act)
            }
            (gate_up, down) => ops::moe_experts(x, indices, weights, gate_up.val(), down.val(), self.act),
        }
    }
}

/// Routed and shared experts of one layer.
#[derive(Module, Debug)]
pub struct Moe {
    /// The router.
    pub gate: Gate,
    /// The routed experts.
    pub experts: Experts,
    /// The shared experts, as one feed-forward.
    pub shared_experts: Mlp,
}

impl Moe {
    /// Takes router and experts from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(c: &TextConfig, options: MoeOptions, parameters: &Parameters) -> Result<Self> {
        let (experts, hidden, inter) = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
        let shared = inter * c.n_shared_experts;
        let stacked = parameters.pp("experts");
        Ok(Self {
            gate: Gate::new(c, options, &parameters.pp("gate"))?,
            experts: Experts {
                gate_up_proj: stacked.expert_weight("gate_up_proj", [experts, 2 * inter, hidden])?,
                down_proj: stacked.expert_weight("down_proj", [experts, hidden, inter])?,
                act: c.hidden_act,
            },
            shared_experts: Mlp::new(hidden, shared, c.hidden_act, &parameters.pp("shared_experts"))?,
        })
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(&self, x: Tensor<2>, token_mask: Option<&[bool]>) -> (Tensor<2>, Routing) {
        let routing = self.gate.forward(x.clone(), token_mask);
        let routed = self.experts.forward(x.clone(), &routing);
        (ops::add(routed, self.shared_experts.forward(x)), routing)
    }
}
