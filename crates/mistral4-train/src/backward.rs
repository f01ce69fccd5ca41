//! Loss and gradients of one micro-batch.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{DType, Device, Gradients as BurnGradients, Int, Tensor, TensorData};
use mistral4::inputs::{Layout, ModelInputs};
use mistral4::model::Mistral4;
use mistral4::model::decoder_layer::{DecoderLayer, LayerContext};
use mistral4::model::linear::Linear;
use mistral4::model::norm::RmsNorm;
use mistral4::weights::take_gradients;
use mistral4::{Images, ops};
use mistral4_processor::ProcessedImage;

use crate::data::{Batch, BatchLayout};
use crate::error::Result;

/// Gradients by canonical key, flat, f32, summed over micro-batches.
#[derive(Debug, Default)]
pub struct Gradients(BTreeMap<String, Tensor<1>>);

impl Gradients {
    /// Adds to the gradient of `key`.
    pub(crate) fn add(&mut self, key: String, gradient: Tensor<1>) {
        let gradient = gradient.cast(DType::F32);
        let sum = match self.0.remove(&key) {
            Some(sum) => sum + gradient,
            None => gradient,
        };
        self.0.insert(key, sum);
    }

    /// The gradient of `key`, `[elements]`; `None` when the loss does not reach it.
    pub fn get(&self, key: &str) -> Option<&Tensor<1>> {
        self.0.get(key)
    }

    /// Takes the gradient of `key` out.
    pub fn remove(&mut self, key: &str) -> Option<Tensor<1>> {
        self.0.remove(key)
    }

    /// Adds all gradients of another set.
    pub(crate) fn extend(&mut self, other: Self) {
        other.0.into_iter().for_each(|(key, gradient)| self.add(key, gradient));
    }

    /// Keys and gradients, in the order of keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.0.iter().map(|(key, gradient)| (key.as_str(), gradient))
    }

    /// L2 norm over all gradients, summed in f64.
    ///
    /// On the CPU their memory is taken out and put back, so that nothing is copied.
    pub fn norm(&mut self) -> f64 {
        let square = |gradient: &mut Tensor<1>| -> f64 {
            let device = gradient.device();
            if ops::is_fused(&device) {
                let empty = Tensor::zeros([0], (&device, DType::F32));
                let data = std::mem::replace(gradient, empty).into_data();
                let values = data.as_slice::<f32>().expect("gradients are f32");
                let sum = mistral4_kernels::sum_of_squares(values);
                *gradient = Tensor::from_data(data, (&device, DType::F32));
                return sum;
            }
            f64::from(gradient.clone().square().sum().into_scalar::<f32>())
        };
        self.0.values_mut().map(square).sum::<f64>().sqrt()
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f64) {
        for gradient in self.0.values_mut() {
            let scaled = gradient.clone() * factor;
            *gradient = scaled;
        }
    }
}

/// Parameters that are needed at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Embeddings, vision tower and projector.
    Front,
    /// A decoder layer.
    Layer(usize),
    /// The final norm and `lm_head`.
    Head,
}

/// Where the walk through a model finds parameters and leaves gradients.
///
/// `next` is the unit that the walk needs after this one, which a store may begin to fetch.
pub trait ParameterStore {
    /// The model, of whose parameters those of the front are present.
    fn front(&mut self, next: Option<Unit>) -> Mistral4;

    /// A layer.
    fn layer(&mut self, index: usize, next: Option<Unit>) -> DecoderLayer;

    /// The final norm and `lm_head`.
    fn head(&mut self, next: Option<Unit>) -> (RmsNorm, Linear);

    /// Whether any parameter of a unit is trained.
    fn trains(&self, unit: Unit) -> bool;

    /// Takes the gradients of a unit's parameters, by canonical key, flat.
    fn add(&mut self, unit: Unit, gradients: Vec<(String, Tensor<1>)>);
}

/// A model that is all here.
struct Whole<'a> {
    model: &'a Mistral4,
    gradients: &'a mut Gradients,
}

