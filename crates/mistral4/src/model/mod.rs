//! The decoder and the multimodal model around it.
//!
//! Tokens lie flat as `[T, D]` everywhere: a batch of rows is its rows one after the other, a packed batch its
//! sequences; which token sees which is said by segments alone (see [`crate::ops::AttentionSpec`]).

pub mod cache;
pub mod decoder_layer;
pub mod dropout;
mod expert_parallel;
pub mod experts;
pub mod gate;
pub mod linear;
pub mod lora;
pub mod mla;
pub mod mlp;
pub mod moe;
pub mod multimodal;
pub mod norm;
pub mod parallel;
mod quantized;
pub mod rope;
pub mod text;
pub mod weight;

use burn::tensor::{Device, Tensor};
use mistral4_checkpoint::config::Config;

pub use self::gate::Routing;
pub use self::multimodal::Mistral3ForConditionalGeneration;
pub use self::parallel::ModelGroups;
pub use self::quantized::NamedQuantized;
pub use self::text::{Mistral4ForCausalLM, Mistral4Model};
use crate::error::{Error, Result};
use crate::inputs::{ForwardOptions, ModelInputs};
use crate::model::cache::LatentCache;
use crate::model::moe::MoeOptions;
use crate::weights::{ParameterSource, Parameters};

/// A Mistral 4 model, with or without eyes.
#[derive(Debug, Clone)]
pub enum Mistral4 {
    /// Text only.
    Text(Box<Mistral4ForCausalLM>),
    /// Text behind a vision tower and a projector.
    Multimodal(Box<Mistral3ForConditionalGeneration>),
}

/// What a forward pass returns.
#[derive(Debug, Clone)]
pub struct ModelOutput {
    /// `[kept tokens, V]`; absent when none were asked for.
    pub logits: Option<Tensor<2>>,
    /// After the final norm, `[T, D]`.
    pub last_hidden_state: Tensor<2>,
    /// The input of each layer and, last, the state after the final norm; empty unless asked for.
    pub hidden_states: Vec<Tensor<2>>,
    /// The routing of each mixture layer, with the layer's index; empty unless asked for.
    pub routing: Vec<(usize, Routing)>,
}

impl Mistral4 {
    /// Builds the model that `config` describes, each parameter taken from `source`.
    ///
    /// # Errors
    /// Whatever the source reports, for example a missing or mis-shaped tensor.
    pub fn new(
        config: &Config,
        moe: MoeOptions,
        source: &dyn ParameterSource,
        device: &Device,
    ) -> Result<Self> {
        let parameters = Parameters::new(source, device);
        Ok(match &config.vision {
            None => Mistral4::Text(Box::new(Mistral4ForCausalLM::new(config, moe, &parameters)?)),
            Some(_) => Mistral4::Multimodal(Box::new(Mistral3ForConditionalGeneration::new(
                config,
                moe,
                &parameters,
            )?)),
        })
    }

    /// Whether `config.json` describes a model that this library runs: its text part must be `mistral4`.
    pub fn supports_config(config: &serde_json::Value) -> bool {
        mistral4_checkpoint::config::supports_config(config)
    }

    /// The decoder with its head.
    pub fn text(&self) -> &Mistral4ForCausalLM {
        match self {
            Mistral4::Text(text) => text,
            Mistral4::Multimodal(model) => &model.language_model,
        }
    }

    /// Mutable access to the decoder with its head.
    pub fn text_mut(&mut self) -> &mut Mistral4ForCausalLM {
        match self {
            Mistral4::Text(text) => text,
            Mistral4::Multimodal(model) => &mut model.language_model,
        }
    }

    /// The input of the first layer: token embeddings with image features in place.
    ///
    /// # Shapes
    /// - output: `[T, D]`
    ///
    /// # Errors
    /// Inputs that contradict each other or the model, named.
    pub fn embed(&self, inputs: &ModelInputs) -> Result<Tensor<2>> {
        let text = self.text();
        inputs.check(text.vocab_size())?;
        match (self, &inputs.images) {
            (Mistral4::Multimodal(model), Some(images)) => model.embed(inputs, images),
            (Mistral4::Text(_), Some(_)) => Err(Error::NoVision),
            (_, None) => Ok(text.model.embed(inputs)),
        }
    }

    /// Runs the model.
    ///
    /// # Errors
    /// Inputs that contradict each other or the model, named.
    pub fn forward(
        &self,
        inputs: &ModelInputs,
        cache: Option<&mut LatentCache>,
        options: &ForwardOptions,
    ) -> Result<ModelOutput> {
        let embeds = self.embed(inputs)?;
        self.text().forward_embeds(embeds, inputs, cache, options)
    }
}
