//! Recipes: YAML files in NeMo AutoModel's section names, read into typed settings.
//!
//! A recipe is parsed strictly (an unknown key is an error with the nearest known one), and every key that it sets is
//! listed in a [`RecipeReport`] with what it does here. Settings that NeMo AutoModel knows and this build cannot
//! honour parse, but [`Recipe::check_runnable`] refuses them by name, so that none is ever left out silently.
//!
//! Source: NVIDIA NeMo AutoModel, `components/config`, `recipes/_typed_config.py` and its example recipes.

mod checkpoint;
mod dataset;
mod environment;
mod image_questions;
mod kind;
mod missing;
mod model;
mod optimizer;
mod overrides;
mod packing;
mod peft;
mod quantization;
mod reader;
mod report;
mod schema;
mod training;
mod watching;
mod yaml;

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

pub use checkpoint::{CheckpointConfig, RestoreFrom};
pub use dataset::{
    ChatDatasetConfig, DataloaderConfig, DatasetConfig, DatasetSection, DigitsTask, InstructionDatasetConfig,
    OnError, Split, TextDatasetConfig, TokenizerSource,
};
pub use image_questions::ImageQuestionsConfig;
pub use model::{
    DistributedConfig, FreezeConfig, ModelConfig, ModelSource, PipelineConfig, SoftmaxScaleOverride,
    Strategy, TorchDtype,
};
pub use optimizer::{AdjustLr, MuonConfig, NewtonSchulzDtype, OptimizerConfig, OptimizerKind, StateDtype};
pub use overrides::{Override, parse_overrides};
pub use packing::PackedSequenceConfig;
pub use peft::PeftConfig;
pub use report::{Effect, RecipeReport, ReportEntry};
pub use schema::{json_schema, to_json};
pub use training::{
    LrDecayStyle, LrSchedulerConfig, OnLossSpike, OnNonFinite, RngConfig, StepSchedulerConfig, WdIncrStyle,
    WsdDecayStyle,
};

pub use watching::{EarlyStoppingConfig, TensorBoardConfig};

use mistral4_checkpoint::weights::WeightQuantization;

use crate::error::{Error, Result};
use reader::{Reading, Section};

/// What a recipe trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecipeKind {
    /// Text: `TrainFinetuneRecipeForNextTokenPrediction`.
    NextTokenPrediction,
    /// Images and text: `FinetuneRecipeForVLM`.
    Vlm,
    /// A measured run: `BenchmarkingRecipeForNextTokenPrediction`.
    Benchmark,
}

/// One validation set.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidationSet {
    /// `default`, or what follows `validation_dataset_` in the section's name.
    pub name: String,
    /// Its data.
    pub dataset: DatasetSection,
}

/// A whole recipe, read and checked.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// What is trained.
    pub kind: RecipeKind,
    /// Batch sizes and length of the run.
    pub step_scheduler: StepSchedulerConfig,
    /// Seed.
    pub rng: RngConfig,
    /// Weights.
    pub model: ModelConfig,
    /// Saving.
    pub checkpoint: CheckpointConfig,
    /// How ranks share the work, and activation checkpointing.
    pub distributed: DistributedConfig,
    /// Parts that keep their weights.
    pub freeze_config: FreezeConfig,
    /// Coefficient of the mean squared log-sum-exp of the labelled tokens' logits.
    pub z_loss: f64,
    /// Size of the noise on the embeddings of training steps; `None`: none.
    pub neftune_alpha: Option<f64>,
    /// Largest L2 norm of the gradient; `None`: no clipping.
    pub max_grad_norm: Option<f64>,
    /// Training data.
    pub dataset: DatasetSection,
    /// Order and batching of the training data.
    pub dataloader: DataloaderConfig,
    /// Held-out data.
    pub validation: Vec<ValidationSet>,
    /// Order and batching of the held-out data.
    pub validation_dataloader: DataloaderConfig,
    /// Packing of the training data; `None`: rows are padded.
    pub packed_sequence: Option<PackedSequenceConfig>,
    /// Update rule.
    pub optimizer: OptimizerConfig,
    /// Whether each layer's parameters move as soon as its gradient is final.
    pub optimizer_in_bwd: bool,
    /// Schedule of the learning rate; `None`: it stays at `optimizer.lr`.
    pub lr_scheduler: Option<LrSchedulerConfig>,
    /// When the run ends before its last step; `None`: never.
    pub early_stopping: Option<EarlyStoppingConfig>,
    /// TensorBoard event files; `None`: none are written.
    pub tensorboard: Option<TensorBoardConfig>,
    /// Peak of the device in 10^12 floating-point operations a second; `None`: that of the CPU is measured.
    pub peak_tflops: Option<f64>,
    /// Steps between two records of every expert's load.
    pub expert_load_every_steps: usize,
    /// Adapters.
    pub peft: Option<PeftConfig>,
    /// How the base stays quantised in memory under them.
    pub quantization: Option<WeightQuantization>,
    /// What each key does here.
    pub report: RecipeReport,
    /// The recipe with its overrides, variables as written.
    text: String,
}

