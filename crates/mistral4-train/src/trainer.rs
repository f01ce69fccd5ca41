//! The training loop.

mod measure;
mod ranks;
mod record;
mod start;
mod step;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use mistral4::weights::is_adapter;

use crate::backward::{Activations, Gradients};
use crate::checkpoint::{Completed, Disk, Losses, ModelFiles, Saver, Snapshot};
use crate::data::Loader;
use crate::early_stop::EarlyStop;
use crate::error::Result;
use crate::guard::{Guard, StepOutcome, Verdict};
use crate::metrics::{MetricsFile, RunState, StepMetrics, ValidationMetrics, timestamp};
use crate::optim::{Optimizer, StepFactors};
use crate::parallel::{Communicator, Mesh, ShardedGradients, Sharding, ShardingPolicy, reduce};
use crate::plot::{Curve, RunPlot};
use crate::recipe::Recipe;
use crate::schedule::{LrSchedule, StepScheduler, StepState};
use crate::setup::Setup;
use measure::{HeldModel, count, data_metrics, subtitle, validate};
use ranks::StepCounts;
use record::{Recorder, Utilization, load_metrics, loss_metrics, note_failure};
use step::{Extras, update_on_the_way};

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

/// Where a run computes and saves.
#[derive(Debug, Clone)]
pub struct Host {
    /// What computes.
    pub device: Device,
    /// Where checkpoints go.
    pub disk: Disk,
    /// The ranks of the run.
    pub world: Communicator,
}

impl Host {
    /// One rank.
    pub fn single(device: &Device) -> Self {
        Self { device: device.clone(), disk: Disk::default(), world: Communicator::single() }
    }
}

/// A run that has ended.
pub struct Run {
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
    /// On the first rank alone.
    file: Option<MetricsFile>,
    /// Every validation so far.
    validations: Vec<ValidationMetrics>,
}

/// A run under way: everything that a step reads or changes.
struct Training {
    /// The model is here, and is replaced at every step.
    setup: Setup,
    optimizer: Optimizer,
    loader: Loader,
    /// Rows of the training data that were left out and reported.
    noted_skipped: usize,
    held_out: Vec<HeldOut>,
    scheduler: StepScheduler,
    schedule: LrSchedule,
    guard: Guard,
    early_stop: EarlyStop,
    /// On the first rank alone.
    recorder: Option<Recorder>,
    utilization: Option<Utilization>,
    mesh: Mesh,
    /// How the model is spread over ranks; `None`: it is whole on each.
    sharding: Option<Sharding>,
    /// Trained parameters with the number of their values on this rank.
    trained: Vec<(String, usize)>,
    activations: Activations,
    extras: Extras,
    /// When ranks of a sharded model communicate.
    policy: ShardingPolicy,
    /// Names of the ranks, for the metrics.
    rank_names: Vec<String>,
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
    run_on(Host::single(device), recipe, interrupted, observe)
}

