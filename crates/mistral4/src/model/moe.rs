//! The mixture of experts: routed experts beside shared ones.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mistral4_checkpoint::config::{Activation, TextConfig};

use crate::error::Result;
use crate::model::gate::{Gate, Routing};
use crate::model::mlp::Mlp;
use crate::ops;
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
    pub gate_up_proj: Param<Tensor<3>>,
    /// `[E, D, F]`
    pub down_proj: Param<Tensor<3>>,
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
    #[module(skip)]
    act: Activation,
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
                gate_up_proj: stacked.get("gate_up_proj", [experts, 2 * inter, hidden])?,
                down_proj: stacked.get("down_proj", [experts, hidden, inter])?,
            },
            shared_experts: Mlp::new(hidden, shared, c.hidden_act, &parameters.pp("shared_experts"))?,
            act: c.hidden_act,
        })
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(&self, x: Tensor<2>, token_mask: Option<&[bool]>) -> (Tensor<2>, Routing) {
        let routing = self.gate.forward(x.clone(), token_mask);
        let routed = ops::moe_experts(
            x.clone(),
            routing.indices.clone(),
            routing.weights.clone(),
            self.experts.gate_up_proj.val(),
            self.experts.down_proj.val(),
            self.act,
        );
        (routed + self.shared_experts.forward(x), routing)
    }
}
