//! Consecutive layers of a model, forward and backward.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Gradients as BurnGradients, Int, Tensor};
use mistral4::model::Mistral4;
use mistral4::model::decoder_layer::LayerContext;
use mistral4::weights::take_gradients;

use super::{Activations, LabelledInputs, LossScale, MicroBatchLoss, ParameterStore, Unit, router_losses};
use crate::error::Result;

/// Some layers, with the front if the model's first is among them and the head if the last is.
///
/// Parameters are those of a store. Of the model only its shape counts, unless activations are kept: then it is all here.
#[derive(Debug, Clone)]
pub struct Stage<'a> {
    model: &'a Mistral4,
    run: Run,
    activations: Activations,
}

/// A run of layers.
#[derive(Debug, Clone)]
struct Run {
    layers: Range<usize>,
    /// Whether it begins with token ids and images.
    is_first: bool,
    /// Whether it ends with the loss.
    is_last: bool,
}

impl Run {
    /// The unit after a layer (or after the front) in the forward pass; the head where `with_head`.
    fn after(&self, index: Option<usize>, with_head: bool) -> Option<Unit> {
        let next = index.map_or(self.layers.start, |index| index + 1);
        if next < self.layers.end {
            return Some(Unit::Layer(next));
        }
        (self.is_last && with_head).then_some(Unit::Head)
    }

    /// The unit before a layer (or before the head) in the backward pass; the front not at all where none of it is
    /// trained.
    fn before(&self, index: usize, store: &dyn ParameterStore) -> Option<Unit> {
        if index > self.layers.start {
            return Some(Unit::Layer(index - 1));
        }
        (self.is_first && store.trains(Unit::Front)).then_some(Unit::Front)
    }
}

/// A micro-batch between its forward and its backward pass, or on its way back, a layer at a time.
pub struct StageForward {
    run: Run,
    prefix: &'static str,
    context: LayerContext,
    saved: Saved,
    pub(super) measured: MicroBatchLoss,
}

/// What the backward pass needs.
enum Saved {
    /// The graph.
    Kept(Box<Kept>),
    /// What is left of the layers that are still to come, first layer first; the output, then the gradient of the output
    /// of the layer that is next.
    Recomputed { layers: Vec<SavedLayer>, x: Box<Tensor<2>> },
}

/// What a layer is run again from.
struct SavedLayer {
    input: Tensor<2>,
    /// Where its tokens went, which is where they go again: whatever differs in the second pass, its gradients are those of
    /// the experts that the loss was computed with.
    experts: Option<Tensor<2, Int>>,
}

struct Kept {
    trained: Mistral4,
    /// The stage's input, unless it is made from token ids.
    input: Option<Tensor<2>>,
    output: Tensor<2>,
    /// Sum of the losses of the layers' routers.
    router_losses: Option<Tensor<1>>,
}

impl<'a> Stage<'a> {
    /// All of a model.
    pub fn whole(model: &'a Mistral4, activations: Activations) -> Self {
        Self::new(model, 0..model.text().model.layers.len(), activations)
    }

    /// The layers `layers` of a model.
    pub fn new(model: &'a Mistral4, layers: Range<usize>, activations: Activations) -> Self {
        let (is_first, is_last) = (layers.start == 0, layers.end == model.text().model.layers.len());
        Self { model, run: Run { layers, is_first, is_last }, activations }
    }

    /// Whether it begins with token ids and images.
    pub fn is_first(&self) -> bool {
        self.run.is_first
    }

    /// Whether it ends with the loss.
    pub fn is_last(&self) -> bool {
        self.run.is_last
    }

    /// The input, or the embeddings of the batch.
    fn begin(
        &self,
        store: &mut dyn ParameterStore,
        batch: &LabelledInputs,
        input: Option<Tensor<2>>,
        with_head: bool,
    ) -> Result<Tensor<2>> {
        match input {
            Some(input) => Ok(input),
            None => batch.embed(&store.front(self.run.after(None, with_head))),
        }
    }

    /// Positions and masks, of inputs that were checked when they were embedded.
    fn context(&self, batch: &LabelledInputs) -> Result<LayerContext> {
        let model = &self.model.text().model;
        if let Some(replay) = &batch.router_replay {
            replay.check(model, self.run.layers.clone(), batch.labels.len())?;
        }
        Ok(model.context(&batch.inputs, None)?)
    }

    /// The hidden states after the last layer; if that is the model's, [`Stage::loss_sum`] follows.
    ///
    /// # Shapes
    /// - `input`: `[T, D]`, absent for the first stage; output: `[T, D]`
    ///
    /// # Errors
    /// Inputs that the model refuses.
    pub fn output(
        &self,
        store: &mut dyn ParameterStore,
        batch: &LabelledInputs,
        input: Option<Tensor<2>>,
    ) -> Result<Tensor<2>> {
        let mut x = self.begin(store, batch, input, true)?;
        let context = self.context(batch)?;
        for index in self.run.layers.clone() {
            let layer = store.layer(index, self.run.after(Some(index), true));
            x = layer.forward(x, &context, None, batch.replay(index)).0;
        }
        Ok(x)
    }

