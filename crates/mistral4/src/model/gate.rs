//! The router: which experts a token goes to, with which weights, and how evenly experts are used.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor, TensorData, activation::softmax};
use mistral4_checkpoint::config::TextConfig;
use mistral4_kernels as kernels;

use crate::error::Result;
use crate::model::moe::MoeOptions;
use crate::ops::{self, RouterDims, composite};
use crate::weights::Parameters;

/// The router of one mixture layer, in f32 whatever the model's dtype.
///
/// Source: `Mistral4TopkRouter` in transformers, `Gate` (`softmax_with_bias`) in NeMo AutoModel.
#[derive(Module, Debug)]
pub struct Gate {
    /// `[E, D]`
    pub weight: Param<Tensor<2>>,
    /// Added to the scores for the choice alone, `[E]` f32; moved by balancing, not by gradients.
    pub e_score_correction_bias: Param<Tensor<1>>,
    #[module(skip)]
    spec: GateSpec,
}

#[derive(Debug, Clone)]
struct GateSpec {
    experts: usize,
    top_k: usize,
    n_group: usize,
    topk_group: usize,
    norm_topk_prob: bool,
    routed_scaling_factor: f64,
    options: MoeOptions,
}

/// Where the tokens of one layer went.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Chosen experts, `[T, K]`.
    pub indices: Tensor<2, Int>,
    /// Their weights, `[T, K]` f32.
    pub weights: Tensor<2>,
    /// Tokens sent to each expert, padding excluded, `[E]`.
    pub load: Vec<u64>,
    /// Load-balancing loss, `[1]`, if `aux_loss_coeff` is above 0: already multiplied by it.
    pub aux_loss: Option<Tensor<1>>,
    /// Mean squared log-sum-exp of the tokens' logits, `[1]`, if `router_z_loss_coeff` is above 0: already multiplied by
    /// it.
    pub z_loss: Option<Tensor<1>>,
}

impl Gate {
    /// Takes `weight` and `e_score_correction_bias` from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(config: &TextConfig, options: MoeOptions, parameters: &Parameters) -> Result<Self> {
        let experts = config.n_routed_experts;
        let weight = parameters.get("weight", [experts, config.hidden_size])?;
        Ok(Self {
            weight: if options.train_gate { weight } else { weight.set_require_grad(false) },
            e_score_correction_bias: parameters
                .get_f32("e_score_correction_bias", [experts])?
                .set_require_grad(false),
            spec: GateSpec {
                experts,
                top_k: config.num_experts_per_tok,
                n_group: config.n_group,
                topk_group: config.topk_group,
                norm_topk_prob: config.norm_topk_prob,
                routed_scaling_factor: config.routed_scaling_factor,
                options,
            },
        })
    }

    /// Sizes and rules of routing `tokens` tokens.
    pub(super) fn dims(&self, tokens: usize) -> RouterDims {
        self.spec.dims(tokens)
    }

    /// Whether tokens go to experts in turn.
    pub(super) fn is_fake_balanced(&self) -> bool {
        self.spec.options.fake_balanced_gate
    }

    /// Experts, and how many of them a token goes to.
    pub(super) fn choices(&self) -> (usize, usize) {
        (self.spec.experts, self.spec.top_k)
    }

    /// Routes tokens, to the experts of `replay` where it is given.
    ///
    /// # Shapes
    /// - `x`: `[T, D]`; `token_mask`: `[T]`, false for padding, which counts in no statistic; `replay`: `[T, K]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        token_mask: Option<&[bool]>,
        replay: Option<&Tensor<2, Int>>,
    ) -> Routing {
        let spec = &self.spec;
        let tokens = x.dims()[0];
        let dims = spec.dims(tokens);
        let device = x.device().without_autodiff();
        let logits = ops::linear_f32(x, self.weight.val());

        let chosen = if let Some(indices) = replay {
            int_values(indices.clone())
        } else if spec.options.fake_balanced_gate {
            spec.balanced_choice(tokens)
        } else {
            let bias = self.e_score_correction_bias.val();
            choice(dims, &f32_values(logits.clone().inner()), &f32_values(bias.inner()))
        };
        let load = spec.load(&chosen, token_mask);
        let indices = Tensor::<2, Int>::from_data(TensorData::new(chosen, [tokens, spec.top_k]), &device);

        // A single weight is 1 whatever its score; the quotient's gradient would be rounding noise around 0.
        let is_constant = spec.norm_topk_prob && spec.top_k == 1;
        let weighed = if is_constant { logits.clone().detach() } else { logits.clone() };
        let weights = ops::routing_weights(weighed, indices.clone(), dims);
        let aux_loss = (spec.options.aux_loss_coeff > 0.0).then(|| {
            spec.load_balancing_loss(logits.clone(), &load, token_mask) * spec.options.aux_loss_coeff
        });
        let z_loss = (spec.options.router_z_loss_coeff > 0.0)
            .then(|| spec.z_loss(logits, token_mask) * spec.options.router_z_loss_coeff);
        Routing { indices, weights, load, aux_loss, z_loss }
    }
}

