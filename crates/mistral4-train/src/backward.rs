//! Loss and gradients of one micro-batch.

mod products;
mod stage;
mod store;

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::bf16;
use mistral4::inputs::{Layout, ModelInputs};
use mistral4::model::neftune::EmbeddingNoise;
use mistral4::model::{Mistral4, RouterReplay, Routing};
use mistral4::ops::{DeferredGradient, TokenLoss, TokenLossScale};
use mistral4::{Images, ops};
use mistral4_processor::ProcessedImage;

pub use self::products::DeferredGradients;
pub use self::stage::{Stage, StageForward};
pub use self::store::{ParameterStore, Unit, Whole};
use crate::data::{Batch, BatchLayout};
use crate::error::Result;
use crate::optim::{Optimizer, StepFactors};

/// Gradients by canonical key, flat, summed over micro-batches in f32; those of a single micro-batch stay in the dtype
/// that they were computed in.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: BTreeMap<String, Tensor<1>>,
    /// Those that are not multiplied out.
    deferred: DeferredGradients,
}

impl Gradients {
    /// Adds to the gradient of `key`.
    pub(crate) fn add(&mut self, key: String, gradient: Tensor<1>) {
        let sum = match self.remove(&key) {
            Some(sum) => sum + gradient.cast(DType::F32),
            None => gradient,
        };
        self.sums.insert(key, sum);
    }

    /// Takes gradients that are not multiplied out; nothing can be added to them.
    pub(crate) fn defer(&mut self, gradients: DeferredGradients) {
        self.deferred.extend(gradients);
    }

    /// Takes the gradient of `key` out that is not multiplied out.
    pub(crate) fn take_deferred(&mut self, key: &str) -> Option<DeferredGradient> {
        self.deferred.remove(key)
    }

    /// The gradient of `key` in its dtype, `[elements]`; `None` when the loss does not reach it, or it is not multiplied out.
    pub fn get(&self, key: &str) -> Option<&Tensor<1>> {
        self.sums.get(key)
    }

    /// Takes the gradient of `key` out, in f32.
    pub fn remove(&mut self, key: &str) -> Option<Tensor<1>> {
        self.take(key).map(|gradient| gradient.cast(DType::F32))
    }

    /// Takes the gradient of `key` out, in its dtype.
    pub fn take(&mut self, key: &str) -> Option<Tensor<1>> {
        self.sums.remove(key)
    }

    /// Keys and gradients, in the order of keys, of those that are multiplied out.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.sums.iter().map(|(key, gradient)| (key.as_str(), gradient))
    }

    /// L2 norm over all gradients, summed in f64.
    ///
    /// On the CPU their memory is taken out and put back, so that nothing is copied.
    pub fn norm(&mut self) -> f64 {
        self.square(|_| 1.0).sqrt()
    }

    /// Sum of the squares of all gradients, those of a key times its weight, in f64.
    pub fn square(&mut self, weight: impl Fn(&str) -> f64) -> f64 {
        let square = |gradient: &mut Tensor<1>| -> f64 {
            let device = gradient.device();
            if ops::is_fused(&device) {
                let dtype = gradient.dtype();
                let data = std::mem::replace(gradient, Tensor::zeros([0], (&device, dtype))).into_data();
                let sum = match dtype {
                    DType::BF16 => sum_of_squares::<bf16>(&data),
                    _ => sum_of_squares::<f32>(&data),
                };
                *gradient = Tensor::from_data(data, (&device, dtype));
                return sum;
            }
            f64::from(gradient.clone().cast(DType::F32).square().sum().into_scalar::<f32>())
        };
        let sums: f64 = self.sums.iter_mut().map(|(key, gradient)| weight(key) * square(gradient)).sum();
        sums + self.deferred.iter().map(|(key, gradient)| weight(key) * gradient.square()).sum::<f64>()
    }
}

fn sum_of_squares<T: mistral4_kernels::Element + burn::tensor::Element>(data: &TensorData) -> f64 {
    mistral4_kernels::sum_of_squares(data.as_slice::<T>().expect("the data has the tensor's dtype"))
}

/// What activations the backward pass finds again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// Those of every layer are kept.
    #[default]
    Kept,
    /// Each layer's input is kept and the layer run again: memory of one layer at a time.
    Recomputed,
}

/// A batch as the model takes it, with labels.
#[derive(Debug, Clone)]
pub struct LabelledInputs {
    /// Inputs of the model.
    pub inputs: ModelInputs,
    /// What each position should predict, or -100, `[T]`.
    pub labels: Vec<i64>,
    /// Noise on the embeddings.
    pub noise: Option<EmbeddingNoise>,
    /// Experts to send the tokens to, in place of the routers' choices.
    pub router_replay: Option<RouterReplay>,
}

impl LabelledInputs {
    /// Inputs and labels as they are.
    pub fn plain(inputs: ModelInputs, labels: Vec<i64>) -> Self {
        Self { inputs, labels, noise: None, router_replay: None }
    }

