//! The decoder and the multimodal model around it.
//!
//! Tokens lie flat as `[T, D]` everywhere: a batch of rows is its rows one after the other, a packed batch its
//! sequences; which token sees which is said by segments alone (see [`crate::ops::AttentionSpec`]).

pub mod cache;
pub(crate) mod decode;
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
pub mod neftune;
pub mod norm;
pub mod parallel;
mod quantized;
pub mod replay;
pub mod rope;
pub mod text;
pub mod weight;

use burn::tensor::{Device, Tensor};
use mistral4_checkpoint::config::Config;

pub use self::gate::Routing;
pub use self::multimodal::Mistral3ForConditionalGeneration;
pub use self::parallel::ModelGroups;
pub use self::quantized::NamedQuantized;
pub use self::replay::RouterReplay;
pub use self::text::{Mistral4ForCausalLM, Mistral4Model};
use crate::error::{Error, Result};
use crate::inputs::{ForwardOptions, Layout, LogitsToKeep, ModelInputs};
use crate::model::cache::LatentCache;
use crate::model::moe::MoeOptions;
use crate::model::neftune::EmbeddingNoise;
use crate::weights::{ParameterSource, Parameters};

/// Tokens of a long prompt that are read at once.
pub const PREFILL_TOKENS: usize = 2048;

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

    /// Puts the decoder's bf16 weights into the order in which the CPU's products read them; elsewhere, and where the
    /// processor has no bf16 products, it changes nothing. For inference: packed weights are no parameters.
    pub fn pack(mut self) -> Self {
        let text = self.text_mut();
        text.model.layers.iter_mut().for_each(|layer| layer.pack());
        text.lm_head.weight.pack();
        self
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

    /// As [`Mistral4::forward`] with a cache, a long row in pieces of [`PREFILL_TOKENS`], so that activations take the
    /// memory of one piece. Hidden states and routing are those of the last piece.
    ///
    /// # Errors
    /// As [`Mistral4::forward`].
    pub fn prefill(
        &self,
        inputs: &ModelInputs,
        cache: &mut LatentCache,
        options: &ForwardOptions,
    ) -> Result<ModelOutput> {
        let is_padded = inputs.attention_mask.as_ref().is_some_and(|mask| mask.contains(&false));
        let keeps_last = matches!(options.logits_to_keep, LogitsToKeep::Last(1) | LogitsToKeep::Nothing);
        let sequence = match inputs.layout {
            Layout::Rows { batch: 1, sequence } if sequence > PREFILL_TOKENS && !is_padded && keeps_last => {
                sequence
            }
            _ => return self.forward(inputs, Some(cache), options),
        };
        let embeds = self.embed(inputs)?;
        let positions = inputs.positions(cache.len());
        let mut begin = 0;
        loop {
            let end = (begin + PREFILL_TOKENS).min(sequence);
            let piece = embeds.clone().slice_dim(0, begin..end);
            let layout = Layout::Rows { batch: 1, sequence: end - begin };
            let inputs = ModelInputs::embeddings(piece.clone(), layout)
                .with_position_ids(positions[begin..end].to_vec());
            if end == sequence {
                return self.text().forward_embeds(piece, &inputs, Some(cache), options);
            }
            let silent = ForwardOptions { logits_to_keep: LogitsToKeep::Nothing, ..Default::default() };
            self.text().forward_embeds(piece, &inputs, Some(&mut *cache), &silent)?;
            begin = end;
        }
    }

    /// As [`Mistral4::embed`], with noise on the embeddings of the text's tokens.
    ///
    /// # Errors
    /// As [`Mistral4::embed`].
    pub fn embed_with_noise(&self, inputs: &ModelInputs, noise: &EmbeddingNoise) -> Result<Tensor<2>> {
        let embeds = self.embed(inputs)?;
        let image_token = match (self, &inputs.images) {
            (Mistral4::Multimodal(model), Some(_)) => Some(model.image_token_index),
            _ => None,
        };
        Ok(noise.add(embeds, inputs, image_token))
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