impl Recipe {
    /// Reads a recipe file and applies overrides.
    ///
    /// # Errors
    /// A file that cannot be read, that is not YAML, or that is not a recipe: always with file, line and key.
    pub fn load(path: &Path, overrides: &[Override]) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&path.display().to_string(), &bytes, overrides, &|name| std::env::var(name).ok())
    }

    /// Reads a recipe from bytes; `variables` looks up environment variables.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(
        name: &str,
        bytes: &[u8],
        overrides: &[Override],
        variables: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let file: Arc<str> = Arc::from(name);
        let mut root = yaml::parse(&file, bytes)?;
        for change in overrides {
            overrides::apply(&mut root, change)?;
        }
        let text = yaml::write(&root);
        environment::expand(&file, &mut root, variables)?;
        let reading = Reading { file, report: RefCell::default(), asked: None };
        let mut recipe = read(Section::root(&reading, &root))?;
        recipe.report = reading.report.into_inner();
        recipe.text = text;
        recipe.check_consistency()?;
        Ok(recipe)
    }

    /// Refuses settings that this build cannot honour, on whatever machine.
    ///
    /// # Errors
    /// [`Error::NotRunnable`] with every such setting and its reason.
    pub fn check_runnable(&self) -> Result<()> {
        self.report.check_runnable()
    }

    /// The recipe as YAML with its overrides applied; environment variables stay as placeholders.
    pub fn to_yaml(&self) -> &str {
        &self.text
    }

    /// Micro-batches of one optimizer step on one rank.
    pub fn grad_acc_steps(&self) -> usize {
        self.step_scheduler.global_batch_size / self.step_scheduler.local_batch_size
    }

    /// Refuses settings that contradict each other.
    fn check_consistency(&self) -> Result<()> {
        if self.peft.is_some() && self.model.gate_bias_update_factor > 0.0 {
            return Err(Error::Inconsistent {
                key: "model.gate_bias_update_factor".to_owned(),
                value: self.model.gate_bias_update_factor.to_string(),
                message: "the router's bias is no part of an adapter; with `peft` it must be 0".to_owned(),
            });
        }
        if self.peft.is_none() && self.quantization.is_some() {
            return Err(Error::Inconsistent {
                key: "quantization".to_owned(),
                value: "set".to_owned(),
                message: "quantised weights cannot be trained themselves; add a `peft` section".to_owned(),
            });
        }
        if self.peft.is_some() && matches!(self.dataset.tokenizer, TokenizerSource::Learned { .. }) {
            return Err(Error::Inconsistent {
                key: "dataset.tokenizer".to_owned(),
                value: "learned".to_owned(),
                message:
                    "adapters belong to a model that has a tokenizer; leave this out, or name its folder"
                        .to_owned(),
            });
        }
        let StepSchedulerConfig { global_batch_size: global, local_batch_size: local, .. } =
            self.step_scheduler;
        if !global.is_multiple_of(local) {
            return Err(Error::Inconsistent {
                key: "step_scheduler.global_batch_size".to_owned(),
                value: global.to_string(),
                message: format!(
                    "must be divisible by local_batch_size * data-parallel ranks ({local} * 1); {} would do",
                    match global / local {
                        0 => local.to_string(),
                        below => format!("{} or {}", below * local, (below + 1) * local),
                    }
                ),
            });
        }
        self.check_optimizer_in_bwd()?;
        let key = &self.checkpoint.best_metric_key;
        if self.validation.len() > 1 && key != "default" && self.validation.iter().all(|set| set.name != *key)
        {
            let names: Vec<&str> = self.validation.iter().map(|set| set.name.as_str()).collect();
            return Err(Error::Inconsistent {
                key: "checkpoint.best_metric_key".to_owned(),
                value: key.clone(),
                message: format!("no held-out set has this name; there are {}", names.join(", ")),
            });
        }
        if let Some(early_stopping) = &self.early_stopping {
            let names: Vec<&str> = self.validation.iter().map(|set| set.name.as_str()).collect();
            let monitor = early_stopping.monitor.as_deref().unwrap_or(key);
            if names.is_empty()
                || (!names.contains(&monitor) && (names.len() > 1 || early_stopping.monitor.is_some()))
            {
                return Err(Error::Inconsistent {
                    key: "early_stopping.monitor".to_owned(),
                    value: monitor.to_owned(),
                    message: match names.is_empty() {
                        true => "there is no validation_dataset to watch".to_owned(),
                        false => format!("no held-out set has this name; there are {}", names.join(", ")),
                    },
                });
            }
        }
        for set in &self.validation {
            if ![&TokenizerSource::Model, &self.dataset.tokenizer].contains(&&set.dataset.tokenizer) {
                return Err(Error::Inconsistent {
                    key: match set.name.as_str() {
                        "default" => "validation_dataset.tokenizer".to_owned(),
                        name => format!("validation_dataset_{name}.tokenizer"),
                    },
                    value: match &set.dataset.tokenizer {
                        TokenizerSource::Path(path) => path.clone(),
                        TokenizerSource::Model | TokenizerSource::Learned { .. } => "learned".to_owned(),
                    },
                    message:
                        "held-out data is read with the tokenizer of the training data; leave this one out"
                            .to_owned(),
                });
            }
        }
        Ok(())
    }
}

