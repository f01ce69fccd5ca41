//! The training loop.

mod measure;
mod start;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use mistral4::model::Mistral4;

use crate::backward::{Activations, Gradients, LabelledInputs, LossScale, MicroBatchLoss, forward_backward};
use crate::checkpoint::{Completed, Disk, Losses, ModelFiles, Saver, Snapshot};
use crate::data::{Batch, Loader};
use crate::error::Result;
use crate::guard::{BatchLoss, Guard, StepOutcome, Verdict};
use crate::metrics::{MetricsFile, StepMetrics, ValidationMetrics, peak_memory_gib, timestamp};
use crate::optim::{Optimizer, StepFactors};
use crate::plot::RunPlot;
use crate::recipe::Recipe;
use crate::schedule::{LrSchedule, StepScheduler, StepState};
use crate::setup::Setup;
use measure::{count, load_metrics, subtitle, validate};

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
    /// The last checkpoint, if there is any.
    pub checkpoint: Option<PathBuf>,
    /// Every step, those before a resumption included.
    pub steps: Vec<StepMetrics>,
    /// Every validation of the first held-out set, those before a resumption included.
    pub validations: Vec<ValidationMetrics>,
    /// The picture of the loss.
    pub picture: PathBuf,
    /// Whether it was asked to stop early.
    pub interrupted: bool,
}

/// A held-out set.
struct HeldOut {
    name: String,
    loader: Loader,
    file: MetricsFile,
}

/// A run under way: everything that a step reads or changes.
struct Training {
    /// The model is here, and is replaced at every step.
    setup: Setup,
    optimizer: Optimizer,
    loader: Loader,
    held_out: Vec<HeldOut>,
    scheduler: StepScheduler,
    schedule: LrSchedule,
    guard: Guard,
    log: MetricsFile,
    saver: Saver,
    steps: Vec<StepMetrics>,
    validations: Vec<ValidationMetrics>,
    /// The last complete checkpoint.
    checkpoint: Option<PathBuf>,
}

