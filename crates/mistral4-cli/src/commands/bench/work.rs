//! What one repetition does, and how much work that is.

use std::collections::BTreeMap;

use burn::tensor::Device;
use mistral4::generate::Decoder;
use mistral4::inputs::LogitsToKeep;
use mistral4::{ForwardOptions, LatentCache, Mistral4, ModelInputs};
use mistral4_checkpoint::config::{Config, TextConfig};
use mistral4_checkpoint::weights::names::{self, TensorKind};
use mistral4_checkpoint::weights::{WeightFormat, WeightQuantization};
use mistral4_train::backward::{
    Activations, Gradients, LabelledInputs, LossScale, forward_backward_for, update_in_backward,
};
use mistral4_train::optim::{Optimizer, StepFactors};
use mistral4_train::recipe::{OptimizerConfig, StateDtype};

use super::{BenchArguments, Mode};
use crate::error::Result;

/// The work of one repetition.
pub(super) struct Work {
    mode: Mode,
    batch: usize,
    sequence: usize,
    new_tokens: usize,
    seed: u64,
    state_dtype: StateDtype,
    master_weights: bool,
    optimizer_in_bwd: bool,
    text: TextConfig,
    /// Values of the weights by what is done with them, embeddings left out.
    weights: BTreeMap<Use, f64>,
    /// Their bytes.
    bytes: BTreeMap<Use, f64>,
}

/// What a weight is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    /// Every token is multiplied with it.
    EveryToken,
    /// Positions with logits are multiplied with it.
    Head,
    /// The tokens that are sent to it are multiplied with it.
    Routed,
}

impl Work {
    pub(super) fn new(
        arguments: &BenchArguments,
        config: &Config,
        quantization: Option<WeightQuantization>,
    ) -> Self {
        let dense = if arguments.dtype.name() == "f32" { 4.0 } else { 2.0 };
        let (mut weights, mut bytes) = (BTreeMap::new(), BTreeMap::new());
        for spec in names::tensors(config) {
            let place = match spec.kind {
                TensorKind::Embedding | TensorKind::GateBias => continue,
                TensorKind::LmHead => Use::Head,
                TensorKind::ExpertsGateUp | TensorKind::ExpertsDown => Use::Routed,
                _ => Use::EveryToken,
            };
            let values = spec.elements() as f64;
            let format = quantization.and_then(|quantization| quantization.of(&spec));
            *weights.entry(place).or_insert(0.0) += values;
            *bytes.entry(place).or_insert(0.0) += values * format.map_or(dense, bytes_of_value);
        }
        Work {
            mode: arguments.mode,
            batch: arguments.batch as usize,
            sequence: arguments.tokens as usize,
            new_tokens: arguments.new_tokens as usize,
            seed: arguments.seed,
            state_dtype: arguments.state_dtype.moments(),
            master_weights: !arguments.no_master_weights,
            optimizer_in_bwd: arguments.optimizer_in_bwd,
            text: config.text.clone(),
            weights,
            bytes,
        }
    }

    fn weights(&self, place: Use) -> f64 {
        self.weights.get(&place).copied().unwrap_or(0.0)
    }

    /// Tokens of a repetition.
    pub(super) fn tokens(&self) -> usize {
        self.batch * if self.mode == Mode::Decode { self.new_tokens } else { self.sequence }
    }

    /// Useful floating-point operations of a repetition.
    pub(super) fn flops(&self) -> f64 {
        let tokens = self.tokens() as f64;
        let (positions_with_logits, seen) = match self.mode {
            Mode::Prefill => (self.batch as f64, seen(0, self.sequence)),
            Mode::Decode => (tokens, seen(self.sequence, self.new_tokens)),
            Mode::Train => (tokens, seen(0, self.sequence)),
        };
        let text = &self.text;
        let routed =
            self.weights(Use::Routed) * text.num_experts_per_tok as f64 / text.n_routed_experts as f64;
        let products = tokens * (self.weights(Use::EveryToken) + routed)
            + positions_with_logits * self.weights(Use::Head);
        let head = (text.qk_head_dim() + text.v_head_dim) as f64;
        let attention =
            self.batch as f64 * seen * (text.num_hidden_layers * text.num_attention_heads) as f64 * head;
        let forward = 2.0 * (products + attention);
        if self.mode == Mode::Train { 3.0 * forward } else { forward }
    }

    /// Bytes of weights that the steps of a repetition have to read.
    pub(super) fn weight_bytes(&self) -> f64 {
        let share = self.text.num_experts_per_tok as f64 / self.text.n_routed_experts as f64;
        let reached = 1.0 - (1.0 - share).powi(self.batch as i32);
        let bytes = |place| self.bytes.get(&place).copied().unwrap_or(0.0);
        let step = bytes(Use::EveryToken) + bytes(Use::Head) + reached * bytes(Use::Routed);
        step * self.new_tokens as f64
    }

