//! What a run writes while it goes: metrics, the load of its experts, TensorBoard events, its status.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mistral4::Mistral4;
use mistral4::checkpoint::config::TextConfig;
use mistral4::checkpoint::weights::DType;
use serde_json::{Map, Value};

use crate::backward::MicroBatchLoss;
use crate::data::Batch;
use crate::error::Result;
use crate::metrics::{
    ExpertLoad, LayerLoad, MetricsFile, RunState, RunStatus, StepMetrics, ValidationMetrics,
};
use crate::recipe::Recipe;
use crate::tensorboard::EventFile;

/// The files of a run that grow from step to step.
pub(super) struct Recorder {
    folder: PathBuf,
    status: RunStatus,
    steps: MetricsFile,
    load: MetricsFile,
    load_every: usize,
    events: Option<EventFile>,
}

impl Recorder {
    /// Opens the files of a run that goes on at `first_step`.
    pub(super) fn open(recipe: &Recipe, first_step: usize, status: RunStatus) -> Result<Self> {
        let folder = recipe.checkpoint.checkpoint_dir.clone();
        let events = recipe.tensorboard.as_ref().map(|tensorboard| {
            let log_dir = tensorboard.log_dir.clone().unwrap_or_else(|| folder.join("tensorboard"));
            EventFile::create(&log_dir, first_step)
        });
        let steps = MetricsFile::open(&folder.join("training.jsonl"), first_step)?;
        status.write(&folder)?;
        Ok(Self {
            status,
            steps,
            load: MetricsFile::open(&folder.join("expert_load.jsonl"), first_step)?,
            load_every: recipe.expert_load_every_steps,
            events: events.transpose()?,
            folder,
        })
    }

    /// Writes what a step measured.
    pub(super) fn step(&mut self, metrics: &StepMetrics, loads: &[(usize, Vec<u64>)]) -> Result<()> {
        self.steps.write(metrics)?;
        if metrics.step.is_multiple_of(self.load_every) && !loads.is_empty() {
            let layers =
                loads.iter().map(|(layer, tokens)| LayerLoad { layer: *layer, tokens: tokens.clone() });
            self.load.write(&ExpertLoad { step: metrics.step, layers: layers.collect() })?;
        }
        if let Some(events) = &mut self.events {
            let numbers = numbers(metrics, "train/");
            events.scalars(metrics.step, numbers.iter().map(|(tag, value)| (tag.as_str(), *value)))?;
        }
        Ok(())
    }

    /// Writes what a validation measured to TensorBoard; its JSON lines go to a file of the set.
    pub(super) fn validation(&mut self, name: &str, metrics: &ValidationMetrics) -> Result<()> {
        let Some(events) = &mut self.events else { return Ok(()) };
        let tag = |what: &str| format!("validation/{name}/{what}");
        let (loss, accuracy) = (tag("val_loss"), tag("accuracy"));
        let values =
            [(loss.as_str(), metrics.val_loss), (accuracy.as_str(), metrics.accuracy.unwrap_or(f64::NAN))];
        events.scalars(metrics.step, values)
    }

    /// Brings the lines to the medium.
    pub(super) fn sync(&self) -> Result<()> {
        self.steps.sync()?;
        self.load.sync()
    }

    /// Says how the run ended.
    pub(super) fn end(&mut self, state: RunState, message: Option<String>) -> Result<()> {
        self.status = RunStatus { state, message, ..self.status.clone() };
        self.status.write(&self.folder)
    }
}

/// Notes in the run's folder that it ended with an error, unless it never began.
pub(super) fn note_failure(folder: &Path, error: &crate::Error) {
    if let Ok(Some(status)) = RunStatus::read(folder)
        && status.state == RunState::Running
    {
        // The error itself is what the caller reports; a folder that cannot be written does not hide it.
        let _ =
            RunStatus { state: RunState::Failed, message: Some(error.to_string()), ..status }.write(folder);
    }
}

/// Every number of a record by its key.
fn numbers(metrics: &StepMetrics, prefix: &str) -> BTreeMap<String, f64> {
    let Ok(Value::Object(fields)) = serde_json::to_value(metrics) else { return BTreeMap::new() };
    let number = |(key, value): (String, Value)| Some((format!("{prefix}{key}"), value.as_f64()?));
    fields.into_iter().filter(|(key, _)| key != "step").filter_map(number).collect()
}