impl GateSpec {
    fn dims(&self, tokens: usize) -> RouterDims {
        RouterDims {
            tokens,
            experts: self.experts,
            top_k: self.top_k,
            n_group: self.n_group,
            topk_group: self.topk_group,
            norm_topk_prob: self.norm_topk_prob,
            routed_scaling_factor: self.routed_scaling_factor as f32,
        }
    }

    /// Experts in turn, so that each gets the same number of tokens: for measuring speed without routing luck.
    fn balanced_choice(&self, tokens: usize) -> Vec<i32> {
        (0..tokens * self.top_k).map(|slot| (slot % self.experts) as i32).collect()
    }

    /// Tokens sent to each expert, padding excluded.
    fn load(&self, chosen: &[i32], token_mask: Option<&[bool]>) -> Vec<u64> {
        let mut load = vec![0; self.experts];
        for (token, experts) in chosen.chunks_exact(self.top_k).enumerate() {
            if token_mask.is_none_or(|mask| mask[token]) {
                experts.iter().for_each(|&e| load[e as usize] += 1);
            }
        }
        load
    }

    /// `E * sum_e f_e p_e`, with `f_e` the share of choices that fell on expert `e` and `p_e` its mean score.
    ///
    /// Source: Fedus et al. 2021 (Switch Transformers), equation 4, as `Gate._compute_aux_loss` in NeMo AutoModel.
    fn load_balancing_loss(&self, logits: Tensor<2>, load: &[u64], token_mask: Option<&[bool]>) -> Tensor<1> {
        let scores = softmax(logits, 1);
        let [tokens, experts] = scores.dims();
        let device = scores.device().without_autodiff();
        let counted = token_mask.map_or(tokens, |mask| mask.iter().filter(|&&m| m).count()).max(1);
        let scores = match token_mask {
            Some(mask) => {
                let mask: Vec<f32> = mask.iter().map(|&m| f32::from(u8::from(m))).collect();
                scores * Tensor::<2>::from_data(TensorData::new(mask, [tokens, 1]), (&device, DType::F32))
            }
            None => scores,
        };
        let share = experts as f32 / (counted * self.top_k) as f32;
        let frequency: Vec<f32> = load.iter().map(|&l| l as f32 * share).collect();
        let frequency =
            Tensor::<2>::from_data(TensorData::new(frequency, [1, experts]), (&device, DType::F32));
        (scores.sum_dim(0) / counted as f64 * frequency).sum()
    }

    /// The mean over tokens, padding excluded, of the squared log-sum-exp of their logits.
    ///
    /// Source: Zoph et al. 2022 (ST-MoE), equation 5.
    fn z_loss(&self, logits: Tensor<2>, token_mask: Option<&[bool]>) -> Tensor<1> {
        let [tokens, _] = logits.dims();
        let device = logits.device().without_autodiff();
        let square = composite::log_sum_exp(logits).square();
        let Some(mask) = token_mask else { return square.mean() };
        let counted = mask.iter().filter(|&&m| m).count().max(1);
        let mask: Vec<f32> = mask.iter().map(|&m| f32::from(u8::from(m))).collect();
        let mask = Tensor::<1>::from_data(TensorData::new(mask, [tokens]), (&device, DType::F32));
        (square * mask).sum() / counted as f64
    }
}

pub(super) fn int_values<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i32> {
    tensor.into_data_as::<i32>().try_into_vec::<i32>().expect("the tensor was just converted to i32")
}

/// The experts of each token, best first, `[T * K]`.
fn choice(dims: RouterDims, logits: &[f32], bias: &[f32]) -> Vec<i32> {
    let mut indices = vec![0; dims.tokens * dims.top_k];
    kernels::choose_experts(dims, logits, bias, &mut indices);
    indices
}

fn f32_values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data_as::<f32>().try_into_vec::<f32>().expect("the tensor was just converted to f32")
}