    /// Moves a batch's images to `device` and keeps the rest.
    pub fn new(batch: Batch, device: &Device) -> Self {
        let layout = match batch.layout {
            BatchLayout::Rows { batch, sequence } => Layout::Rows { batch, sequence },
            BatchLayout::Packed { cu_seqlens } => Layout::Packed { cu_seqlens },
        };
        let images = images(&batch.images, device);
        let inputs = ModelInputs {
            input_ids: Some(batch.input_ids),
            inputs_embeds: None,
            layout,
            attention_mask: batch.attention_mask,
            explicit_mask: None,
            position_ids: Some(batch.position_ids),
            images,
        };
        Self::plain(inputs, batch.labels)
    }

    /// The input of a model's first layer.
    fn embed(&self, model: &Mistral4) -> Result<Tensor<2>> {
        Ok(match &self.noise {
            Some(noise) => model.embed_with_noise(&self.inputs, noise)?,
            None => model.embed(&self.inputs)?,
        })
    }

    /// The experts that layer `index` is to take, if they are given.
    fn replay(&self, index: usize) -> Option<&Tensor<2, Int>> {
        self.router_replay.as_ref().and_then(|replay| replay.layer(index))
    }

    fn labels(&self, device: &Device) -> Tensor<1, Int> {
        let count = self.labels.len();
        Tensor::from_data(TensorData::new(self.labels.clone(), [count]), device)
    }
}

/// Images of a batch, padded to the largest; `None` for none.
pub fn images(images: &[impl std::borrow::Borrow<ProcessedImage>], device: &Device) -> Option<Images> {
    let height = images.iter().map(|image| image.borrow().height).max()?;
    let width = images.iter().map(|image| image.borrow().width).max()?;
    let mut pixels = vec![0.0f32; images.len() * 3 * height * width];
    for (image, pixels) in images.iter().zip(pixels.chunks_exact_mut(3 * height * width)) {
        let image: &ProcessedImage = image.borrow();
        for (row, values) in image.pixels.chunks_exact(image.width).enumerate() {
            let (channel, y) = (row / image.height, row % image.height);
            let start = (channel * height + y) * width;
            pixels[start..start + image.width].copy_from_slice(values);
        }
    }
    let shape = [images.len(), 3, height, width];
    Some(Images {
        pixel_values: Tensor::from_data(TensorData::new(pixels, shape), (device, DType::F32)),
        image_sizes: images.iter().map(|image| (image.borrow().height, image.borrow().width)).collect(),
    })
}

/// What one micro-batch measured.
#[derive(Debug, Clone, Default)]
pub struct MicroBatchLoss {
    /// Sum of the cross entropy over labelled positions.
    pub loss_sum: f64,
    /// Sum of the z-loss over labelled positions.
    pub z_loss: f64,
    /// Sum of the layers' load-balancing losses.
    pub aux_loss: f64,
    /// Sum of the layers' router z-losses.
    pub router_z_loss: f64,
    /// Tokens sent to each expert, by layer.
    pub loads: Vec<(usize, Vec<u64>)>,
}

impl MicroBatchLoss {
    /// Adds what another part of the model measured of the same micro-batch.
    pub(crate) fn merge(&mut self, part: Self) {
        let (mine, theirs) = (self.sums(), part.sums());
        self.set_sums(std::array::from_fn(|i| mine[i] + theirs[i]));
        self.loads.extend(part.loads);
    }

    /// The losses without the loads, to be summed over ranks.
    pub(crate) fn sums(&self) -> [f64; 4] {
        [self.loss_sum, self.z_loss, self.aux_loss, self.router_z_loss]
    }

    /// Puts back what [`MicroBatchLoss::sums`] gave.
    pub(crate) fn set_sums(&mut self, sums: [f64; 4]) {
        [self.loss_sum, self.z_loss, self.aux_loss, self.router_z_loss] = sums;
    }

    /// Notes the loss of the labelled positions.
    fn add_tokens(&mut self, loss: &TokenLoss) {
        let value = |loss: &Tensor<1>| f64::from(loss.clone().inner().into_scalar::<f32>());
        self.loss_sum += value(&loss.cross_entropy);
        self.z_loss += value(&loss.z_loss);
    }

    /// Notes where a layer's tokens went; returns the losses of its router, to be differentiated.
    fn add_routing(&mut self, layer: usize, routing: Routing) -> Option<Tensor<1>> {
        self.loads.push((layer, routing.load));
        let value = |loss: &Option<Tensor<1>>| {
            loss.as_ref().map_or(0.0, |loss| f64::from(loss.clone().inner().into_scalar::<f32>()))
        };
        self.aux_loss += value(&routing.aux_loss);
        self.router_z_loss += value(&routing.z_loss);
        router_losses(routing.aux_loss, routing.z_loss)
    }
}

