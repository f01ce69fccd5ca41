//! Forward and backward of one optimizer step.

use burn::tensor::Device;
use mistral4::Mistral4;
use mistral4::model::neftune::EmbeddingNoise;

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
use crate::recipe::Recipe;

/// What a step adds to the plain loss of its batches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extras {
    /// Coefficient of the z-loss.
    pub(super) z_loss: f64,
    /// Size and seed of the noise on embeddings.
    pub(super) neftune: Option<(f64, u64)>,
}

impl Extras {
    pub(super) fn new(recipe: &Recipe) -> Self {
        Self { z_loss: recipe.z_loss, neftune: recipe.neftune_alpha.map(|alpha| (alpha, recipe.rng.seed)) }
    }

    /// Factors on the losses of a step of so many label tokens and micro-batches.
    fn scale(self, label_tokens: usize, micro_batches: usize) -> LossScale {
        LossScale {
            per_token: 1.0 / label_tokens.max(1) as f64,
            z_loss: self.z_loss,
            aux: 1.0 / micro_batches.max(1) as f64,
        }
    }

    /// A batch of the step `step` as the model takes it, with the rows it is made of. Fillers get no noise.
    fn inputs(self, mut batch: Batch, step: usize, device: &Device) -> (LabelledInputs, Vec<usize>) {
        let rows = std::mem::take(&mut batch.rows);
        let neftune = self.neftune.filter(|_| !batch.is_filler());
        let noise = neftune.map(|(alpha, seed)| EmbeddingNoise::new(alpha, seed, step, &rows));
        (LabelledInputs { noise, ..LabelledInputs::new(batch, device) }, rows)
    }
}

impl Training {
    /// Forward and backward over this rank's micro-batches of one step. Fillers count nowhere; they are there because
    /// ranks that share parameters or experts pass over the model together.
    pub(super) fn accumulate(
        &self,
        (step, batches): (usize, Vec<Batch>),
        counts: StepCounts,
        gradients: &mut ShardedGradients,
        device: &Device,
    ) -> Result<Measured> {
        let scale = self.extras.scale(counts.label_tokens, counts.micro_batches);
        let keeps_images = self.setup.holdings.has_embeddings();
        let mut about = Vec::with_capacity(batches.len());
        let mut micro_batches = Vec::with_capacity(batches.len());
        for mut batch in batches {
            let is_filler = batch.is_filler();
            let scale = if is_filler { LossScale { per_token: 0.0, aux: 0.0, ..scale } } else { scale };
            if !keeps_images {
                batch.images.clear();
            }
            let label_tokens = batch.num_label_tokens;
            let (inputs, rows) = self.extras.inputs(batch, step, device);
            about.push((rows, label_tokens, is_filler));
            micro_batches.push(MicroBatch { inputs, scale });
        }
        let first = counts.micro_batches_before;
        let parts = match &self.sharding {
            None => {
                let mut store = Whole::new(&self.setup.model, &mut gradients.parts);
                // To what is not multiplied out, neither other micro-batches nor other ranks can add.
                if micro_batches.len() == 1 && self.mesh.world.size() == 1 {
                    store = store.deferring(&self.optimizer);
                }
                self.passes(&mut store, first, micro_batches)?
            }
            Some(sharding) => {
                let mut store = ShardedStore::new(&self.setup.model, sharding, gradients, self.policy);
                let parts = self.passes(&mut store, first, micro_batches)?;
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
    ) -> Result<Vec<MicroBatchLoss>> {
        let (model, activations) = (&self.setup.model, self.activations);
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
    (step, batch): (usize, Batch),
    extras: Extras,
    optimizer: &mut Optimizer,
    factors: StepFactors,
    (activations, device): (Activations, &Device),
) -> Result<(Mistral4, Measured, f64)> {
    let label_tokens = batch.num_label_tokens;
    let scale = extras.scale(label_tokens, 1);
    let (inputs, rows) = extras.inputs(batch, step, device);
    let (model, part, norm) = update_in_backward(model, &inputs, scale, activations, optimizer, factors)?;
    let mut measured = Measured::default();
    measured.add(rows, label_tokens, part, scale.aux);
    Ok((model, measured, norm))
}