impl ParameterStore for Whole<'_> {
    fn front(&mut self, _: Option<Unit>) -> Mistral4 {
        self.model.clone()
    }

    fn layer(&mut self, index: usize, _: Option<Unit>) -> DecoderLayer {
        self.model.text().model.layers[index].clone()
    }

    fn head(&mut self, _: Option<Unit>) -> (RmsNorm, Linear) {
        let text = self.model.text();
        (text.model.norm.clone(), text.lm_head.clone())
    }

    fn trains(&self, _: Unit) -> bool {
        true
    }

    fn add(&mut self, _: Unit, gradients: Vec<(String, Tensor<1>)>) {
        gradients.into_iter().for_each(|(key, gradient)| self.gradients.add(key, gradient));
    }
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
}

impl LabelledInputs {
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
        Self { inputs, labels: batch.labels }
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
    /// Sum of the layers' load-balancing losses.
    pub aux_loss: f64,
    /// Tokens sent to each expert, by layer.
    pub loads: Vec<(usize, Vec<u64>)>,
}

/// Factors on the parts of the loss.
#[derive(Debug, Clone, Copy)]
pub struct LossScale {
    /// On the summed cross entropy: one over the label tokens of the global batch.
    pub per_token: f64,
    /// On the load-balancing losses: one over the micro-batches of the step.
    pub aux: f64,
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
    match activations {
        Activations::Kept => whole(model, batch, scale, gradients),
        Activations::Recomputed => layer_by_layer(&mut Whole { model, gradients }, model, batch, scale),
    }
}

/// The summed cross entropy of a batch, without gradients.
///
/// # Errors
/// Inputs that the model refuses.
pub fn evaluate(model: &Mistral4, batch: &LabelledInputs) -> Result<f64> {
    evaluate_from(&mut Whole { model, gradients: &mut Gradients::default() }, model, batch)
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
    let order = Order { layers: model.text().model.layers.len() };
    let mut x = store.front(Some(order.after(Unit::Front))).embed(&batch.inputs)?;
    let context = model.text().model.context(&batch.inputs, None)?;
    for index in 0..order.layers {
        x = store.layer(index, Some(order.after(Unit::Layer(index)))).forward(x, &context, None).0;
    }
    let labels = batch.labels(&x.device());
    let (norm, lm_head) = store.head(None);
    let loss = lm_head.cross_entropy(norm.forward(x), labels);
    Ok(f64::from(loss.into_scalar::<f32>()))
}

/// One graph over the whole model.
fn whole(
    model: &Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
    gradients: &mut Gradients,
) -> Result<MicroBatchLoss> {
    let trained = model.train();
    let text = trained.text();
    let mut measured = MicroBatchLoss::default();
    let mut x = trained.embed(&batch.inputs)?;
    let context = text.model.context(&batch.inputs, None)?;
    let mut total = None;
    for (index, layer) in text.model.layers.iter().enumerate() {
        let (y, routing) = layer.forward(x, &context, None);
        x = y;
        if let Some(routing) = routing {
            measured.loads.push((index, routing.load));
            if let Some(aux) = routing.aux_loss {
                measured.aux_loss += f64::from(aux.clone().inner().into_scalar::<f32>());
                total = add(total, aux * scale.aux);
            }
        }
    }
    let labels = batch.labels(&x.device().without_autodiff());
    let loss = text.lm_head.cross_entropy(text.model.norm.forward(x), labels);
    measured.loss_sum = f64::from(loss.clone().inner().into_scalar::<f32>());
    let total = add(total, loss * scale.per_token).expect("the cross entropy was just added");
    if total.is_tracked() {
        let mut from = total.backward();
        trained.take_gradients(&mut from, |key, gradient| gradients.add(key, gradient));
    }
    Ok(measured)
}

fn add(total: Option<Tensor<1>>, part: Tensor<1>) -> Option<Tensor<1>> {
    Some(match total {
        Some(total) => total + part,
        None => part,
    })
}