/// As [`run`], on one of many ranks, all of which call it. Only the first one is told of events.
///
/// # Errors
/// As [`run`], and a mesh that does not fit the number of ranks. A rank that returns an error leaves the others waiting:
/// its caller ends them.
pub fn run_on(
    host: Host,
    recipe: &Recipe,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Run> {
    recipe.check_runnable()?;
    recipe.check_data_is_here()?;
    let is_first = host.world.is_first();
    let mut unheard = |_: Event<'_>| {};
    let observe: &mut dyn FnMut(Event<'_>) = if is_first { observe } else { &mut unheard };
    let run = train(host, recipe, interrupted, observe);
    run.inspect_err(|error| {
        if is_first {
            note_failure(&recipe.checkpoint.checkpoint_dir, error);
        }
    })
}

fn train(
    host: Host,
    recipe: &Recipe,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Run> {
    let device = &host.device.clone();
    let mut t = Training::start(host, recipe, observe)?;
    let total_steps = t.scheduler.total_steps();
    let parameters = count(&t.setup.model, &t.setup.holdings, &t.mesh.world);
    observe(Event::Started { total_steps, parameters });
    let (mut is_interrupted, mut ends_early) = (false, t.early_stop.verdict());
    while !t.scheduler.is_finished() && !is_interrupted && ends_early.is_none() {
        let started = Instant::now();
        let at = t.scheduler.state();
        let waited = t.mesh.world.waited();
        let mut next = t.loader.next_step()?;
        let data_wait = next.data_wait;
        t.note_skipped(observe);
        let ends_epoch = next.ends_epoch;
        let counts = StepCounts::of(&next.batches).together(&t.mesh);

        let flops = t.utilization.as_ref().map(|utilization| utilization.flops(&next.batches));
        let mut factors =
            StepFactors { lr: t.schedule.lr(at.step), weight_decay: t.schedule.wd(at.step), grad_scale: 1.0 };
        let mut gradients = ShardedGradients::default();
        t.setup.dropout.begin(recipe.rng.seed, at.step);
        let (measured, norm_on_the_way) = if recipe.optimizer_in_bwd {
            let batch = next.batches.remove(0);
            let (model, measured, norm) = update_on_the_way(
                t.setup.model,
                (at.step, batch),
                t.extras,
                &mut t.optimizer,
                factors,
                (t.activations, device),
            )?;
            t.setup.model = model;
            (measured, Some(norm))
        } else {
            (t.accumulate((at.step, next.batches), counts, &mut gradients, device)?, None)
        };
        t.setup.dropout.end();
        let mut gradients = gradients.parts;
        let busy = started.elapsed().saturating_sub(t.mesh.world.waited() - waited);
        let measured = measured.together(&t.mesh, busy, interrupted.load(Ordering::Relaxed));
        t.reduce(&mut gradients, device);
        let loss = measured.losses.loss_sum / counts.label_tokens.max(1) as f64;
        let grad_norm = norm_on_the_way.unwrap_or_else(|| t.norm(&mut gradients));
        let outcome = StepOutcome { step: at.step, loss, grad_norm, batches: &measured.batches };
        let verdict = t.guard.judge(&outcome)?;
        if let Verdict::Report(message) | Verdict::Skip(_, message) = &verdict {
            observe(Event::Note(message.clone()));
        }
        factors.grad_scale = clip_coefficient(grad_norm, recipe.max_grad_norm);
        let mut more = load_metrics(&measured.losses);
        more.extend(loss_metrics(&measured.losses, counts.label_tokens));
        more.extend(measured.time_metrics(&t.rank_names));
        more.extend(data_metrics(data_wait, t.loader.skipped()));
        if let Verdict::Skip(reason, _) = verdict {
            more.insert("skipped".into(), reason.into());
            more.insert("skipped_steps".into(), t.guard.state().skipped_steps.into());
        } else {
            if !recipe.optimizer_in_bwd {
                t.setup.model = t.optimizer.step(t.setup.model, gradients, factors);
            }
            let factor = recipe.model.gate_bias_update_factor;
            t.setup.model.text_mut().model.update_moe_gate_bias(&measured.losses.loads, factor);
        }

        let seconds = started.elapsed().as_secs_f64();
        if let (Some(utilization), Some(flops)) = (&t.utilization, flops) {
            more.insert("mfu".into(), utilization.mfu(flops, seconds).into());
        }
        let tps = counts.tokens as f64 / seconds;
        let metrics = StepMetrics {
            step: at.step,
            epoch: at.epoch,
            timestamp: timestamp(),
            loss,
            grad_norm,
            lr: factors.lr,
            mem: measured.mem,
            tps,
            tps_per_gpu: tps / t.mesh.world.size() as f64,
            num_tokens_per_step: counts.tokens,
            num_label_tokens: counts.label_tokens,
            more,
        };
        if let Some(recorder) = &mut t.recorder {
            recorder.step(&metrics, &measured.losses.loads)?;
        }
        observe(Event::Step(&metrics));
        t.steps.push(metrics);

        is_interrupted = measured.stop;
        let validates = t.scheduler.is_val_step(ends_epoch);
        let saves = t.scheduler.is_ckpt_step(ends_epoch);
        t.scheduler.advance(ends_epoch);
        // A run that goes on validates then; one that was asked to stop in its last step never would.
        let validates = validates && (!is_interrupted || t.scheduler.is_finished());
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
    /// Sums gradients over ranks with other data: those of the model's parameters over the ranks that keep the same
    /// values; those of adapters, which are not sharded, over all.
    fn reduce(&self, gradients: &mut Gradients, device: &Device) {
        let (adapters, base): (Vec<_>, Vec<_>) =
            self.trained.iter().cloned().partition(|(key, _)| is_adapter(key));
        reduce::over_replicas(gradients, &base, &self.setup.layout.replicas, device);
        reduce::over_replicas(gradients, &adapters, &self.setup.layout.data, device);
    }

    /// L2 norm of the gradient over all of its parts.
    fn norm(&self, gradients: &mut Gradients) -> f64 {
        let mut square = [gradients.square(|key| 1.0 / self.setup.holdings.copies(key) as f64)];
        self.mesh.world.all_reduce_sum(&mut square);
        square[0].sqrt()
    }

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
            let held = HeldModel {
                model: &self.setup.model,
                layout: &self.setup.layout,
                sharding: self.sharding.as_ref(),
                mesh: &self.mesh,
            };
            let metrics = validate(held, set, at, lr, device)?;
            if let Some(recorder) = &mut self.recorder {
                recorder.validation(&set.name, &metrics)?;
            }
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
        if let Some(recorder) = &self.recorder {
            recorder.sync()?;
        }
        for file in self.held_out.iter().filter_map(|set| set.file.as_ref()) {
            file.sync()?;
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
            optimizer_step: self.optimizer.state().step,
            states: self.optimizer.state().tensors(),
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
        if let Some(recorder) = &mut self.recorder {
            recorder.end(if interrupted { RunState::Stopped } else { RunState::Finished }, ends_early)?;
        }
        let folder = &recipe.checkpoint.checkpoint_dir;
        let picture = folder.join("loss.svg");
        let validations: Vec<(String, Vec<ValidationMetrics>)> =
            self.held_out.into_iter().map(|set| (set.name, set.validations)).collect();
        let parameters = count(&self.setup.model, &self.setup.holdings, &self.mesh.world);
        if self.mesh.world.is_first() {
            let title = folder.file_name().map_or_else(|| "training".into(), |name| name.to_string_lossy());
            let finite: Vec<StepMetrics> =
                self.steps.iter().filter(|step| step.loss.is_finite()).cloned().collect();
            RunPlot {
                title: &title,
                subtitle: &subtitle(&self.steps, parameters.1),
                steps: &finite,
                validations: &validations,
                load: None,
                curves: &[Curve::Loss, Curve::LearningRate],
            }
            .write(&picture)?;
        }
        Ok(Run {
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