impl Recipe {
    /// Parameters that move before the whole gradient is known leave no room for what needs to know it.
    fn check_optimizer_in_bwd(&self) -> Result<()> {
        let scheduler = &self.step_scheduler;
        let needs = [
            (
                self.max_grad_norm.is_none(),
                "no clip_grad_norm, which needs the norm of the whole gradient first",
            ),
            (
                self.grad_acc_steps() == 1,
                "one micro-batch a step: local_batch_size as large as global_batch_size",
            ),
            (
                self.dataloader.max_tokens_per_micro_batch.is_none(),
                "no dataloader.max_tokens_per_micro_batch, which may make several micro-batches of a step",
            ),
            (
                scheduler.on_non_finite == OnNonFinite::Stop && scheduler.on_loss_spike != OnLossSpike::Skip,
                "on_non_finite: stop and no on_loss_spike: skip, since a step that has begun cannot be skipped",
            ),
        ];
        let unmet = needs.iter().filter(|(met, _)| self.optimizer_in_bwd && !met).map(|need| need.1);
        match unmet.collect::<Vec<_>>() {
            unmet if unmet.is_empty() => Ok(()),
            unmet => Err(Error::Inconsistent {
                key: "optimizer_in_bwd".to_owned(),
                value: "true".to_owned(),
                message: format!("needs {}", unmet.join("; ")),
            }),
        }
    }
}

/// How sections of held-out sets begin, where there are several.
const NAMED_VALIDATION: &str = "validation_dataset_";

