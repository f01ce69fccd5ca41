//! Forward and backward of one optimizer step.

use burn::tensor::Device;
use mistral4::Mistral4;

use super::Training;
use super::ranks::{Measured, StepCounts};
use crate::backward::{LabelledInputs, LossScale, forward_backward, layer_by_layer, update_in_backward};
use crate::data::Batch;
use crate::error::Result;
use crate::optim::{Optimizer, StepFactors};
use crate::parallel::{ShardedGradients, ShardedStore};

/// Factors on the losses of a step of so many label tokens and micro-batches.
fn loss_scale(label_tokens: usize, micro_batches: usize) -> LossScale {
    LossScale { per_token: 1.0 / label_tokens.max(1) as f64, aux: 1.0 / micro_batches.max(1) as f64 }
}

impl Training {
    /// Forward and backward over this rank's micro-batches of one step, and over the silent one, which counts nowhere.
    pub(super) fn accumulate(
        &self,
        (batches, silent): (Vec<Batch>, Option<Batch>),
        counts: StepCounts,
        gradients: &mut ShardedGradients,
        device: &Device,
    ) -> Result<Measured> {
        let scale = loss_scale(counts.label_tokens, counts.micro_batches);
        let mut measured = Measured::default();
        let count = batches.len();
        let last = (count + usize::from(silent.is_some())).saturating_sub(1);
        for (index, mut batch) in batches.into_iter().chain(silent).enumerate() {
            let is_silent = index == count;
            let scale = if is_silent { LossScale { per_token: 0.0, aux: 0.0 } } else { scale };
            self.setup.dropout.next();
            let (rows, label_tokens) = (std::mem::take(&mut batch.rows), batch.num_label_tokens);
            let inputs = LabelledInputs::new(batch, device);
            let model = &self.setup.model;
            let part = match &self.sharding {
                None => forward_backward(model, &inputs, scale, self.activations, &mut gradients.parts)?,
                Some(sharding) => {
                    let sums_now = index == last || !self.defers_sums;
                    let mut store = ShardedStore::new(model, sharding, gradients, sums_now);
                    let part = layer_by_layer(&mut store, model, &inputs, scale)?;
                    store.finish();
                    part
                }
            };
            if !is_silent {
                measured.add(rows, label_tokens, part, scale.aux);
            }
        }
        Ok(measured)
    }
}

/// Forward and backward over the only micro-batch of a step, in which parameters move as soon as their gradient is
/// final; returns the norm of the gradient as well.
pub(super) fn update_on_the_way(
    model: Mistral4,
    mut batch: Batch,
    optimizer: &mut Optimizer,
    factors: StepFactors,
    device: &Device,
) -> Result<(Mistral4, Measured, f64)> {
    let (rows, label_tokens) = (std::mem::take(&mut batch.rows), batch.num_label_tokens);
    let (inputs, scale) = (LabelledInputs::new(batch, device), loss_scale(label_tokens, 1));
    optimizer.begin_step();
    let (model, part, norm) = update_in_backward(model, &inputs, scale, |model, gradients| {
        optimizer.apply(model, gradients, factors)
    })?;
    let mut measured = Measured::default();
    measured.add(rows, label_tokens, part, scale.aux);
    Ok((model, measured, norm))
}
