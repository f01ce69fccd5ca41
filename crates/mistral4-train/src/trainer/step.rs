//! Forward and backward of one optimizer step.

use burn::tensor::Device;
use mistral4::Mistral4;

use super::Training;
use super::ranks::{Measured, StepCounts};
use crate::backward::{
    Activations, LabelledInputs, LossScale, MicroBatch, MicroBatchLoss, ParameterStore, Stage, Whole,
    forward_backward_from, update_in_backward,
};
use crate::data::Batch;
use crate::error::Result;
use crate::optim::{Optimizer, StepFactors};
use crate::parallel::{ShardedGradients, ShardedStore};

/// Factors on the losses of a step of so many label tokens and micro-batches.
fn loss_scale(label_tokens: usize, micro_batches: usize) -> LossScale {
    LossScale { per_token: 1.0 / label_tokens.max(1) as f64, aux: 1.0 / micro_batches.max(1) as f64 }
}

impl Training {
    /// Forward and backward over this rank's micro-batches of one step. Fillers count nowhere; they are there because
    /// ranks that share parameters or experts pass over the model together.
    pub(super) fn accumulate(
        &self,
        batches: Vec<Batch>,
        counts: StepCounts,
        gradients: &mut ShardedGradients,
        device: &Device,
    ) -> Result<Measured> {
        let scale = loss_scale(counts.label_tokens, counts.micro_batches);
        let keeps_images = self.setup.holdings.has_embeddings();
        let mut about = Vec::with_capacity(batches.len());
        let mut micro_batches = Vec::with_capacity(batches.len());
        for mut batch in batches {
            let is_filler = batch.is_filler();
            let scale = if is_filler { LossScale { per_token: 0.0, aux: 0.0 } } else { scale };
            about.push((std::mem::take(&mut batch.rows), batch.num_label_tokens, is_filler));
            if !keeps_images {
                batch.images.clear();
            }
            micro_batches.push(MicroBatch { inputs: LabelledInputs::new(batch, device), scale });
        }
        let first = counts.micro_batches_before;
        let parts = match &self.sharding {
            None => {
                let mut store = Whole::new(&self.setup.model, &mut gradients.parts);
                self.passes(&mut store, first, micro_batches, self.activations)?
            }
            Some(sharding) => {
                let mut store = ShardedStore::new(&self.setup.model, sharding, gradients, !self.defers_sums);
                let parts = self.passes(&mut store, first, micro_batches, Activations::Recomputed)?;
                store.finish();
                parts
            }
        };
        let mut measured = Measured::default();
        for ((rows, label_tokens, is_filler), part) in about.into_iter().zip(parts) {
            if !is_filler {
                measured.add(rows, label_tokens, part, scale.aux);
            }
        }
        Ok(measured)
    }

    /// Passes over the model with every micro-batch, of which `first` is the first one's number in the step: what each
    /// measured.
    fn passes(
        &self,
        store: &mut dyn ParameterStore,
        first: usize,
        micro_batches: Vec<MicroBatch>,
        activations: Activations,
    ) -> Result<Vec<MicroBatchLoss>> {
        let model = &self.setup.model;
        let begin = |index| self.setup.dropout.micro_batch(first + index);
        if let Some(pipeline) = &self.setup.layout.pipeline {
            return pipeline.forward_backward(store, model, &micro_batches, activations, &begin);
        }
        let count = micro_batches.len();
        let pass = |(index, MicroBatch { inputs, scale }): (usize, MicroBatch)| {
            begin(index);
            store.set_last(index + 1 == count);
            forward_backward_from(store, Stage::whole(model, activations), &inputs, scale)
        };
        micro_batches.into_iter().enumerate().map(pass).collect()
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