    /// The summed cross entropy, given the hidden states after the model's last layer.
    pub fn loss_sum(&self, store: &mut dyn ParameterStore, batch: &LabelledInputs, output: Tensor<2>) -> f64 {
        let (norm, lm_head) = store.head(None);
        let labels = batch.labels(&output.device());
        let loss = lm_head.cross_entropy(norm.forward(output), labels, 0.0);
        f64::from(loss.total.into_scalar::<f32>())
    }

    /// Runs the layers.
    ///
    /// # Shapes
    /// - `input`: `[T, D]`, absent for the first stage
    ///
    /// # Errors
    /// Inputs that the model refuses.
    pub fn forward(
        self,
        store: &mut dyn ParameterStore,
        batch: &LabelledInputs,
        input: Option<Tensor<2>>,
    ) -> Result<StageForward> {
        let mut measured = MicroBatchLoss::default();
        let (saved, context) = match self.activations {
            Activations::Kept => self.keep(batch, input, &mut measured)?,
            Activations::Recomputed => {
                // The backward pass follows at once where the stage is the whole model.
                let with_head = self.run.is_first && self.run.is_last;
                let mut x = self.begin(store, batch, input, with_head)?;
                let context = self.context(batch)?;
                let mut layers = Vec::with_capacity(self.run.layers.len());
                for index in self.run.layers.clone() {
                    let layer = store.layer(index, self.run.after(Some(index), with_head));
                    let (y, routing) = layer.forward(x.clone(), &context, None, batch.replay(index));
                    let experts = routing.as_ref().map(|routing| routing.indices.clone());
                    layers.push(SavedLayer { input: std::mem::replace(&mut x, y), experts });
                    if let Some(routing) = routing {
                        measured.add_routing(index, routing);
                    }
                }
                (Saved::Recomputed { layers, x: Box::new(x) }, context)
            }
        };
        Ok(StageForward { run: self.run, prefix: self.model.text_prefix(), context, saved, measured })
    }

    /// One graph over all layers.
    fn keep(
        &self,
        batch: &LabelledInputs,
        input: Option<Tensor<2>>,
        measured: &mut MicroBatchLoss,
    ) -> Result<(Saved, LayerContext)> {
        let trained = self.model.train();
        let input = input.map(|input| input.autodiff().require_grad());
        let mut x = match &input {
            Some(input) => input.clone(),
            None => batch.embed(&trained)?,
        };
        let context = self.context(batch)?;
        let mut router_losses = None;
        for index in self.run.layers.clone() {
            let layer = &trained.text().model.layers[index];
            let (y, routing) = layer.forward(x, &context, None, batch.replay(index));
            x = y;
            if let Some(loss) = routing.and_then(|routing| measured.add_routing(index, routing)) {
                router_losses = add(router_losses, loss);
            }
        }
        Ok((Saved::Kept(Box::new(Kept { trained, input, output: x, router_losses })), context))
    }
}

impl StageForward {
    /// The hidden states after the last layer, which the next stage takes.
    ///
    /// # Shapes
    /// - output: `[T, D]`
    pub fn output(&self) -> Tensor<2> {
        match &self.saved {
            Saved::Kept(kept) => kept.output.clone().inner(),
            Saved::Recomputed { x, .. } => x.as_ref().clone(),
        }
    }

    /// Runs backward and gives the store the gradients; returns what was measured, and the gradient of the input.
    ///
    /// # Shapes
    /// - `dy`: gradient of the output, `[T, D]`, absent for the last stage, which makes the loss
    /// - output: `[T, D]`, absent for the first stage
    ///
    /// # Errors
    /// Inputs that the model refuses.
    pub fn backward(
        mut self,
        store: &mut dyn ParameterStore,
        batch: &LabelledInputs,
        dy: Option<Tensor<2>>,
        scale: LossScale,
    ) -> Result<(MicroBatchLoss, Option<Tensor<2>>)> {
        match &mut self.saved {
            Saved::Recomputed { x, .. } => match dy {
                Some(dy) => **x = dy,
                None => self.head(store, batch, scale),
            },
            Saved::Kept(_) => return Ok(self.backward_of_graph(store, batch, dy, scale)),
        }
        while self.layer(store, scale) {}
        if self.run.is_first {
            self.front(store, batch)?;
            return Ok((self.measured, None));
        }
        let dx = self.output();
        Ok((self.measured, Some(dx)))
    }