/// The sum of a router's losses.
fn router_losses(aux_loss: Option<Tensor<1>>, z_loss: Option<Tensor<1>>) -> Option<Tensor<1>> {
    match (aux_loss, z_loss) {
        (Some(aux_loss), Some(z_loss)) => Some(aux_loss + z_loss),
        (aux_loss, z_loss) => aux_loss.or(z_loss),
    }
}

/// Factors on the parts of the loss.
#[derive(Debug, Clone, Copy)]
pub struct LossScale {
    /// On the summed loss of the labelled positions: one over those of the global batch.
    pub per_token: f64,
    /// On their squared log-sum-exps beside their cross entropy.
    pub z_loss: f64,
    /// On the routers' losses: one over the micro-batches of the step.
    pub aux: f64,
}

impl LossScale {
    fn of_tokens(self) -> TokenLossScale {
        TokenLossScale { per_token: self.per_token, z_loss: self.z_loss }
    }
}

/// A micro-batch of a step.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// What the model takes and should predict.
    pub inputs: LabelledInputs,
    /// Factors on its losses.
    pub scale: LossScale,
}

/// Runs a micro-batch forward and backward and adds to `gradients`.
///
/// # Errors
/// Inputs that the model refuses.
pub fn forward_backward(
    model: &Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
    activations: Activations,
    gradients: &mut Gradients,
) -> Result<MicroBatchLoss> {
    let stage = Stage::whole(model, activations);
    forward_backward_from(&mut Whole::new(model, gradients), stage, batch, scale)
}

/// As [`forward_backward`], for the only micro-batch of a step: the gradients of experts' weights stay products where
/// `optimizer` [takes them so](Optimizer::takes_deferred) and their factors are small.
///
/// # Errors
/// As [`forward_backward`].
pub fn forward_backward_for(
    optimizer: &Optimizer,
    model: &Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
    activations: Activations,
    gradients: &mut Gradients,
) -> Result<MicroBatchLoss> {
    let mut store = Whole::new(model, gradients).deferring(optimizer);
    forward_backward_from(&mut store, Stage::whole(model, activations), batch, scale)
}

/// As [`forward_backward`], with the parameters of a store, which takes the gradients.
///
/// # Errors
/// As [`forward_backward`].
pub fn forward_backward_from(
    store: &mut dyn ParameterStore,
    whole: Stage<'_>,
    batch: &LabelledInputs,
    scale: LossScale,
) -> Result<MicroBatchLoss> {
    let forward = whole.forward(store, batch, None)?;
    let (measured, _) = forward.backward(store, batch, None, scale)?;
    Ok(measured)
}

/// The summed cross entropy of a batch, without gradients.
///
/// # Errors
/// Inputs that the model refuses.
pub fn evaluate(model: &Mistral4, batch: &LabelledInputs) -> Result<f64> {
    evaluate_from(&mut Whole::new(model, &mut Gradients::default()), model, batch)
}

/// As [`evaluate`], with the parameters of a store; of `model`, only its shape counts.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_from(
    store: &mut dyn ParameterStore,
    model: &Mistral4,
    batch: &LabelledInputs,
) -> Result<f64> {
    let stage = Stage::whole(model, Activations::Recomputed);
    let output = stage.output(store, batch, None)?;
    Ok(stage.loss_sum(store, batch, output))
}

/// Runs a micro-batch forward and backward and moves the parameters of each part of the model as soon as its gradient
/// is final, so that only one part's gradient exists at a time; returns the model, what was measured, and the norm of
/// the gradient.
///
/// Of recomputed activations one layer's exist at a time as well.
///
/// Nothing is updated when the loss is no finite number, and nothing more once a gradient is none.
///
/// # Errors
/// Inputs that the model refuses.
pub fn update_in_backward(
    mut model: Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
    activations: Activations,
    optimizer: &mut Optimizer,
    factors: StepFactors,
) -> Result<(Mistral4, MicroBatchLoss, f64)> {
    let mut gradients = Gradients::default();
    let whole = Stage::whole(&model, activations);
    let mut pass = whole.forward(&mut Whole::new(&model, &mut gradients), batch, None)?;
    optimizer.begin_step();
    let mut squares = 0.0;
    let mut take = |optimizer: &mut Optimizer, model: Mistral4, gradients: &mut Gradients| {
        squares += gradients.norm().powi(2);
        if f64::is_finite(squares) { optimizer.apply(model, gradients, factors) } else { model }
    };
    pass.head(&mut Whole::new(&model, &mut gradients), batch, scale);
    if !pass.measured.loss_sum.is_finite() {
        return Ok((model, pass.measured, f64::NAN));
    }
    model = take(optimizer, model, &mut gradients);
    while pass.layer(&mut Whole::new(&model, &mut gradients).deferring(optimizer), scale) {
        model = take(optimizer, model, &mut gradients);
    }
    pass.front(&mut Whole::new(&model, &mut gradients), batch)?;
    model = take(optimizer, model, &mut gradients);
    Ok((model, pass.measured, squares.sqrt()))
}
