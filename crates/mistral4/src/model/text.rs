//! The decoder and its head.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, TensorData};
use mistral4_checkpoint::config::Config;

use crate::error::{Error, Result};
use crate::inputs::{ForwardOptions, Layout, LogitsToKeep, ModelInputs};
use crate::model::ModelOutput;
use crate::model::cache::LatentCache;
use crate::model::decoder_layer::{DecoderLayer, FeedForward, LayerContext};
use crate::model::linear::Linear;
use crate::model::mla::{AttentionMask, dense_causal_mask};
use crate::model::moe::MoeOptions;
use crate::model::norm::RmsNorm;
use crate::model::rope::RotaryEmbedding;
use crate::weights::Parameters;

/// Token embeddings.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[V, D]`
    pub weight: Param<Tensor<2>>,
}

/// The decoder without its head.
#[derive(Module, Debug)]
pub struct Mistral4Model {
    /// `[V, D]`
    pub embed_tokens: Embedding,
    /// The layers.
    pub layers: Vec<DecoderLayer>,
    /// The final norm.
    pub norm: RmsNorm,
    /// Token whose embedding is not trained.
    pub padding_idx: Option<u32>,
    #[module(skip)]
    pub(crate) rotary: RotaryEmbedding,
}

/// The decoder with its head.
#[derive(Module, Debug)]
pub struct Mistral4ForCausalLM {
    /// The decoder.
    pub model: Mistral4Model,
    /// `[V, D]`
    pub lm_head: Linear,
}

impl Mistral4Model {
    /// Takes the decoder from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(config: &Config, moe: MoeOptions, parameters: &Parameters) -> Result<Self> {
        let c = &config.text;
        let layers = parameters.pp("layers");
        let layer = |i: usize| DecoderLayer::new(config, moe.clone(), i, &layers.pp(i));
        Ok(Self {
            embed_tokens: Embedding {
                weight: parameters.pp("embed_tokens").get("weight", [c.vocab_size, c.hidden_size])?,
            },
            layers: (0..c.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::new(c.hidden_size, c.rms_norm_eps, &parameters.pp("norm"))?,
            padding_idx: c.pad_token_id,
            rotary: RotaryEmbedding::new(c),
        })
    }

    /// Token embeddings, or the embeddings that were given.
    ///
    /// # Shapes
    /// - output: `[T, D]`
    pub fn embed(&self, inputs: &ModelInputs) -> Tensor<2> {
        match (&inputs.inputs_embeds, &inputs.input_ids) {
            (Some(embeds), _) => embeds.clone(),
            (None, Some(ids)) => self.embed_ids(ids),
            (None, None) => unreachable!("inputs were checked"),
        }
    }

    /// Embeddings of token ids.
    ///
    /// # Shapes
    /// - `ids`: `[T]`, output: `[T, D]`
    pub fn embed_ids(&self, ids: &[u32]) -> Tensor<2> {
        let table = self.embed_tokens.weight.val();
        let device = table.device().without_autodiff();
        let count = ids.len();
        let index = TensorData::new(ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>(), [count]);
        let embeds = table.select(0, Tensor::<1, Int>::from_data(index, &device));
        let is_padding = |id: &u32| self.padding_idx == Some(*id);
        if !embeds.is_tracked() || !ids.iter().any(is_padding) {
            return embeds;
        }
        // The padding token's embedding is not trained, as in torch's `nn.Embedding` with `padding_idx`.
        let trained: Vec<f32> = ids.iter().map(|id| if is_padding(id) { 0.0 } else { 1.0 }).collect();
        let trained =
            Tensor::<2>::from_data(TensorData::new(trained, [count, 1]), &device).cast(embeds.dtype());
        embeds.clone().detach() * (trained.clone().neg() + 1.0) + embeds * trained
    }

    /// Positions, masks and tables of a pass that begins or continues `cache`.
    ///
    /// # Errors
    /// Inputs that do not continue the cache.
    pub fn context(&self, inputs: &ModelInputs, cache: Option<&mut LatentCache>) -> Result<LayerContext> {
        let device = self.embed_tokens.weight.val().device().without_autodiff();
        let past = cache.as_ref().map_or(0, |cache| cache.len());
        let rotary = self.rotary.tables(&inputs.positions(past), &device);
        let mask = match (cache, &inputs.explicit_mask, &inputs.layout) {
            (Some(cache), ..) => {
                cache.begin(inputs, self.layers.len())?;
                let Layout::Rows { sequence, .. } = inputs.layout else { unreachable!("begin() wants rows") };
                AttentionMask::Cached(cache.mask(sequence))
            }
            (None, Some(mask), _) => AttentionMask::Explicit(Box::new(mask.clone())),
            (None, None, layout) => match (inputs.segments(), layout, &inputs.attention_mask) {
                (Some(segments), ..) => AttentionMask::Segments(segments),
                (None, &Layout::Rows { batch, sequence }, Some(mask)) => {
                    AttentionMask::Explicit(Box::new(dense_causal_mask(mask, batch, sequence, &device)))
                }
                _ => unreachable!("only masks with holes have no segments"),
            },
        };
        let token_mask = inputs.attention_mask.clone().filter(|mask| mask.contains(&false));
        Ok(LayerContext { rotary, mask, token_mask, output_routing: true })
    }