fn read(mut root: Section<'_>) -> Result<Recipe> {
    let kind = read_kind(&mut root)?;
    let step_scheduler = StepSchedulerConfig::read(&mut root)?;
    let rng = RngConfig::read(&mut root)?;
    let model = ModelConfig::read(&mut root, kind == RecipeKind::Vlm)?;
    let freeze_config = FreezeConfig::read(&mut root)?;
    let peft = PeftConfig::read(&mut root)?;
    let quantization = quantization::read(&mut root)?;
    let z_loss = training::read_loss(&mut root)?;
    let neftune_alpha = training::read_neftune(&mut root)?;
    let optimizer = OptimizerConfig::read(&mut root)?;
    let optimizer_in_bwd = root
        .bool(
            "optimizer_in_bwd",
            "moves each layer's parameters as soon as its gradient is final (torchtune's key)",
        )?
        .unwrap_or(false);
    let lr_scheduler = LrSchedulerConfig::read(&mut root)?;
    let max_grad_norm = training::read_clip(&mut root)?;
    let Some(dataset) = DatasetSection::read(&mut root, "dataset")? else {
        return Err(root.missing("dataset", "the training data"));
    };
    let dataloader = DataloaderConfig::read(&mut root, "dataloader", true)?;
    let packed_sequence = PackedSequenceConfig::read(&mut root)?;
    let mut validation = Vec::new();
    let named = root.keys().filter(|key| key.starts_with(NAMED_VALIDATION));
    for key in std::iter::once("validation_dataset").chain(named) {
        if let Some(dataset) = DatasetSection::read(&mut root, key)? {
            let name = key.strip_prefix(NAMED_VALIDATION).unwrap_or("default");
            validation.push(ValidationSet { name: name.to_owned(), dataset });
        }
    }
    let validation_dataloader = DataloaderConfig::read(&mut root, "validation_dataloader", false)?;
    let checkpoint = CheckpointConfig::read(&mut root)?;
    let distributed = DistributedConfig::read(&mut root)?;
    let early_stopping = EarlyStoppingConfig::read(&mut root)?;
    let tensorboard = TensorBoardConfig::read(&mut root)?;
    let peak_tflops = watching::read_mfu(&mut root)?;
    let expert_load_every_steps = watching::read_moe_metrics(&mut root)?;
    watching::read_remote_loggers(&mut root);
    read_others(&mut root)?;
    root.finish()?;
    Ok(Recipe {
        kind,
        step_scheduler,
        rng,
        model,
        checkpoint,
        distributed,
        freeze_config,
        z_loss,
        neftune_alpha,
        max_grad_norm,
        dataset,
        dataloader,
        validation,
        validation_dataloader,
        packed_sequence,
        optimizer,
        optimizer_in_bwd,
        lr_scheduler,
        early_stopping,
        tensorboard,
        peak_tflops,
        expert_load_every_steps,
        peft,
        quantization,
        report: RecipeReport::default(),
        text: String::new(),
    })
}

fn read_kind(root: &mut Section<'_>) -> Result<RecipeKind> {
    use RecipeKind::{Benchmark, NextTokenPrediction, Vlm};
    const NAMES: [(&str, RecipeKind); 7] = [
        ("TrainFinetuneRecipeForNextTokenPrediction", NextTokenPrediction),
        (
            "nemo_automodel.recipes.llm.train_ft.TrainFinetuneRecipeForNextTokenPrediction",
            NextTokenPrediction,
        ),
        ("FinetuneRecipeForVLM", Vlm),
        ("nemo_automodel.recipes.vlm.finetune.FinetuneRecipeForVLM", Vlm),
        ("BenchmarkingRecipeForNextTokenPrediction", Benchmark),
        ("nemo_automodel.recipes.llm.benchmark.BenchmarkingRecipeForNextTokenPrediction", Benchmark),
        ("nemo_automodel.recipes.vlm.benchmark.BenchmarkingRecipeForVLM", Benchmark),
    ];
    match root.name("recipe", "what is trained", &NAMES)? {
        Some(kind) => Ok(kind),
        None => Err(root.missing("recipe", "what is trained, such as FinetuneRecipeForVLM")),
    }
}

/// Sections that are valid in NeMo AutoModel and either change nothing here or are not supported.
fn read_others(root: &mut Section<'_>) -> Result<()> {
    root.no_effect("dist_env", "ranks are found by MPI");
    root.no_effect("compile", "the program is compiled already");
    root.no_effect("ci", "read by NeMo AutoModel's own test farm only");
    root.none_of_effect(&["nvtx", "prewarm", "profiling"], "for profiling on NVIDIA GPUs");
    root.no_effect("sdpa_method", "there is one attention");
    root.no_effect("benchmark", "`mistral4 bench` measures; a recipe trains");
    root.no_effect("processor", "the checkpoint's own image processor is used");
    root.unsupported("qat", "quantisation-aware training is not supported");
    root.unsupported("tool_call_eval", "tool calls are not evaluated");
    root.unsupported("embedding_row_repair", "the checkpoint's embeddings are trained as they are");
    let mut fp8 = root.section("fp8")?;
    fp8.unsupported("enabled", "FP8 compute is not supported");
    fp8.none_of_effect(
        &[
            "recipe_name",
            "enable_fsdp_float8_all_gather",
            "precompute_float8_dynamic_scale_for_fsdp",
            "force_recompute_fp8_weight_in_bwd",
            "filter_fqns",
            "emulate",
        ],
        "read only with fp8.enabled",
    );
    fp8.finish()
}
