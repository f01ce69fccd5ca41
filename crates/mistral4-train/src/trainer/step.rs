//! Forward and backward of one optimizer step.

use burn::tensor::Device;
use mistral4::Mistral4;

use crate::backward::{
    Activations, Gradients, LabelledInputs, LossScale, MicroBatchLoss, forward_backward, update_in_backward,
};
use crate::data::Batch;
use crate::error::Result;
use crate::guard::BatchLoss;
use crate::optim::{Optimizer, StepFactors};
use crate::setup::Setup;

/// What the micro-batches of a step measured together, and each one's loss.
pub(super) struct Measured {
    pub(super) sum: MicroBatchLoss,
    pub(super) batches: Vec<BatchLoss>,
}

impl Measured {
    fn add(&mut self, rows: Vec<usize>, label_tokens: usize, part: MicroBatchLoss, aux_scale: f64) {
        self.batches.push(BatchLoss { rows, loss_sum: part.loss_sum + part.aux_loss, label_tokens });
        self.sum.loss_sum += part.loss_sum;
        self.sum.aux_loss += part.aux_loss * aux_scale;
        if self.sum.loads.is_empty() {
            self.sum.loads = part.loads;
            return;
        }
        for ((_, sum), (_, part)) in self.sum.loads.iter_mut().zip(part.loads) {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }
}

/// Factors on the losses of a step of so many label tokens and micro-batches.
fn loss_scale(label_tokens: usize, micro_batches: usize) -> LossScale {
    LossScale { per_token: 1.0 / label_tokens.max(1) as f64, aux: 1.0 / micro_batches.max(1) as f64 }
}

/// Forward and backward over the micro-batches of one step; their gradients are added to `gradients`.
pub(super) fn accumulate(
    setup: &Setup,
    batches: Vec<Batch>,
    label_tokens: usize,
    activations: Activations,
    gradients: &mut Gradients,
    device: &Device,
) -> Result<Measured> {
    let scale = loss_scale(label_tokens, batches.len());
    let mut measured =
        Measured { sum: MicroBatchLoss::default(), batches: Vec::with_capacity(batches.len()) };
    for mut batch in batches {
        setup.dropout.next();
        let (rows, label_tokens) = (std::mem::take(&mut batch.rows), batch.num_label_tokens);
        let inputs = LabelledInputs::new(batch, device);
        let part = forward_backward(&setup.model, &inputs, scale, activations, gradients)?;
        measured.add(rows, label_tokens, part, scale.aux);
    }
    Ok(measured)
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
    let mut measured = Measured { sum: MicroBatchLoss::default(), batches: Vec::new() };
    measured.add(rows, label_tokens, part, scale.aux);
    Ok((model, measured, norm))
}
