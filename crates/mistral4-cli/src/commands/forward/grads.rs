//! Gradients of the mean loss.

use burn::tensor::Device;
use mistral4::Mistral4;
use mistral4_checkpoint::weights::Checkpoint;
use mistral4_train::backward::{Activations, Gradients, LabelledInputs, LossScale, forward_backward};

use super::floats;
use super::inputs::Inputs;
use crate::error::Result;
use crate::tensors::NamedArray;

/// `grad.<key>` of the token-mean loss for every trainable parameter, zeros where the loss does not reach. Keys are those
/// of the checkpoint's own files; a parameter that is stored in pieces (experts one by one) goes by its canonical key.
///
/// # Shapes
/// - `labels`: `[T]`, each token's own label
///
/// # Errors
/// Inputs that the model refuses.
pub(super) fn gradients(
    model: &Mistral4,
    checkpoint: &Checkpoint,
    inputs: &Inputs,
    labels: &[i64],
    device: &Device,
) -> Result<Vec<NamedArray>> {
    let batch = LabelledInputs { inputs: inputs.model_inputs(device), labels: inputs.targets(labels) };
    let count = batch.labels.iter().filter(|&&label| label >= 0).count();
    let scale = LossScale { per_token: 1.0 / count.max(1) as f64, aux: 0.0 };
    let mut gradients = Gradients::default();
    forward_backward(model, &batch, scale, Activations::Kept, &mut gradients)?;
    let trainable = model.parameters().into_iter().filter(|parameter| parameter.trainable);
    let array = |parameter: mistral4::weights::NamedTensor| {
        let values = match gradients.remove(&parameter.key) {
            Some(gradient) => floats(gradient),
            None => vec![0.0; parameter.shape.iter().product()],
        };
        let key = checkpoint.stored_key(&parameter.key).unwrap_or(&parameter.key);
        NamedArray::f32(format!("grad.{key}"), parameter.shape, values)
    };
    Ok(trainable.map(array).collect())
}