    fn backward_of_graph(
        mut self,
        store: &mut dyn ParameterStore,
        batch: &LabelledInputs,
        dy: Option<Tensor<2>>,
        scale: LossScale,
    ) -> (MicroBatchLoss, Option<Tensor<2>>) {
        let Saved::Kept(kept) = self.saved else { unreachable!("the caller saw a graph") };
        let Kept { trained, input, output, router_losses } = *kept;
        let total = match dy {
            Some(dy) => seeded(output, dy),
            None => {
                let text = trained.text();
                let labels = batch.labels(&output.device().without_autodiff());
                let h = text.model.norm.forward(output);
                let loss = text.lm_head.cross_entropy(h, labels, scale.z_loss);
                self.measured.add_tokens(&loss);
                loss.total * scale.per_token
            }
        };
        let router_losses = router_losses.map(|loss| loss * scale.aux);
        let total = add(router_losses, total).expect("a part was just added");
        let dx = total.is_tracked().then(|| {
            let mut from = total.backward();
            give_all(&trained, &mut from, store);
            input.map(|input| input.grad_remove(&mut from).expect("it requires its gradient"))
        });
        (self.measured, dx.flatten())
    }

    /// Where the way back is; activations are recomputed on it.
    fn way_back(&mut self) -> (&mut Vec<SavedLayer>, &mut Tensor<2>) {
        match &mut self.saved {
            Saved::Recomputed { layers, x } => (layers, x.as_mut()),
            Saved::Kept(_) => unreachable!("a graph is run back as a whole"),
        }
    }

    /// The loss, and the gradients of the output projection and of the final norm.
    pub(super) fn head(&mut self, store: &mut dyn ParameterStore, batch: &LabelledInputs, scale: LossScale) {
        let (norm, lm_head) = store.head(self.run.before(self.run.layers.end, store));
        let (norm, lm_head) = (norm.train(), lm_head.train());
        let prefix = self.prefix;
        let (_, x) = self.way_back();
        let labels = batch.labels(&x.device());
        let leaf = x.clone().autodiff().require_grad();
        let loss = lm_head.cross_entropy(norm.forward(leaf.clone()), labels, scale.z_loss);
        let mut from = (loss.total.clone() * scale.per_token).backward();
        let mut gradients = collect(&norm, &format!("{prefix}model.norm."), &mut from);
        gradients.extend(collect(&lm_head, &format!("{prefix}lm_head."), &mut from));
        *x = leaf.grad_remove(&mut from).expect("the leaf requires its gradient");
        self.measured.add_tokens(&loss);
        store.add(Unit::Head, gradients);
    }

    /// The gradients of the last layer that is left; false when there is none.
    pub(super) fn layer(&mut self, store: &mut dyn ParameterStore, scale: LossScale) -> bool {
        let (layers, x) = self.way_back();
        let Some(SavedLayer { input, experts }) = layers.pop() else { return false };
        let (left, dy) = (layers.len(), x.clone());
        let index = self.run.layers.start + left;
        let layer = store.layer(index, self.run.before(index, store)).train();
        let leaf = input.autodiff().require_grad();
        let (y, routing) = layer.forward(leaf.clone(), &self.context, None, experts.as_ref());
        let losses = routing.and_then(|routing| router_losses(routing.aux_loss, routing.z_loss));
        let losses = losses.map(|loss| loss * scale.aux);
        let total = add(losses, seeded(y, dy)).expect("a part was just added");
        let mut from = total.backward();
        let prefix = format!("{}model.layers.{index}.", self.prefix);
        store.add(Unit::Layer(index), collect(&layer, &prefix, &mut from));
        let dx = leaf.grad_remove(&mut from).expect("the leaf requires its gradient");
        *self.way_back().1 = dx;
        true
    }

    /// The gradients of the embeddings, and of the vision tower and the projector.
    pub(super) fn front(&self, store: &mut dyn ParameterStore, batch: &LabelledInputs) -> Result<()> {
        if !store.trains(Unit::Front) {
            return Ok(());
        }
        let trained = store.front(None).train();
        let embeds = trained.embed(&batch.inputs)?;
        let mut gradients = Vec::new();
        if embeds.is_tracked() {
            let mut from = seeded(embeds, self.output()).backward();
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

/// Gives a store the gradients of all of a model's parameters, unit by unit.
fn give_all(trained: &Mistral4, from: &mut BurnGradients, store: &mut dyn ParameterStore) {
    let mut units: HashMap<Unit, Vec<(String, Tensor<1>)>> = HashMap::new();
    trained.take_gradients(from, |key, gradient| {
        let unit = Unit::of(&key, trained.text_prefix());
        units.entry(unit).or_default().push((key, gradient));
    });
    units.into_iter().for_each(|(unit, gradients)| store.add(unit, gradients));
}

/// A scalar whose gradient by `y` is `dy`.
fn seeded(y: Tensor<2>, dy: Tensor<2>) -> Tensor<1> {
    (y * dy.autodiff()).sum()
}

fn add(total: Option<Tensor<1>>, part: Tensor<1>) -> Option<Tensor<1>> {
    Some(match total {
        Some(total) => total + part,
        None => part,
    })
}