/// The order in which a pass needs the units.
struct Order {
    layers: usize,
}

impl Order {
    /// The unit after one, in the forward pass.
    fn after(&self, unit: Unit) -> Unit {
        match unit {
            Unit::Layer(index) if index + 1 < self.layers => Unit::Layer(index + 1),
            Unit::Front if self.layers > 0 => Unit::Layer(0),
            _ => Unit::Head,
        }
    }

    /// The unit before one, which the backward pass needs next.
    fn before(&self, unit: Unit) -> Unit {
        match unit {
            Unit::Head if self.layers > 0 => Unit::Layer(self.layers - 1),
            Unit::Layer(index) if index > 0 => Unit::Layer(index - 1),
            _ => Unit::Front,
        }
    }
}

/// Forward without a graph, keeping each layer's input; then each layer again, alone, from last to first.
///
/// The parameters are those of the store; of `model`, only its shape counts.
///
/// # Errors
/// Inputs that the model refuses.
pub fn layer_by_layer(
    store: &mut dyn ParameterStore,
    model: &Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
) -> Result<MicroBatchLoss> {
    let mut pass = LayerPass::forward(store, model, batch, scale)?;
    pass.head(store);
    while pass.layer(store) {}
    pass.front(store)?;
    Ok(pass.measured)
}

/// Runs a micro-batch forward and backward and moves the parameters of each part of the model as soon as its gradient
/// is final, so that only one part's gradient exists at a time; returns the model, what was measured, and the norm of
/// the gradient.
///
/// `update` gets the model and the gradients of one part. Nothing is updated when the loss is no finite number, and
/// nothing more once a gradient is none.
///
/// # Errors
/// Inputs that the model refuses.
pub fn update_in_backward(
    mut model: Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
    mut update: impl FnMut(Mistral4, &mut Gradients) -> Mistral4,
) -> Result<(Mistral4, MicroBatchLoss, f64)> {
    let mut gradients = Gradients::default();
    let mut pass =
        LayerPass::forward(&mut Whole { model: &model, gradients: &mut gradients }, &model, batch, scale)?;
    let mut squares = 0.0;
    let mut take = |model: Mistral4, gradients: &mut Gradients| {
        squares += gradients.norm().powi(2);
        if f64::is_finite(squares) { update(model, gradients) } else { model }
    };
    pass.head(&mut Whole { model: &model, gradients: &mut gradients });
    if !pass.measured.loss_sum.is_finite() {
        return Ok((model, pass.measured, f64::NAN));
    }
    model = take(model, &mut gradients);
    while pass.layer(&mut Whole { model: &model, gradients: &mut gradients }) {
        model = take(model, &mut gradients);
    }
    pass.front(&mut Whole { model: &model, gradients: &mut gradients })?;
    model = take(model, &mut gradients);
    Ok((model, pass.measured, squares.sqrt()))
}

/// A micro-batch on its way back through the model, a layer at a time.
struct LayerPass<'a> {
    batch: &'a LabelledInputs,
    scale: LossScale,
    measured: MicroBatchLoss,
    context: LayerContext,
    order: Order,
    prefix: &'static str,
    /// Inputs of the layers that are still to come, first layer first.
    inputs: Vec<Tensor<2>>,
    /// Before the head: its input; then the gradient of the output of the layer that is next.
    x: Tensor<2>,
}

impl<'a> LayerPass<'a> {
    fn forward(
        store: &mut dyn ParameterStore,
        model: &Mistral4,
        batch: &'a LabelledInputs,
        scale: LossScale,
    ) -> Result<Self> {
        let order = Order { layers: model.text().model.layers.len() };
        let mut measured = MicroBatchLoss::default();
        let mut x = store.front(Some(order.after(Unit::Front))).embed(&batch.inputs)?;
        let context = model.text().model.context(&batch.inputs, None)?;
        let mut inputs = Vec::with_capacity(order.layers);
        for index in 0..order.layers {
            inputs.push(x.clone());
            let layer = store.layer(index, Some(order.after(Unit::Layer(index))));
            let (y, routing) = layer.forward(x, &context, None);
            x = y;
            if let Some(routing) = routing {
                measured.loads.push((index, routing.load));
                measured.aux_loss += routing.aux_loss.map_or(0.0, |aux| f64::from(aux.into_scalar::<f32>()));
            }
        }
        Ok(Self { batch, scale, measured, context, order, prefix: model.text_prefix(), inputs, x })
    }