    /// Adds `factor * sign(mean load - load)` to each layer's `e_score_correction_bias`.
    ///
    /// `loads` holds `(layer, tokens of each expert)`, summed over everything since the last update.
    ///
    /// Source: Wang et al. 2024 (auxiliary-loss-free load balancing); `Gate.update_bias` in NeMo AutoModel.
    pub fn update_moe_gate_bias(&mut self, loads: &[(usize, Vec<u64>)], factor: f64) {
        if factor == 0.0 {
            return;
        }
        for (layer, load) in loads {
            let FeedForward::Moe(moe) = &mut self.layers[*layer].mlp else { continue };
            if moe.gate.e_score_correction_bias.dims() == [0] {
                // The layer belongs to another stage.
                continue;
            }
            let mean = load.iter().sum::<u64>() as f64 / load.len() as f64;
            let step = |&l: &u64| {
                let under = mean - l as f64;
                if under == 0.0 { 0.0 } else { (factor * under.signum()) as f32 }
            };
            let step: Vec<f32> = load.iter().map(step).collect();
            let bias = moe.gate.e_score_correction_bias.clone();
            moe.gate.e_score_correction_bias = bias.map(|bias| {
                let step = TensorData::new(step, [load.len()]);
                let step = Tensor::from_data(step, (&bias.device(), bias.dtype()));
                (bias + step).detach().set_require_grad(false)
            });
        }
    }
}

impl Mistral4ForCausalLM {
    /// Takes the decoder and its head from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(config: &Config, moe: MoeOptions, parameters: &Parameters) -> Result<Self> {
        let c = &config.text;
        Ok(Self {
            model: Mistral4Model::new(config, moe, &parameters.pp("model"))?,
            lm_head: Linear::new(c.hidden_size, c.vocab_size, false, &parameters.pp("lm_head"))?,
        })
    }

    /// Entries of the embedding table.
    pub fn vocab_size(&self) -> usize {
        self.model.embed_tokens.weight.dims()[0]
    }

    /// Runs the layers over embeddings and the head over the positions asked for.
    ///
    /// # Shapes
    /// - `embeds`: `[T, D]`
    ///
    /// # Errors
    /// Inputs that do not continue the cache, positions outside the rows, or a replay of another pass.
    pub fn forward_embeds(
        &self,
        embeds: Tensor<2>,
        inputs: &ModelInputs,
        mut cache: Option<&mut LatentCache>,
        options: &ForwardOptions,
    ) -> Result<ModelOutput> {
        let mut context = self.model.context(inputs, cache.as_deref_mut())?;
        context.output_routing = options.output_routing;
        let replay = options.router_replay.as_ref();
        if let Some(replay) = replay {
            replay.check(&self.model, 0..self.model.layers.len(), inputs.layout.tokens())?;
        }
        let kept = kept_rows(&inputs.layout, &options.logits_to_keep)?;
        let mut output = ModelOutput {
            logits: None,
            last_hidden_state: embeds,
            hidden_states: Vec::new(),
            routing: Vec::new(),
        };
        let mut x = output.last_hidden_state;
        for (index, layer) in self.model.layers.iter().enumerate() {
            if options.output_hidden_states {
                output.hidden_states.push(x.clone());
            }
            let cache = cache.as_deref_mut().map(|cache| cache.layer(index));
            let replay = replay.and_then(|replay| replay.layer(index));
            let (y, routing) = layer.forward(x, &context, cache, replay);
            x = y;
            if let Some(routing) = routing.filter(|_| options.output_routing) {
                output.routing.push((index, routing));
            }
        }
        if let (Some(cache), Layout::Rows { sequence, .. }) = (cache, &inputs.layout) {
            cache.advance(*sequence);
        }
        x = self.model.norm.forward(x);
        if options.output_hidden_states {
            output.hidden_states.push(x.clone());
        }
        output.logits = match kept {
            None => Some(self.lm_head.forward(x.clone())),
            Some(rows) if rows.is_empty() => None,
            Some(rows) => {
                let count = rows.len();
                let rows = TensorData::new(rows, [count]);
                let rows = Tensor::<1, Int>::from_data(rows, &x.device().without_autodiff());
                Some(self.lm_head.forward(x.clone().select(0, rows)))
            }
        };
        output.last_hidden_state = x;
        Ok(output)
    }
}

/// Token rows whose logits are wanted; `None`: all.
fn kept_rows(layout: &Layout, keep: &LogitsToKeep) -> Result<Option<Vec<i64>>> {
    let (rows, length) = match layout {
        Layout::Rows { batch, sequence } => (*batch, *sequence),
        packed => (1, packed.tokens()),
    };
    let in_row: Vec<usize> = match keep {
        LogitsToKeep::All | LogitsToKeep::Last(0) => return Ok(None),
        LogitsToKeep::Nothing => return Ok(Some(Vec::new())),
        LogitsToKeep::Last(n) => (length.saturating_sub(*n)..length).collect(),
        LogitsToKeep::Indices(indices) => indices.clone(),
    };
    if let Some((index, &value)) = in_row.iter().enumerate().find(|&(_, &i)| i >= length) {
        let (value, allowed) = (value as i64, format!("0..{length} (tokens of a row)"));
        return Err(Error::Range { name: "logits_to_keep", value, index, allowed });
    }
    Ok(Some((0..rows).flat_map(|row| in_row.iter().map(move |i| (row * length + i) as i64)).collect()))
}
