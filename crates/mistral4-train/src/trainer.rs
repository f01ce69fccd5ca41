//! The training loop.

mod measure;
mod record;
mod start;
mod step;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use mistral4::model::Mistral4;

use crate::backward::{Activations, Gradients};
use crate::checkpoint::{Completed, Disk, Losses, ModelFiles, Saver, Snapshot};
use crate::data::Loader;
use crate::early_stop::EarlyStop;
use crate::error::Result;
use crate::guard::{Guard, StepOutcome, Verdict};
use crate::metrics::{MetricsFile, RunState, StepMetrics, ValidationMetrics, peak_memory_gib, timestamp};
use crate::optim::{Optimizer, StepFactors};
use crate::plot::{Curve, RunPlot};
use crate::recipe::Recipe;
use crate::schedule::{LrSchedule, StepScheduler, StepState};
use crate::setup::Setup;
use measure::{count, subtitle, validate};
use record::{Recorder, Utilization, load_metrics, note_failure};
use step::{Measured, accumulate, update_on_the_way};

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
    /// Every validation by the name of the held-out set, those before a resumption included.
    pub validations: Vec<(String, Vec<ValidationMetrics>)>,
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
    /// Every validation so far.
    validations: Vec<ValidationMetrics>,
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
    early_stop: EarlyStop,
    recorder: Recorder,
    utilization: Option<Utilization>,
    saver: Saver,
    steps: Vec<StepMetrics>,
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
    let run = train(disk, recipe, device, interrupted, observe);
    run.inspect_err(|error| note_failure(&recipe.checkpoint.checkpoint_dir, error))
}

fn train(
    disk: Disk,
    recipe: &Recipe,
    device: &Device,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Run> {
    let mut t = Training::start(disk, recipe, device, observe)?;
    let total_steps = t.scheduler.total_steps();
    observe(Event::Started { total_steps, parameters: count(&t.setup.model) });
    let activations = match recipe.distributed.activation_checkpointing {
        true => Activations::Recomputed,
        false => Activations::Kept,
    };
    let (mut is_interrupted, mut ends_early) = (false, t.early_stop.verdict());
    while !t.scheduler.is_finished() && !is_interrupted && ends_early.is_none() {
        let started = Instant::now();
        let at = t.scheduler.state();
        let mut next = t.loader.next_step(t.scheduler.grad_acc_steps())?;
        let (label_tokens, tokens, ends_epoch) =
            (next.num_label_tokens(), next.num_tokens(), next.ends_epoch);

        let flops = t.utilization.as_ref().map(|utilization| utilization.flops(&next.batches));
        let mut factors =
            StepFactors { lr: t.schedule.lr(at.step), weight_decay: t.schedule.wd(at.step), grad_scale: 1.0 };
        let mut gradients = Gradients::default();
        t.setup.dropout.begin(recipe.rng.seed, at.step);
        let (Measured { sum: measured, batches }, grad_norm) = if recipe.optimizer_in_bwd {
            let batch = next.batches.remove(0);
            let (model, measured, norm) =
                update_on_the_way(t.setup.model, batch, &mut t.optimizer, factors, device)?;
            t.setup.model = model;
            (measured, norm)
        } else {
            let (setup, batches) = (&t.setup, next.batches);
            let measured = accumulate(setup, batches, label_tokens, activations, &mut gradients, device)?;
            (measured, gradients.norm())
        };
        t.setup.dropout.end();
        let loss = measured.loss_sum / label_tokens.max(1) as f64;
        let verdict = t.guard.judge(&StepOutcome { step: at.step, loss, grad_norm, batches: &batches })?;
        if let Verdict::Report(message) | Verdict::Skip(_, message) = &verdict {
            observe(Event::Note(message.clone()));
        }
        factors.grad_scale = clip_coefficient(grad_norm, recipe.max_grad_norm);
        let mut more = load_metrics(&measured);
        if let Verdict::Skip(reason, _) = verdict {
            more.insert("skipped".into(), reason.into());
            more.insert("skipped_steps".into(), t.guard.state().skipped_steps.into());
        } else {
            if !recipe.optimizer_in_bwd {
                t.setup.model = t.optimizer.step(t.setup.model, gradients, factors);
            }
            let factor = recipe.model.gate_bias_update_factor;
            t.setup.model.text_mut().model.update_moe_gate_bias(&measured.loads, factor);
        }

        let seconds = started.elapsed().as_secs_f64();
        if let (Some(utilization), Some(flops)) = (&t.utilization, flops) {
            more.insert("mfu".into(), utilization.mfu(flops, seconds).into());
        }
        let tps = tokens as f64 / seconds;
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
        t.recorder.step(&metrics, &measured.loads)?;
        observe(Event::Step(&metrics));
        t.steps.push(metrics);

        is_interrupted = interrupted.load(Ordering::Relaxed);
        let validates = t.scheduler.is_val_step(ends_epoch) && !is_interrupted;
        let saves = t.scheduler.is_ckpt_step(ends_epoch);
        t.scheduler.advance(ends_epoch);
        let held_out = if validates { t.validate(at, factors.lr, device, observe)? } else { Vec::new() };
        t.early_stop.see(&held_out);
        ends_early = t.early_stop.verdict();
        if (saves || is_interrupted || ends_early.is_some()) && recipe.checkpoint.enabled {
            t.save(at, recipe, Losses::new(loss, &held_out), observe)?;
        }
    }
    t.finish(recipe, is_interrupted, ends_early, observe)
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
        for set in &mut self.held_out {
            let metrics = validate(&self.setup.model, set, at, lr, device)?;
            self.recorder.validation(&set.name, &metrics)?;
            observe(Event::Validation { name: &set.name, metrics: &metrics });
            losses.push((set.name.clone(), metrics.val_loss));
            set.validations.push(metrics);
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
        self.recorder.sync()?;
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
                adapter: self.setup.adapter.clone(),
            },
            optimizer: self.optimizer.state().clone(),
            loader: self.loader.state(),
            seed: recipe.rng.seed,
            guard: self.guard.state().clone(),
            early_stop: self.early_stop.state(),
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
        ends_early: Option<String>,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<Run> {
        let saved = self.saver.wait()?;
        self.note_saved(saved, observe);
        if let Some(message) = &ends_early {
            observe(Event::Note(message.clone()));
        }
        self.recorder.end(if interrupted { RunState::Stopped } else { RunState::Finished }, ends_early)?;
        let folder = &recipe.checkpoint.checkpoint_dir;
        let picture = folder.join("loss.svg");
        let title = folder.file_name().map_or_else(|| "training".into(), |name| name.to_string_lossy());
        let finite: Vec<StepMetrics> =
            self.steps.iter().filter(|step| step.loss.is_finite()).cloned().collect();
        let subtitle = subtitle(&self.steps, &self.setup.model);
        let validations: Vec<(String, Vec<ValidationMetrics>)> =
            self.held_out.into_iter().map(|set| (set.name, set.validations)).collect();
        RunPlot {
            title: &title,
            subtitle: &subtitle,
            steps: &finite,
            validations: &validations,
            load: None,
            curves: &[Curve::Loss, Curve::LearningRate],
        }
        .write(&picture)?;
        Ok(Run {
            model: self.setup.model.clone(),
            setup: self.setup,
            checkpoint: self.checkpoint,
            steps: self.steps,
            validations,
            picture,
            interrupted,
        })
    }
}

/// The factor that brings the gradient's norm down to `max_norm`.
///
/// Source: `torch.nn.utils.clip_grad_norm_`.
fn clip_coefficient(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
}