    /// What follows a unit on the way back; the front not at all where none of it is trained.
    fn next(&self, store: &dyn ParameterStore, unit: Unit) -> Option<Unit> {
        let before = self.order.before(unit);
        (before != Unit::Front || store.trains(Unit::Front)).then_some(before)
    }

    /// The loss, and the gradients of the output projection and of the final norm.
    fn head(&mut self, store: &mut dyn ParameterStore) {
        let next = self.next(store, Unit::Head);
        let (norm, lm_head) = store.head(next);
        let (norm, lm_head) = (norm.train(), lm_head.train());
        let labels = self.batch.labels(&self.x.device());
        let leaf = self.x.clone().autodiff().require_grad();
        let loss = lm_head.cross_entropy(norm.forward(leaf.clone()), labels);
        self.measured.loss_sum = f64::from(loss.clone().inner().into_scalar::<f32>());
        let mut from = (loss * self.scale.per_token).backward();
        let mut gradients = collect(&norm, &format!("{}model.norm.", self.prefix), &mut from);
        gradients.extend(collect(&lm_head, &format!("{}lm_head.", self.prefix), &mut from));
        store.add(Unit::Head, gradients);
        self.x = leaf.grad_remove(&mut from).expect("the leaf requires its gradient");
    }

    /// The gradients of the last layer that is left; false when there is none.
    fn layer(&mut self, store: &mut dyn ParameterStore) -> bool {
        let Some(input) = self.inputs.pop() else { return false };
        let index = self.inputs.len();
        let unit = Unit::Layer(index);
        let next = self.next(store, unit);
        let layer = store.layer(index, next).train();
        let leaf = input.autodiff().require_grad();
        let total = seeded(&layer, leaf.clone(), &self.context, self.x.clone(), self.scale.aux);
        let mut from = total.backward();
        store.add(unit, collect(&layer, &format!("{}model.layers.{index}.", self.prefix), &mut from));
        self.x = leaf.grad_remove(&mut from).expect("the leaf requires its gradient");
        true
    }

    /// The gradients of the embeddings, and of the vision tower and the projector.
    fn front(&self, store: &mut dyn ParameterStore) -> Result<()> {
        if !store.trains(Unit::Front) {
            return Ok(());
        }
        let trained = store.front(None).train();
        let embeds = trained.embed(&self.batch.inputs)?;
        let mut gradients = Vec::new();
        if embeds.is_tracked() {
            let mut from = (embeds * self.x.clone().autodiff()).sum().backward();
            trained.take_gradients(&mut from, |key, gradient| gradients.push((key, gradient)));
        }
        store.add(Unit::Front, gradients);
        Ok(())
    }
}

/// Takes the gradients of a module's parameters out of a backward pass.
fn collect<M: Module>(module: &M, prefix: &str, from: &mut BurnGradients) -> Vec<(String, Tensor<1>)> {
    let mut gradients = Vec::new();
    take_gradients(module, from, |key, gradient| gradients.push((format!("{prefix}{key}"), gradient)));
    gradients
}

/// A scalar whose gradient is that of the layer's output times `dy`, plus the layer's own losses.
fn seeded(
    layer: &DecoderLayer,
    x: Tensor<2>,
    context: &LayerContext,
    dy: Tensor<2>,
    aux_scale: f64,
) -> Tensor<1> {
    let (y, routing) = layer.forward(x, context, None);
    let total = (y * dy.autodiff()).sum();
    match routing.and_then(|routing| routing.aux_loss) {
        Some(aux) => total + aux * aux_scale,
        None => total,
    }
}
