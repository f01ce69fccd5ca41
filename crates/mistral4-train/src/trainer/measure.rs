//! What a run measures besides the loss.

use std::time::Duration;

use burn::tensor::Device;
use mistral4::model::Mistral4;
use mistral4::weights::NamedTensor;

use super::HeldOut;
use crate::backward::{Gradients, LabelledInputs, ParameterStore, Whole, evaluate_from};
use crate::data::Skipped;
use crate::error::Result;
use crate::metrics::{StepMetrics, ValidationMetrics, peak_memory_gib, timestamp};
use crate::parallel::{
    Communicator, Holdings, Mesh, ModelLayout, ShardedGradients, ShardedStore, Sharding, ShardingPolicy,
};
use crate::schedule::StepState;

/// How long the step waited for its batches, and the rows that were left out so far, where there are any.
pub(super) fn data_metrics(
    wait: Duration,
    skipped: &Skipped,
) -> impl Iterator<Item = (String, serde_json::Value)> + use<> {
    let wait = ("data_wait_ms".to_owned(), (wait.as_secs_f64() * 1e3).into());
    let total = skipped.total();
    std::iter::once(wait).chain((total > 0).then(|| ("skipped_rows".to_owned(), total.into())))
}

/// A model to measure, on one rank or spread over many.
#[derive(Clone, Copy)]
pub(super) struct HeldModel<'a> {
    pub(super) model: &'a Mistral4,
    pub(super) layout: &'a ModelLayout,
    pub(super) sharding: Option<&'a Sharding>,
    pub(super) mesh: &'a Mesh,
}

impl HeldModel<'_> {
    fn evaluate(self, inputs: &LabelledInputs) -> Result<f64> {
        let evaluate = |store: &mut dyn ParameterStore| match &self.layout.pipeline {
            Some(pipeline) => pipeline.evaluate(store, self.model, inputs),
            None => evaluate_from(store, self.model, inputs),
        };
        match self.sharding {
            Some(sharding) => {
                let mut gradients = ShardedGradients::default();
                let policy = ShardingPolicy { sums_each: false, keeps_gathered: false };
                evaluate(&mut ShardedStore::new(self.model, sharding, &mut gradients, policy))
            }
            None => evaluate(&mut Whole::new(self.model, &mut Gradients::default())),
        }
    }
}

/// The token-mean loss over a held-out set, taken in the same order every time.
pub(super) fn validate(
    held: HeldModel<'_>,
    set: &mut HeldOut,
    at: StepState,
    lr: f64,
    device: &Device,
) -> Result<ValidationMetrics> {
    let data = &held.mesh.data;
    let (mut loss, mut tokens) = ([0.0], [0u64]);
    set.loader.restart();
    loop {
        // Ranks that have no batch left run along on fillers, since layers are gathered together.
        let step = set.loader.next_step()?;
        for batch in step.batches {
            let label_tokens = batch.num_label_tokens as u64;
            loss[0] += held.evaluate(&LabelledInputs::new(batch, device))?;
            tokens[0] += label_tokens;
        }
        if step.ends_epoch {
            break;
        }
    }
    data.all_reduce_sum(&mut loss);
    data.all_reduce_sum(&mut tokens);
    let ([loss], [tokens]) = (loss, tokens.map(|tokens| tokens as usize));
    let metrics = ValidationMetrics {
        step: at.step,
        epoch: at.epoch,
        timestamp: timestamp(),
        val_loss: loss / tokens.max(1) as f64,
        lr,
        num_label_tokens: tokens,
        mem: peak_memory_gib(),
        accuracy: None,
    };
    if let Some(file) = &mut set.file {
        file.write(&metrics)?;
    }
    Ok(metrics)
}

/// Parameters that are trained, and all, over all ranks; collective.
pub(super) fn count(model: &Mistral4, holdings: &Holdings, world: &Communicator) -> (usize, usize) {
    let parameters = model.parameters();
    let share = |p: &NamedTensor| p.values.dims()[0] as f64 / holdings.copies(&p.key) as f64;
    let trained = parameters.iter().filter(|p| p.trainable).map(share).sum();
    let mut sums: [f64; 2] = [trained, parameters.iter().map(share).sum()];
    world.all_reduce_sum(&mut sums);
    (sums[0].round() as usize, sums[1].round() as usize)
}

/// Size and time of a run, in a line.
pub(super) fn subtitle(steps: &[StepMetrics], parameters: usize) -> String {
    let tokens: usize = steps.iter().map(|step| step.num_tokens_per_step).sum();
    let seconds: f64 = steps.iter().map(|step| step.num_tokens_per_step as f64 / step.tps).sum();
    let millions = parameters as f64 / 1e6;
    format!("{millions:.2} M parameters, {} steps, {tokens} tokens in {seconds:.0} s", steps.len())
}
