//! From a recipe, and a checkpoint where there is one, to a run that is ready for its next step.

use std::collections::HashMap;

use burn::tensor::DType;
use mistral4::ops;
use mistral4::weights::NamedTensor;

use super::measure::count;
use super::ranks::rank_names;
use super::record::{Recorder, Utilization};
use super::step::Extras;
use super::{Event, HeldOut, Host, Training};
use crate::backward::Activations;
use crate::checkpoint::{Checkpoints, Ranks, Saved, Saver};
use crate::data::{self, DataRank, Loader, LoaderOptions};
use crate::early_stop::{EarlyStop, EarlyStopState};
use crate::error::{Error, Result};
use crate::guard::{Guard, GuardState};
use crate::metrics::{self, MetricsFile, RunState, RunStatus};
use crate::optim::{Optimizer, OptimizerState, ParameterState, Spread};
use crate::parallel::sharding::BLOCK;
use crate::parallel::{Mesh, Sharding, ShardingPolicy};
use crate::recipe::{OptimizerConfig, Recipe, StateDtype};
use crate::schedule::{LrSchedule, StepScheduler};
use crate::setup::Setup;

impl Training {
    /// Reads everything that a recipe names and goes to the place where the run continues.
    pub(super) fn start(host: Host, recipe: &Recipe, observe: &mut dyn FnMut(Event<'_>)) -> Result<Self> {
        let config = &recipe.checkpoint;
        let folder = &config.checkpoint_dir;
        let Host { disk, device, world } = host;
        let device = &device;
        let mesh = Mesh::new(&recipe.distributed, world)?;
        let ranks = mesh.data.size();
        let is_first = mesh.world.is_first();
        check_optimizer(recipe, &mesh)?;
        let checkpoints = Checkpoints::new(recipe, disk);
        if is_first {
            checkpoints.clean()?;
        }
        mesh.world.barrier();
        let begin = if config.enabled { checkpoints.starting_point(&config.restore_from)? } else { None };
        let saved = begin.as_deref().map(Saved::read).transpose()?;
        let setup = Setup::start(recipe, device, saved.as_ref(), &mesh)?;

        let context = setup.data_context(recipe.rng.seed);
        let pad_id = setup.pad_id();
        let dataset = data::open(&recipe.dataset, &context)?;
        let data_rank = DataRank { rank: mesh.data.rank(), world: ranks };
        let mut loader = Loader::new(dataset, LoaderOptions::training(recipe, pad_id), data_rank)?;
        let mut scheduler = StepScheduler::new(&recipe.step_scheduler, loader.steps_per_epoch(), ranks)?;
        let total_steps = scheduler.total_steps();
        let schedule = LrSchedule::new(recipe.lr_scheduler.as_ref(), &recipe.optimizer, total_steps)?;
        Optimizer::check_device(&recipe.optimizer, device)?;
        let sharding =
            mesh.is_sharded().then(|| Sharding::new(&setup.model, &setup.holdings, &setup.layout.shards));
        check_blocks(&setup, &recipe.optimizer)?;
        let mut state = OptimizerState::default();
        if let Some(saved) = &saved {
            loader.resume(saved.loader).map_err(|error| match error {
                Error::Resume { field, saved: was, current } => saved.incompatible(field, was, current),
                other => other,
            })?;
            scheduler.resume(saved.state);
            state = saved.optimizer(device, &setup.holdings)?;
            check_states(saved, &state, &setup, &recipe.optimizer)?;
            observe(Event::Note(format!(
                "continuing from {} at step {}",
                saved.folder.display(),
                saved.state.step
            )));
            if scheduler.is_finished() {
                observe(Event::Note(
                    "nothing is left to do; raise step_scheduler.max_steps or num_epochs to train on"
                        .to_owned(),
                ));
            }
        }

        let first_step = scheduler.state().step;
        let mut held_out = Vec::new();
        for set in &recipe.validation {
            let dataset = data::open(&set.dataset, &context)?;
            let options = LoaderOptions::validation(recipe, &set.dataset, pad_id);
            let file =
                if set.name == "default" { "validation".into() } else { format!("validation_{}", set.name) };
            let path = folder.join(format!("{file}.jsonl"));
            let file = is_first.then(|| MetricsFile::open(&path, first_step)).transpose()?;
            let validations = if is_first { metrics::read(&path)? } else { Vec::new() };
            let loader = Loader::new(dataset, options, data_rank)?;
            held_out.push(HeldOut { name: set.name.clone(), loader, file, validations });
        }
        if held_out.len() > 1 && held_out.iter().all(|set| set.name != config.best_metric_key) {
            observe(Event::Note(
                "there are several held-out sets and none is called `default`: LOWEST_VAL needs checkpoint.best_metric_key"
                    .to_owned(),
            ));
        }
        let (trained_parameters, parameters) = count(&setup.model, &setup.holdings, &mesh.world);
        let status = RunStatus {
            state: RunState::Running,
            total_steps,
            parameters,
            trained_parameters,
            message: None,
        };
        let recorder = is_first.then(|| Recorder::open(recipe, first_step, status)).transpose()?;
        let (text, is_cpu) = (&setup.config.config.text, ops::is_fused(device));
        let utilization = match setup.holdings.first_has_all() {
            false => None,
            true => Utilization::new(recipe, &setup.model, text, setup.dtype, is_cpu),
        };
        let early_stop = saved.as_ref().map_or_else(EarlyStopState::default, |saved| saved.early_stop);
        let path = folder.join("training.jsonl");
        let steps = if is_first { metrics::read(&path)? } else { Vec::new() };
        let guard = saved.as_ref().map_or_else(GuardState::default, |saved| saved.guard.clone());
        let ranks = Ranks::new(&mesh, &setup.holdings);
        let spread = Spread { holdings: setup.holdings.clone(), shards: setup.layout.shards.clone() };
        let parameters = setup.model.parameters();
        let trained = parameters.iter().filter(|parameter| parameter.trainable);
        Ok(Self {
            trained: trained.map(|p| (p.key.clone(), p.values.dims()[0])).collect(),
            activations: match recipe.distributed.recomputes(mesh.is_sharded()) {
                true => Activations::Recomputed,
                false => Activations::Kept,
            },
            extras: Extras::new(recipe),
            policy: ShardingPolicy {
                sums_each: !recipe.distributed.defer_fsdp_grad_sync,
                keeps_gathered: !recipe.distributed.reshard_after_forward,
            },
            rank_names: rank_names(&mesh.world),
            mesh,
            sharding,
            setup,
            optimizer: Optimizer::resume(recipe.optimizer.clone(), state).on_ranks(spread),
            loader,
            noted_skipped: 0,
            held_out,
            scheduler,
            schedule,
            guard: Guard::new(&recipe.step_scheduler, guard),
            early_stop: EarlyStop::new(recipe.early_stopping.clone(), &config.best_metric_key, early_stop),
            recorder,
            utilization,
            saver: Saver::new(checkpoints, ranks, config.is_async),
            steps,
            checkpoint: begin,
        })
    }
}

impl Training {
    /// Reports that rows were left out: at the first of them, and at every tenfold number.
    pub(super) fn note_skipped(&mut self, observe: &mut dyn FnMut(Event<'_>)) {
        let (skipped, noted) = (self.loader.skipped(), self.noted_skipped);
        let (before, now) = (noted.checked_ilog10(), skipped.total().checked_ilog10());
        if now > before {
            let last =
                skipped.messages.last().map_or(String::new(), |message| format!("; such as: {message}"));
            observe(Event::Note(format!(
                "left out {} malformed rows and {} that are too long so far{last}",
                skipped.unusable, skipped.too_long
            )));
            self.noted_skipped = skipped.total();
        }
    }
}

/// Refuses states of other parameters or of another optimizer.
fn check_states(
    saved: &Saved,
    state: &OptimizerState,
    setup: &Setup,
    config: &OptimizerConfig,
) -> Result<()> {
    let parameters = setup.model.parameters();
    let parameters: HashMap<&str, &NamedTensor> = parameters.iter().map(|p| (p.key.as_str(), p)).collect();
    for (key, state) in &state.parameters {
        let parameter = parameters.get(key.as_str());
        let is = parameter.map_or(0, |parameter| parameter.shape.iter().product());
        if let Some(was) = state.lengths().find(|&was| was != is) {
            let key = format!("the number of values of `{key}`");
            return Err(saved.incompatible(&key, was.to_string(), is.to_string()));
        }
        let (was, is) = (state.kind(), ParameterState::expected_kind(config, key, setup.holdings.shape(key)));
        if was != is {
            return Err(saved.incompatible(
                &format!("what the optimizer remembers of `{key}`"),
                was.into(),
                is.into(),
            ));
        }
        let needs_master = config.master_weights && parameters[key.as_str()].values.dtype() != DType::F32;
        if needs_master != state.master.is_some() {
            let say = |yes| if yes { "present" } else { "absent" }.to_owned();
            let key = format!("the f32 master of `{key}`");
            return Err(saved.incompatible(&key, say(state.master.is_some()), say(needs_master)));
        }
    }
    Ok(())
}

/// Refuses what the optimizer cannot do on several ranks.
fn check_optimizer(recipe: &Recipe, mesh: &Mesh) -> Result<()> {
    let refused = |key: &str, value: &str, message: &str| {
        let (key, value, message) = (key.to_owned(), value.to_owned(), message.to_owned());
        Err(Error::Inconsistent { key, value, message })
    };
    if recipe.optimizer_in_bwd && mesh.world.size() > 1 {
        return refused(
            "optimizer_in_bwd",
            "true",
            "moves parameters before gradients are summed over ranks",
        );
    }
    if mesh.shape.tp > 1 && recipe.optimizer.muon.is_some() && recipe.peft.is_none() {
        return refused("optimizer", "Muon", "needs whole matrices; set distributed.tp_size to 1");
    }
    Ok(())
}

/// Refuses 8-bit states of parameters that are divided over ranks within blocks of values that share a scale.
fn check_blocks(setup: &Setup, config: &OptimizerConfig) -> Result<()> {
    if config.state_dtype != StateDtype::Int8 {
        return Ok(());
    }
    let mut trained = setup.model.parameters().into_iter().filter(|parameter| parameter.trainable);
    let divided = trained.find(|NamedTensor { key, .. }| {
        let elements = setup.holdings.shape(key).iter().product::<usize>();
        elements >= config.min_8bit_size && !setup.holdings.keeps_blocks(key)
    });
    match divided {
        None => Ok(()),
        Some(NamedTensor { key, .. }) => Err(Error::Inconsistent {
            key: "optimizer".to_owned(),
            value: "8-bit states".to_owned(),
            message: format!(
                "`{key}` is divided over tp_size or ep_size within blocks of {BLOCK} values, which share a scale; set them to 1, or keep states in bfloat16"
            ),
        }),
    }
}
