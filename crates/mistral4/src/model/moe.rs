//! The mixture of experts: routed experts beside shared ones.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use mistral4_checkpoint::config::TextConfig;

use crate::error::Result;
use crate::model::expert_parallel;
use crate::model::experts::Experts;
use crate::model::gate::{Gate, Routing};
use crate::model::mlp::Mlp;
use crate::ops::collective::{copy_to_group, reduce_from_group};
use crate::ops::{self, Group};
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
    /// Factor of the mean squared log-sum-exp of the router's logits; 0: none.
    pub router_z_loss_coeff: f64,
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
            router_z_loss_coeff: 0.0,
            train_gate: true,
            fake_balanced_gate: false,
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
    /// Ranks that hold some of the experts each.
    #[module(skip)]
    pub(crate) expert_group: Option<Arc<dyn Group>>,
    /// Ranks that hold a part of F each.
    #[module(skip)]
    pub(crate) tensor_group: Option<Arc<dyn Group>>,
}

impl Moe {
    /// Takes router and experts from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(c: &TextConfig, options: MoeOptions, parameters: &Parameters) -> Result<Self> {
        let shared = c.moe_intermediate_size * c.n_shared_experts;
        Ok(Self {
            gate: Gate::new(c, options, &parameters.pp("gate"))?,
            experts: Experts::new(c, &parameters.pp("experts"))?,
            shared_experts: Mlp::new(c.hidden_size, shared, c.hidden_act, &parameters.pp("shared_experts"))?,
            expert_group: None,
            tensor_group: None,
        })
    }

    /// Packs dense weights for inference.
    pub(crate) fn pack(&mut self) {
        self.experts.pack();
        self.shared_experts.pack();
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`; `replay`: experts to send the tokens to, `[T, K]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        token_mask: Option<&[bool]>,
        replay: Option<&Tensor<2, Int>>,
    ) -> (Tensor<2>, Routing) {
        let routing = self.gate.forward(x.clone(), token_mask, replay);
        let x = copy_to_group(x, &self.tensor_group);
        let here = Routing {
            weights: copy_to_group(routing.weights.clone(), &self.tensor_group),
            ..routing.clone()
        };
        let routed = match &self.expert_group {
            Some(group) => expert_parallel::routed(&self.experts, group, x.clone(), &here),
            None => self.experts.forward(x.clone(), &here),
        };
        let y = ops::add(routed, self.shared_experts.forward(x));
        (reduce_from_group(y, &self.tensor_group), routing)
    }
}
