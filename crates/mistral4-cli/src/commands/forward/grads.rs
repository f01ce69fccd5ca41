//! Gradients of the mean loss.

use burn::tensor::{DType, Device, Tensor};
use mistral4::Mistral4;
use mistral4::weights::{NamedTensor, adapter_of};
use mistral4_checkpoint::adapter::Adapter;
use mistral4_checkpoint::config::Config;
use mistral4_checkpoint::weights::Checkpoint;
use mistral4_train::backward::{Activations, Gradients, LabelledInputs, LossScale, forward_backward};

use super::floats;
use super::inputs::Inputs;
use crate::error::Result;
use crate::tensors::NamedArray;

/// The gradient of the token-mean loss by every trainable parameter, in its place; zeros where the loss does not reach.
///
/// # Shapes
/// - `labels`: `[T]`, each token's own label
///
/// # Errors
/// Inputs that the model refuses.
pub(super) fn gradients(
    model: &Mistral4,
    inputs: &Inputs,
    labels: &[i64],
    device: &Device,
) -> Result<Vec<NamedTensor>> {
    let batch = LabelledInputs::plain(inputs.model_inputs(device), inputs.targets(labels));
    let count = batch.labels.iter().filter(|&&label| label >= 0).count();
    let scale = LossScale { per_token: 1.0 / count.max(1) as f64, z_loss: 0.0, aux: 0.0 };
    let mut gradients = Gradients::default();
    forward_backward(model, &batch, scale, Activations::Kept, &mut gradients)?;
    let trainable = model.parameters().into_iter().filter(|parameter| parameter.trainable);
    let gradient = |parameter: NamedTensor| {
        let nothing = || Tensor::zeros(parameter.values.shape(), (device, DType::F32));
        let values = gradients.remove(&parameter.key).unwrap_or_else(nothing);
        NamedTensor { values, ..parameter }
    };
    Ok(trainable.map(gradient).collect())
}

/// `grad.<key>` with the keys of the checkpoint's own files; a parameter that is stored in pieces (experts one by one)
/// goes by its canonical key.
pub(super) fn of_checkpoint(gradients: Vec<NamedTensor>, checkpoint: &Checkpoint) -> Vec<NamedArray> {
    let array = |gradient: NamedTensor| {
        let key = checkpoint.stored_key(&gradient.key).unwrap_or(&gradient.key);
        NamedArray::f32(format!("grad.{key}"), gradient.shape, floats(gradient.values))
    };
    gradients.into_iter().map(array).collect()
}

/// `grad.<key>` with the keys and shapes of the adapter's file.
pub(super) fn of_adapter(gradients: Vec<NamedTensor>, adapter: &Adapter, config: &Config) -> Vec<NamedArray> {
    let stored = adapter_of(&gradients, adapter).matrices(config.vision.is_some());
    let array = |(key, gradient): (String, mistral4_checkpoint::weights::HostTensor)| {
        NamedArray::f32(format!("grad.{key}"), gradient.shape.clone(), gradient.into_f32())
    };
    stored.into_iter().map(array).collect()
}