    /// Random but reproducible token ids.
    fn ids(&self, count: usize) -> Vec<u32> {
        let vocab = self.text.vocab_size as u64;
        // SplitMix64, which is enough to spread tokens over experts.
        let id = |index: u64| {
            let mut z = self.seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) % vocab) as u32
        };
        (0..count as u64).map(id).collect()
    }

    /// Something that does the work with a model.
    pub(super) fn runner(&self, model: Mistral4, device: Device) -> Runner<'_> {
        let config = OptimizerConfig {
            lr: 1e-4,
            betas: [0.9, 0.95],
            state_dtype: self.state_dtype,
            master_weights: self.master_weights,
            ..OptimizerConfig::default()
        };
        let optimizer = Optimizer::new(config);
        let cache = LatentCache::new();
        Runner { work: self, model: Some(model), device, optimizer, cache, decoder: None }
    }
}

/// Bytes of a quantised value with its share of scale and zero point.
fn bytes_of_value(format: WeightFormat) -> f64 {
    match format {
        WeightFormat::Int { bits, group_size, symmetric } => {
            let group = if symmetric { 2.0 } else { 3.0 };
            bits.count() as f64 / 8.0 + group / group_size as f64
        }
        WeightFormat::Fp8 => 1.0,
    }
}

/// Positions that `count` tokens after `past` see together: each sees those before it and itself.
fn seen(past: usize, count: usize) -> f64 {
    let (past, count) = (past as f64, count as f64);
    count * past + count * (count + 1.0) / 2.0
}

const MODEL_IS_BACK: &str = "the model is back after every step";

/// Does the work.
pub(super) struct Runner<'a> {
    work: &'a Work,
    /// Present except while the optimizer moves it.
    model: Option<Mistral4>,
    device: Device,
    optimizer: Optimizer,
    cache: LatentCache,
    /// What decodes a single row, where the model is fit for it.
    decoder: Option<Decoder>,
}

impl Runner<'_> {
    /// What a repetition needs and is not timed: in decode, the prompt.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.cache = LatentCache::new();
        if self.work.mode == Mode::Decode {
            self.prefill()?;
            let model = self.model.as_ref().expect(MODEL_IS_BACK);
            self.decoder = Decoder::take_over(model, &mut self.cache, self.work.new_tokens);
        }
        Ok(())
    }

    /// One repetition, to its end on the device.
    pub(super) fn run(&mut self) -> Result<()> {
        match self.work.mode {
            Mode::Prefill => self.prefill(),
            Mode::Decode => {
                let ids = self.work.ids(self.work.batch * self.work.new_tokens);
                if let Some(decoder) = &mut self.decoder {
                    let positions = self.work.sequence as i64..;
                    return Ok(ids
                        .into_iter()
                        .zip(positions)
                        .try_for_each(|(id, position)| decoder.step(id, position).map(|_| ()))?);
                }
                ids.chunks_exact(self.work.batch).try_for_each(|ids| self.pass(ids.to_vec()))
            }
            Mode::Train => self.train(),
        }
    }

    fn prefill(&mut self) -> Result<()> {
        self.pass(self.work.ids(self.work.batch * self.work.sequence))
    }

    fn pass(&mut self, ids: Vec<u32>) -> Result<()> {
        let options = ForwardOptions { logits_to_keep: LogitsToKeep::Last(1), ..Default::default() };
        let inputs = ModelInputs::rows(ids, self.work.batch);
        let model = self.model.as_ref().expect(MODEL_IS_BACK);
        let output = model.prefill(&inputs, &mut self.cache, &options)?;
        // Reading the logits waits for the device, as choosing a token would.
        output.logits.expect("the last position's logits were asked for").into_data();
        Ok(())
    }

    fn train(&mut self) -> Result<()> {
        let model = self.model.take().expect(MODEL_IS_BACK);
        let ids = self.work.ids(self.work.batch * self.work.sequence);
        let labels: Vec<i64> = ids.iter().skip(1).chain(ids.first()).map(|&id| i64::from(id)).collect();
        let scale = LossScale { per_token: 1.0 / labels.len() as f64, z_loss: 0.0, aux: 0.0 };
        let batch = LabelledInputs::plain(ModelInputs::rows(ids, self.work.batch), labels);
        let factors = StepFactors { lr: 1e-4, weight_decay: 0.01, grad_scale: 1.0 };
        let optimizer = &mut self.optimizer;
        let model = if self.work.optimizer_in_bwd {
            update_in_backward(model, &batch, scale, Activations::Kept, optimizer, factors)?.0
        } else {
            let mut gradients = Gradients::default();
            forward_backward_for(optimizer, &model, &batch, scale, Activations::Kept, &mut gradients)?;
            optimizer.step(model, gradients, factors)
        };
        self.model = Some(model);
        // An accelerator that fails while it works says so here.
        self.device.sync().map_err(|error| {
            crate::error::Error::failed(
                format!("the device failed: {error}"),
                "try a smaller --batch or --tokens, or another --device",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_counted() {
        assert_eq!(seen(0, 3), 6.0);
        assert_eq!(seen(10, 2), 23.0);
    }
}
