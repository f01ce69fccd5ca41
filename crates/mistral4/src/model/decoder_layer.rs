//! One decoder layer.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use mistral4_checkpoint::config::Config;

use crate::error::Result;
use crate::model::cache::LayerCache;
use crate::model::decode::DecodeWeights;
use crate::model::gate::Routing;
use crate::model::mla::{AttentionMask, Mla};
use crate::model::mlp::Mlp;
use crate::model::moe::{Moe, MoeOptions};
use crate::model::norm::RmsNorm;
use crate::model::rope::RotaryTables;
use crate::ops;
use crate::weights::Parameters;

/// Attention and feed-forward, each normed before and added to the residual stream after.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// `[D]`
    pub input_layernorm: RmsNorm,
    /// Multi-head latent attention.
    pub self_attn: Mla,
    /// `[D]`
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward.
    pub mlp: FeedForward,
    /// All of them once more, for one token at a time; only where they are frozen.
    #[module(skip)]
    pub(crate) decode: Option<DecodeWeights>,
}

/// The feed-forward of a layer: dense in the first `first_k_dense_replace` layers, a mixture in the others.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a model holds few layers, each boxed by its Vec already")]
pub enum FeedForward {
    /// One dense feed-forward.
    Dense(Mlp),
    /// Routed and shared experts.
    Moe(Moe),
}

/// What all layers of a forward pass share.
#[derive(Debug, Clone)]
pub struct LayerContext {
    /// Cos, sin and query scale.
    pub rotary: RotaryTables,
    /// Who sees whom.
    pub mask: AttentionMask,
    /// `[T]`, false for padding; `None`: no padding.
    pub token_mask: Option<Vec<bool>>,
    /// Whether the caller asks where tokens were routed to.
    pub output_routing: bool,
}

impl DecoderLayer {
    /// Takes layer `index` from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(config: &Config, moe: MoeOptions, index: usize, parameters: &Parameters) -> Result<Self> {
        let c = &config.text;
        let norm = |name| RmsNorm::new(c.hidden_size, c.rms_norm_eps, &parameters.pp(name));
        let mlp = parameters.pp("mlp");
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Mla::new(config, &parameters.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: if index < c.first_k_dense_replace {
                FeedForward::Dense(Mlp::new(c.hidden_size, c.intermediate_size, c.hidden_act, &mlp)?)
            } else {
                FeedForward::Moe(Moe::new(c, moe, &mlp)?)
            },
            decode: None,
        })
    }

    /// Packs dense weights for inference.
    pub(crate) fn pack(&mut self) {
        self.self_attn.pack();
        match &mut self.mlp {
            FeedForward::Dense(mlp) => mlp.pack(),
            FeedForward::Moe(moe) => moe.pack(),
        }
        self.decode = self.decode_weights();
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`, with the routing if the layer has experts
    /// - `replay`: experts to send the tokens to, in place of the router's choice, `[T, K]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        context: &LayerContext,
        cache: Option<&mut LayerCache>,
        replay: Option<&Tensor<2, Int>>,
    ) -> (Tensor<2>, Option<Routing>) {
        let attended = self.self_attn.forward(
            self.input_layernorm.forward(x.clone()),
            &context.rotary,
            &context.mask,
            cache,
        );
        let x = ops::add(x, attended);
        let normed = self.post_attention_layernorm.forward(x.clone());
        match &self.mlp {
            FeedForward::Dense(mlp) => (ops::add(x, mlp.forward(normed)), None),
            FeedForward::Moe(moe) => {
                let (y, routing) = moe.forward(normed, context.token_mask.as_deref(), replay);
                (ops::add(x, y), Some(routing))
            }
        }
    }
}