/// How evenly the experts were used: over layers, the mean entropy of their load (1: even) and the worst ratio of the
/// fullest expert to the mean. No token is ever dropped.
pub(super) fn load_metrics(measured: &MicroBatchLoss) -> Map<String, Value> {
    let mut more = Map::new();
    let layers: Vec<&Vec<u64>> =
        measured.loads.iter().map(|(_, load)| load).filter(|load| load.iter().sum::<u64>() > 0).collect();
    if layers.is_empty() {
        return more;
    }
    let entropy = |load: &&Vec<u64>| {
        let total = load.iter().sum::<u64>() as f64;
        let shares = load.iter().filter(|&&l| l > 0).map(|&l| l as f64 / total);
        -shares.map(|p| p * p.ln()).sum::<f64>() / (load.len().max(2) as f64).ln()
    };
    let fullest = |load: &&Vec<u64>| {
        let mean = load.iter().sum::<u64>() as f64 / load.len() as f64;
        load.iter().copied().max().unwrap_or(0) as f64 / mean
    };
    let mean_entropy = layers.iter().map(entropy).sum::<f64>() / layers.len() as f64;
    more.insert("expert_load_entropy".into(), mean_entropy.into());
    more.insert("expert_load_max_over_mean".into(), layers.iter().map(fullest).fold(0.0, f64::max).into());
    more.insert("dropped".into(), 0.into());
    more
}

/// The parts of the loss that join the cross entropy, those that there are: the routers' summed over layers, coefficients
/// included.
pub(super) fn loss_metrics(measured: &MicroBatchLoss, label_tokens: usize) -> Map<String, Value> {
    let parts = [
        ("z_loss", measured.z_loss / label_tokens.max(1) as f64),
        ("aux_loss", measured.aux_loss),
        ("router_z_loss", measured.router_z_loss),
    ];
    parts.into_iter().filter(|(_, loss)| *loss > 0.0).map(|(key, loss)| (key.into(), loss.into())).collect()
}

/// Floating-point operations that a step needs, and the most that the device does a second.
pub(super) struct Utilization {
    /// For each token.
    per_token: f64,
    /// For each token with a label.
    per_label: f64,
    /// For each pair of tokens of which one sees the other.
    per_pair: f64,
    peak: f64,
}

impl Utilization {
    /// Takes the peak from the recipe, or measures that of the CPU; `None` where there is neither.
    ///
    /// A weight costs 2 operations a token forward, 2 for the gradient of its input and, where it is trained, 2 for its
    /// own; of routed experts those count that a token is sent to, and of the vision tower nothing.
    pub(super) fn new(
        recipe: &Recipe,
        model: &Mistral4,
        text: &TextConfig,
        dtype: DType,
        is_cpu: bool,
    ) -> Option<Self> {
        let peak = match recipe.peak_tflops {
            Some(teraflops) => teraflops * 1e12,
            None if is_cpu => measured_peak(dtype),
            None => return None,
        };
        let share = text.num_experts_per_tok as f64 / text.n_routed_experts.max(1) as f64;
        let (mut per_token, mut per_label) = (0.0, 0.0);
        for parameter in model.parameters() {
            let key = &parameter.key;
            let elements = parameter.shape.iter().product::<usize>() as f64;
            let cost = elements * if parameter.trainable { 6.0 } else { 4.0 };
            let is_other =
                ["vision_tower.", "multi_modal_projector."].iter().any(|part| key.starts_with(part));
            if is_other || key.ends_with("embed_tokens.weight") || key.ends_with("e_score_correction_bias") {
                continue;
            }
            if key.contains("lm_head.") {
                per_label += cost;
            } else {
                per_token += cost * if key.contains(".experts.") { share } else { 1.0 };
            }
        }
        let head = (text.qk_head_dim() + text.v_head_dim) as f64;
        let per_pair = 6.0 * (text.num_hidden_layers * text.num_attention_heads) as f64 * head;
        Some(Self { per_token, per_label, per_pair, peak })
    }

    /// Operations of a step.
    pub(super) fn flops(&self, batches: &[Batch]) -> f64 {
        let sum = |count: &dyn Fn(&Batch) -> usize| batches.iter().map(count).sum::<usize>() as f64;
        self.per_token * sum(&|batch| batch.num_tokens)
            + self.per_label * sum(&|batch| batch.num_label_tokens)
            + self.per_pair * sum(&Batch::attended_pairs)
    }

    /// The share of the peak that so many operations in so many seconds are.
    pub(super) fn mfu(&self, flops: f64, seconds: f64) -> f64 {
        flops / seconds / self.peak
    }
}

/// The peak of this machine's CPU, measured once a process.
fn measured_peak(dtype: DType) -> f64 {
    static PEAKS: [OnceLock<f64>; 2] = [OnceLock::new(), OnceLock::new()];
    let gigaflops = match dtype {
        DType::F32 => PEAKS[0].get_or_init(mistral4_kernels::peak_f32_gflops),
        _ => PEAKS[1].get_or_init(mistral4_kernels::peak_bf16_gflops),
    };
    gigaflops * 1e9
}
