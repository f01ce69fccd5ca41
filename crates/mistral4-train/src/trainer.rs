//! The training loop.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use mistral4::model::Mistral4;
use mistral4_checkpoint::config::ConfigForm;
use mistral4_checkpoint::weights::{SaveDType, SaveOptions};

use crate::backward::{
    Activations, Gradients, LabelledInputs, LossScale, MicroBatchLoss, evaluate, forward_backward,
};
use crate::data::{self, Batch, Loader, LoaderOptions};
use crate::error::{Error, Result};
use crate::metrics::{MetricsFile, StepMetrics, ValidationMetrics, peak_memory_gib, timestamp};
use crate::optim::{Optimizer, StepFactors};
use crate::plot::RunPlot;
use crate::recipe::Recipe;
use crate::schedule::{LrSchedule, StepScheduler, StepState};
use crate::setup::Setup;

/// What happens during a run, as it happens.
#[derive(Debug)]
pub enum Event<'a> {
    /// Everything is read; so many steps will follow.
    Started {
        /// Optimizer steps of the run.
        total_steps: usize,
        /// Parameters that are trained, and all.
        parameters: (usize, usize),
    },
    /// A step was taken.
    Step(&'a StepMetrics),
    /// A held-out set was measured.
    Validation {
        /// Name of the set.
        name: &'a str,
        /// What was measured.
        metrics: &'a ValidationMetrics,
    },
    /// A checkpoint was written.
    Saved(&'a Path),
    /// Something the user should know.
    Note(String),
}

/// A run that has ended.
pub struct Run {
    /// The trained model.
    pub model: Mistral4,
    /// Model, tokenizer and data as they were set up.
    pub setup: Setup,
    /// The last checkpoint, if any was written.
    pub checkpoint: Option<PathBuf>,
    /// Every step.
    pub steps: Vec<StepMetrics>,
    /// Every validation of the first held-out set.
    pub validations: Vec<ValidationMetrics>,
    /// The picture of the loss.
    pub picture: PathBuf,
    /// Whether it was asked to stop early.
    pub interrupted: bool,
}

struct HeldOut {
    name: String,
    loader: Loader,
    file: MetricsFile,
}

/// Runs a recipe to its end, or until `interrupted` is set: then the step under way is finished and saved.
///
/// Order of a step: backward over its micro-batches, clipping, optimizer, gate bias, learning rate.
///
/// # Errors
/// Whatever is wrong with the recipe's files, a loss that is no number, or a disk that fails.
pub fn run(
    recipe: &Recipe,
    device: &Device,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Run> {
    recipe.check_runnable()?;
    let folder = &recipe.checkpoint.checkpoint_dir;
    std::fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.clone(), source })?;
    let mut setup = Setup::new(recipe, device)?;
    let context = setup.data_context(recipe.rng.seed);
    let pad_id = setup.pad_id();
    let dataset = data::open(&recipe.dataset, &context)?;
    let mut loader = Loader::new(dataset, LoaderOptions::training(recipe, pad_id))?;
    note_skipped(&loader, observe);
    let mut held_out = Vec::new();
    for set in &recipe.validation {
        let dataset = data::open(&set.dataset, &context)?;
        let options = LoaderOptions::validation(recipe, &set.dataset, pad_id);
        let file = if set.name == "default" { "validation".into() } else { format!("validation_{}", set.name) };
        held_out.push(HeldOut {
            name: set.name.clone(),
            loader: Loader::new(dataset, options)?,
            file: MetricsFile::open(&folder.join(format!("{file}.jsonl")), 0)?,
        });
    }
    let mut scheduler = StepScheduler::new(&recipe.step_scheduler, loader.batches_per_epoch(), 1)?;
    let schedule = LrSchedule::new(recipe.lr_scheduler.as_ref(), &recipe.optimizer, scheduler.total_steps())?;
    let mut optimizer = Optimizer::new(recipe.optimizer.clone());
    let mut log = MetricsFile::open(&folder.join("training.jsonl"), 0)?;
    let activations = match recipe.distributed.activation_checkpointing {
        true => Activations::Recomputed,
        false => Activations::Kept,
    };

    let mut model = setup.model.clone();
    observe(Event::Started { total_steps: scheduler.total_steps(), parameters: count(&model) });
    let (mut steps, mut validations, mut checkpoint) = (Vec::new(), Vec::new(), None);
    let mut stopped = false;
    while !scheduler.is_finished() && !stopped {
        let started = Instant::now();
        let StepState { step, epoch } = scheduler.state();
        let next = loader.next_step(scheduler.grad_acc_steps())?;
        let (label_tokens, tokens, ends_epoch) = (next.num_label_tokens(), next.num_tokens(), next.ends_epoch);

        let mut gradients = Gradients::default();
        let measured = accumulate(&model, next.batches, label_tokens, activations, &mut gradients, device)?;
        let grad_norm = gradients.norm();
        let loss = measured.loss_sum / label_tokens.max(1) as f64;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::NotFinite { step, loss, grad_norm });
        }
        let factors = StepFactors {
            lr: schedule.lr(step),
            weight_decay: schedule.wd(step),
            grad_scale: clip_coefficient(grad_norm, recipe.max_grad_norm),
        };
        model = optimizer.step(model, gradients, factors);
        let factor = recipe.model.gate_bias_update_factor;
        model.text_mut().model.update_moe_gate_bias(&measured.loads, factor);

        let tps = tokens as f64 / started.elapsed().as_secs_f64();
        let metrics = StepMetrics {
            step,
            epoch,
            timestamp: timestamp(),
            loss,
            grad_norm,
            lr: factors.lr,
            mem: peak_memory_gib(),
            tps,
            tps_per_gpu: tps,
            num_tokens_per_step: tokens,
            num_label_tokens: label_tokens,
            more: load_metrics(&measured),
        };
        log.write(&metrics)?;
        observe(Event::Step(&metrics));
        steps.push(metrics);

        stopped = interrupted.load(Ordering::Relaxed);
        let validates = scheduler.is_val_step(ends_epoch) && !stopped;
        let saves = scheduler.is_ckpt_step(ends_epoch) || stopped;
        if validates {
            for (index, set) in held_out.iter_mut().enumerate() {
                let metrics = validate(&model, set, (step, epoch), factors.lr, device)?;
                observe(Event::Validation { name: &set.name, metrics: &metrics });
                if index == 0 {
                    validations.push(metrics);
                }
            }
        }
        if saves && recipe.checkpoint.enabled {
            let path = folder.join(format!("epoch_{epoch}_step_{step}"));
            save(&model, &setup, &path, recipe)?;
            point_latest(folder, &path)?;
            observe(Event::Saved(&path));
            checkpoint = Some(path);
        }
        scheduler.advance(ends_epoch);
    }
    let picture = folder.join("loss.svg");
    let title = folder.file_name().map_or_else(|| "training".into(), |name| name.to_string_lossy());
    let subtitle = subtitle(&steps, &model);
    RunPlot { title: &title, subtitle: &subtitle, steps: &steps, validations: &validations }.write(&picture)?;
    setup.model = model.clone();
    Ok(Run { model, setup, checkpoint, steps, validations, picture, interrupted: stopped })
}

