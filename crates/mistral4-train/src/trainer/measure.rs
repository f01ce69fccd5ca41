//! What a run measures besides the loss.

use burn::tensor::Device;
use mistral4::model::Mistral4;
use mistral4::weights::NamedTensor;

use super::HeldOut;
use crate::backward::{LabelledInputs, evaluate};
use crate::data::LoaderState;
use crate::error::Result;
use crate::metrics::{StepMetrics, ValidationMetrics, peak_memory_gib, timestamp};
use crate::schedule::StepState;

/// The token-mean loss over a held-out set, taken in the same order every time.
pub(super) fn validate(
    model: &Mistral4,
    set: &mut HeldOut,
    at: StepState,
    lr: f64,
    device: &Device,
) -> Result<ValidationMetrics> {
    let (mut loss, mut tokens) = (0.0, 0);
    set.loader.resume(LoaderState { epoch: 0, batch: 0, ..set.loader.state() })?;
    while let Some(batch) = set.loader.next_batch()? {
        tokens += batch.num_label_tokens;
        loss += evaluate(model, &LabelledInputs::new(batch, device))?;
    }
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
    set.file.write(&metrics)?;
    Ok(metrics)
}

/// Parameters that are trained, and all.
pub(super) fn count(model: &Mistral4) -> (usize, usize) {
    let parameters = model.parameters();
    let elements = |p: &NamedTensor| p.shape.iter().product::<usize>();
    (parameters.iter().filter(|p| p.trainable).map(elements).sum(), parameters.iter().map(elements).sum())
}

/// Size and time of a run, in a line.
pub(super) fn subtitle(steps: &[StepMetrics], model: &Mistral4) -> String {
    let tokens: usize = steps.iter().map(|step| step.num_tokens_per_step).sum();
    let seconds: f64 = steps.iter().map(|step| step.num_tokens_per_step as f64 / step.tps).sum();
    let millions = count(model).1 as f64 / 1e6;
    format!("{millions:.2} M parameters, {} steps, {tokens} tokens in {seconds:.0} s", steps.len())
}