/// Runs a recipe to its end, or until `interrupted` is set: then the step under way is finished and saved.
///
/// A run whose folder holds checkpoints goes on from the last one, as if it had never stopped.
///
/// Order of a step: backward over its micro-batches, clipping, optimizer, gate bias, learning rate.
///
/// # Errors
/// Whatever is wrong with the recipe's files or the checkpoint to go on from, a loss that is no number, or a disk that
/// fails.
pub fn run(
    recipe: &Recipe,
    device: &Device,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Run> {
    run_on(Disk::default(), recipe, device, interrupted, observe)
}

/// As [`run`], with checkpoints saved to `disk`.
///
/// # Errors
/// As [`run`].
pub fn run_on(
    disk: Disk,
    recipe: &Recipe,
    device: &Device,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Run> {
    recipe.check_runnable()?;
    let mut t = Training::start(disk, recipe, device, observe)?;
    let total_steps = t.scheduler.total_steps();
    observe(Event::Started { total_steps, parameters: count(&t.setup.model) });
    let activations = match recipe.distributed.activation_checkpointing {
        true => Activations::Recomputed,
        false => Activations::Kept,
    };
    let mut stopped = false;
    while !t.scheduler.is_finished() && !stopped {
        let started = Instant::now();
        let at = t.scheduler.state();
        let next = t.loader.next_step(t.scheduler.grad_acc_steps())?;
        let (label_tokens, tokens, ends_epoch) =
            (next.num_label_tokens(), next.num_tokens(), next.ends_epoch);

        let mut gradients = Gradients::default();
        let (measured, batches) =
            accumulate(&t.setup.model, next.batches, label_tokens, activations, &mut gradients, device)?;
        let loss = measured.loss_sum / label_tokens.max(1) as f64;
        let grad_norm = gradients.norm();
        let verdict = t.guard.judge(&StepOutcome { step: at.step, loss, grad_norm, batches: &batches })?;
        if let Verdict::Report(message) | Verdict::Skip(_, message) = &verdict {
            observe(Event::Note(message.clone()));
        }
        let factors = StepFactors {
            lr: t.schedule.lr(at.step),
            weight_decay: t.schedule.wd(at.step),
            grad_scale: clip_coefficient(grad_norm, recipe.max_grad_norm),
        };
        let mut more = load_metrics(&measured);
        if let Verdict::Skip(reason, _) = verdict {
            more.insert("skipped".into(), reason.into());
            more.insert("skipped_steps".into(), t.guard.state().skipped_steps.into());
        } else {
            t.setup.model = t.optimizer.step(t.setup.model, gradients, factors);
            let factor = recipe.model.gate_bias_update_factor;
            t.setup.model.text_mut().model.update_moe_gate_bias(&measured.loads, factor);
        }

        let tps = tokens as f64 / started.elapsed().as_secs_f64();
        let metrics = StepMetrics {
            step: at.step,
            epoch: at.epoch,
            timestamp: timestamp(),
            loss,
            grad_norm,
            lr: factors.lr,
            mem: peak_memory_gib(),
            tps,
            tps_per_gpu: tps,
            num_tokens_per_step: tokens,
            num_label_tokens: label_tokens,
            more,
        };
        t.log.write(&metrics)?;
        observe(Event::Step(&metrics));
        t.steps.push(metrics);

        stopped = interrupted.load(Ordering::Relaxed);
        let validates = t.scheduler.is_val_step(ends_epoch) && !stopped;
        let saves = t.scheduler.is_ckpt_step(ends_epoch) || stopped;
        t.scheduler.advance(ends_epoch);
        let held_out = if validates { t.validate(at, factors.lr, device, observe)? } else { Vec::new() };
        if saves && recipe.checkpoint.enabled {
            t.save(at, recipe, Losses::new(loss, &held_out), observe)?;
        }
    }
    t.finish(recipe, stopped, observe)
}

impl Training {
    /// Measures every held-out set; returns names and losses.
    fn validate(
        &mut self,
        at: StepState,
        lr: f64,
        device: &Device,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<(String, f64)>> {
        let mut losses = Vec::with_capacity(self.held_out.len());
        for (index, set) in self.held_out.iter_mut().enumerate() {
            let metrics = validate(&self.setup.model, set, at, lr, device)?;
            observe(Event::Validation { name: &set.name, metrics: &metrics });
            losses.push((set.name.clone(), metrics.val_loss));
            if index == 0 {
                self.validations.push(metrics);
            }
        }
        Ok(losses)
    }

    /// Saves, or begins to save, the run as it is after the step `at`.
    fn save(
        &mut self,
        at: StepState,
        recipe: &Recipe,
        losses: Losses,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        self.log.sync()?;
        for set in &self.held_out {
            set.file.sync()?;
        }
        let snapshot = Snapshot {
            state: self.scheduler.state(),
            parameters: self.setup.model.parameters(),
            model: ModelFiles {
                config: self.setup.config.clone(),
                dtype: self.setup.dtype,
                carry_from: self.setup.carry_from.clone(),
            },
            optimizer: self.optimizer.state().clone(),
            loader: self.loader.state(),
            seed: recipe.rng.seed,
            guard: self.guard.state().clone(),
            losses,
            recipe: recipe.to_yaml().to_owned(),
        };
        let name = format!("epoch_{}_step_{}", at.epoch, at.step);
        let saved = self.saver.save(name, snapshot)?;
        self.note_saved(saved, observe);
        Ok(())
    }

    fn note_saved(&mut self, saved: Option<Completed>, observe: &mut dyn FnMut(Event<'_>)) {
        if let Some(Completed { path, warnings }) = saved {
            observe(Event::Saved(&path));
            warnings.into_iter().for_each(|warning| observe(Event::Note(warning)));
            self.checkpoint = Some(path);
        }
    }

    /// Waits for the last save and draws the picture.
    fn finish(
        mut self,
        recipe: &Recipe,
        interrupted: bool,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<Run> {
        let saved = self.saver.wait()?;
        self.note_saved(saved, observe);
        let folder = &recipe.checkpoint.checkpoint_dir;
        let picture = folder.join("loss.svg");
        let title = folder.file_name().map_or_else(|| "training".into(), |name| name.to_string_lossy());
        let finite: Vec<StepMetrics> =
            self.steps.iter().filter(|step| step.loss.is_finite()).cloned().collect();
        let subtitle = subtitle(&self.steps, &self.setup.model);
        RunPlot { title: &title, subtitle: &subtitle, steps: &finite, validations: &self.validations }
            .write(&picture)?;
        Ok(Run {
            model: self.setup.model.clone(),
            setup: self.setup,
            checkpoint: self.checkpoint,
            steps: self.steps,
            validations: self.validations,
            picture,
            interrupted,
        })
    }
}

/// Forward and backward over the micro-batches of one step: what they measured together, and each one's loss.
fn accumulate(
    model: &Mistral4,
    batches: Vec<Batch>,
    label_tokens: usize,
    activations: Activations,
    gradients: &mut Gradients,
    device: &Device,
) -> Result<(MicroBatchLoss, Vec<BatchLoss>)> {
    let scale =
        LossScale { per_token: 1.0 / label_tokens.max(1) as f64, aux: 1.0 / batches.len().max(1) as f64 };
    let mut sum = MicroBatchLoss::default();
    let mut each = Vec::with_capacity(batches.len());
    for mut batch in batches {
        let (rows, label_tokens) = (std::mem::take(&mut batch.rows), batch.num_label_tokens);
        let part =
            forward_backward(model, &LabelledInputs::new(batch, device), scale, activations, gradients)?;
        each.push(BatchLoss { rows, loss_sum: part.loss_sum + part.aux_loss, label_tokens });
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
    Ok((sum, each))
}

/// The factor that brings the gradient's norm down to `max_norm`.
///
/// Source: `torch.nn.utils.clip_grad_norm_`.
fn clip_coefficient(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
}