/// Forward and backward over the micro-batches of one step.
fn accumulate(
    model: &Mistral4,
    batches: Vec<Batch>,
    label_tokens: usize,
    activations: Activations,
    gradients: &mut Gradients,
    device: &Device,
) -> Result<MicroBatchLoss> {
    let scale = LossScale { per_token: 1.0 / label_tokens.max(1) as f64, aux: 1.0 / batches.len().max(1) as f64 };
    let mut sum = MicroBatchLoss::default();
    for batch in batches {
        let part = forward_backward(model, &LabelledInputs::new(batch, device), scale, activations, gradients)?;
        sum.loss_sum += part.loss_sum;
        sum.aux_loss += part.aux_loss * scale.aux;
        if sum.loads.is_empty() {
            sum.loads = part.loads;
            continue;
        }
        for ((_, sum), (_, part)) in sum.loads.iter_mut().zip(part.loads) {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }
    Ok(sum)
}

/// The factor that brings the gradient's norm down to `max_norm`.
///
/// Source: `torch.nn.utils.clip_grad_norm_`.
fn clip_coefficient(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
}

/// How evenly the experts were used: over layers, the mean entropy of their load (1: even) and the worst ratio of the
/// fullest expert to the mean.
fn load_metrics(measured: &MicroBatchLoss) -> serde_json::Map<String, serde_json::Value> {
    let mut more = serde_json::Map::new();
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
    if measured.aux_loss > 0.0 {
        more.insert("aux_loss".into(), measured.aux_loss.into());
    }
    more
}

/// The token-mean loss over a held-out set.
fn validate(
    model: &Mistral4,
    set: &mut HeldOut,
    (step, epoch): (usize, usize),
    lr: f64,
    device: &Device,
) -> Result<ValidationMetrics> {
    let (mut loss, mut tokens) = (0.0, 0);
    while let Some(batch) = set.loader.next_batch()? {
        tokens += batch.num_label_tokens;
        loss += evaluate(model, &LabelledInputs::new(batch, device))?;
    }
    let metrics = ValidationMetrics {
        step,
        epoch,
        timestamp: timestamp(),
        val_loss: loss / tokens.max(1) as f64,
        lr,
        num_label_tokens: tokens,
        mem: peak_memory_gib(),
        accuracy: None,
    };
    set.file.write(&metrics)?;
    Ok(metrics)
}

/// Writes `model/consolidated` (a Hugging Face folder) and `config.yaml` (the recipe) under `path`.
fn save(model: &Mistral4, setup: &Setup, path: &Path, recipe: &Recipe) -> Result<()> {
    let folder = path.join("model").join("consolidated");
    std::fs::create_dir_all(&folder).map_err(|source| Error::Write { path: folder.clone(), source })?;
    let options = SaveOptions {
        dtype: SaveDType::Float(setup.dtype),
        form: ConfigForm::Hf,
        carry_from: setup.carry_from.as_deref(),
        ..SaveOptions::default()
    };
    model.save(&folder, &setup.config, &options)?;
    let yaml = path.join("config.yaml");
    std::fs::write(&yaml, recipe.to_yaml()).map_err(|source| Error::Write { path: yaml, source })
}

/// Points `LATEST` in the run's folder at a checkpoint, in one rename.
fn point_latest(folder: &Path, checkpoint: &Path) -> Result<()> {
    let name = checkpoint.file_name().expect("checkpoints have names");
    let (latest, fresh) = (folder.join("LATEST"), folder.join(".LATEST.new"));
    let failed = |source| Error::Write { path: latest.clone(), source };
    if fresh.symlink_metadata().is_ok() {
        std::fs::remove_file(&fresh).map_err(failed)?;
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(name, &fresh).map_err(failed)?;
    #[cfg(not(unix))]
    std::fs::write(&fresh, name.to_string_lossy().as_bytes()).map_err(failed)?;
    std::fs::rename(&fresh, &latest).map_err(failed)
}

fn count(model: &Mistral4) -> (usize, usize) {
    let parameters = model.parameters();
    let elements = |p: &mistral4::weights::NamedTensor| p.shape.iter().product::<usize>();
    (parameters.iter().filter(|p| p.trainable).map(elements).sum(), parameters.iter().map(elements).sum())
}

fn subtitle(steps: &[StepMetrics], model: &Mistral4) -> String {
    let tokens: usize = steps.iter().map(|step| step.num_tokens_per_step).sum();
    let seconds: f64 = steps.iter().map(|step| step.num_tokens_per_step as f64 / step.tps).sum();
    let millions = count(model).1 as f64 / 1e6;
    format!("{millions:.2} M parameters, {} steps, {tokens} tokens in {seconds:.0} s", steps.len())
}

fn note_skipped(loader: &Loader, observe: &mut dyn FnMut(Event<'_>)) {
    let skipped = loader.skipped();
    if skipped.unusable + skipped.too_long > 0 {
        let first = skipped.messages.first().map_or(String::new(), |m| format!("; first: {m}"));
        observe(Event::Note(format!(
            "left out {} malformed rows and {} that are too long{first}",
            skipped.unusable, skipped.too_long
        )));
    }
}
