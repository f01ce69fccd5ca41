//! Consecutive layers of a model, forward and backward.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Gradients as BurnGradients, Int, Tensor};
use mistral4::model::decoder_layer::{DecoderLayer, LayerContext};
use mistral4::model::{Mistral4, Routing};
use mistral4::ops::{TokenLossScale, zero_with_gradient};
use mistral4::weights::take_gradients;

use super::products::Experts;
use super::{Activations, LabelledInputs, LossScale, MicroBatchLoss, ParameterStore, Unit, router_losses};
use crate::error::Result;

/// Some layers, with the front if the model's first is among them and the head if the last is.
///
/// Parameters are those of a store; of the model only its shape counts.
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

    /// Whether anything is trained before the layer `index`, so that the gradient of its input is needed.
    fn needs_dx(&self, index: usize, store: &dyn ParameterStore) -> bool {
        let mut before = self.layers.start..index;
        !self.is_first || store.trains(Unit::Front) || before.any(|index| store.trains(Unit::Layer(index)))
    }
}

/// A micro-batch between its forward and its backward pass, or on its way back, a layer at a time.
pub struct StageForward {
    run: Run,
    prefix: &'static str,
    context: LayerContext,
    /// The model that made the embeddings under autodiff, and these, where that graph is kept.
    front: Option<(Mistral4, Tensor<2>)>,
    /// The layers that are still to come on the way back, first layer first.
    layers: Vec<SavedLayer>,
    /// The output, then the gradient of the output of the layer that is next.
    x: Tensor<2>,
    pub(super) measured: MicroBatchLoss,
}

/// A layer that the backward pass comes to.
struct SavedLayer {
    index: usize,
    from: From,
}

/// What the backward pass of a layer begins with.
#[allow(clippy::large_enum_variant, reason = "tensors are handles: moving them costs little")]
enum From {
    /// What it is run again from: the input, and where its tokens went, which is where they go again. Whatever differs in
    /// the second pass, its gradients are those of the experts that the loss was computed with.
    Input(Tensor<2>, Option<Tensor<2, Int>>),
    /// The graph of the forward pass.
    Graph(Box<LayerGraph>),
}

/// A layer that was run under autodiff.
struct LayerGraph {
    layer: DecoderLayer,
    /// Asks for its gradient where anything before the layer is trained.
    input: Tensor<2>,
    output: Tensor<2>,
    /// The losses of its router.
    losses: Option<Tensor<1>>,
}

impl LayerGraph {
    /// Runs a layer; `losses` gets its routing and says what of it is to be differentiated.
    fn run(
        layer: DecoderLayer,
        input: Tensor<2>,
        needs_dx: bool,
        forward: impl FnOnce(&DecoderLayer, Tensor<2>) -> (Tensor<2>, Option<Routing>),
        losses: impl FnOnce(Routing) -> Option<Tensor<1>>,
    ) -> Self {
        let layer = layer.train();
        let input = input.autodiff().set_require_grad(needs_dx);
        let (output, routing) = forward(&layer, input.clone());
        Self { layer, input, output, losses: routing.and_then(losses) }
    }

    /// The gradients of the layer's parameters by their keys in it, and, where it is needed, of its input.
    fn backward(self, dy: Tensor<2>, scale: LossScale, prefix: &str) -> (NamedGradients, Option<Tensor<2>>) {
        let losses = self.losses.map(|losses| losses * scale.aux);
        let seed = zero_with_gradient(self.output, dy);
        let mut from = match losses {
            Some(losses) => losses + seed,
            None => seed,
        }
        .backward();
        (collect(&self.layer, prefix, &mut from), self.input.grad_remove(&mut from))
    }
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
        let mut x = match input {
            Some(input) => input,
            None => batch.embed(&store.front(self.run.after(None, true)))?,
        };
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
        let scale = TokenLossScale { per_token: 1.0, z_loss: 0.0 };
        let loss = lm_head.cross_entropy(norm.forward(output), labels, scale);
        f64::from(loss.cross_entropy.into_scalar::<f32>())
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
        // The backward pass follows at once where the stage is the whole model.
        let with_head = self.run.is_first && self.run.is_last;
        let is_kept = self.activations == Activations::Kept;
        let mut front = None;
        let mut x = match input {
            Some(input) => input,
            None => {
                let model = store.front(self.run.after(None, with_head));
                if is_kept && store.trains(Unit::Front) {
                    let trained = model.train();
                    let embeds = batch.embed(&trained)?;
                    front.insert((trained, embeds)).1.clone().inner()
                } else {
                    batch.embed(&model)?
                }
            }
        };
        let context = self.context(batch)?;
        let mut measured = MicroBatchLoss::default();
        let mut layers = Vec::with_capacity(self.run.layers.len());
        for index in self.run.layers.clone() {
            let layer = store.layer(index, self.run.after(Some(index), with_head));
            let replay = batch.replay(index);
            // The backward pass comes to the layer.
            let is_needed = self.run.needs_dx(index + 1, store);
            if is_kept && is_needed {
                let needs_dx = self.run.needs_dx(index, store);
                let forward = |layer: &DecoderLayer, x| layer.forward(x, &context, None, replay);
                let losses = |routing| measured.add_routing(index, routing);
                let graph = LayerGraph::run(layer, x, needs_dx, forward, losses);
                x = graph.output.clone().inner();
                layers.push(SavedLayer { index, from: From::Graph(Box::new(graph)) });
                continue;
            }
            let (y, routing) = layer.forward(x.clone(), &context, None, replay);
            let input = std::mem::replace(&mut x, y);
            if is_needed {
                let experts = routing.as_ref().map(|routing| routing.indices.clone());
                layers.push(SavedLayer { index, from: From::Input(input, experts) });
            }
            if let Some(routing) = routing {
                measured.add_routing(index, routing);
            }
        }
        Ok(StageForward {
            run: self.run,
            prefix: self.model.text_prefix(),
            context,
            front,
            layers,
            x,
            measured,
        })
    }
}

impl StageForward {
    /// The hidden states after the last layer, which the next stage takes.
    ///
    /// # Shapes
    /// - output: `[T, D]`
    pub fn output(&self) -> Tensor<2> {
        self.x.clone()
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
        match dy {
            Some(dy) => self.x = dy,
            None => self.head(store, batch, scale),
        }
        while self.layer(store, scale) {}
        if self.run.is_first {
            self.front(store, batch)?;
            return Ok((self.measured, None));
        }
        Ok((self.measured, Some(self.x)))
    }

    /// The loss, and the gradients of the output projection and of the final norm.
    pub(super) fn head(&mut self, store: &mut dyn ParameterStore, batch: &LabelledInputs, scale: LossScale) {
        let next = self.next_unit(store);
        let (norm, lm_head) = store.head(next);
        let (norm, lm_head) = (norm.train(), lm_head.train());
        let labels = batch.labels(&self.x.device());
        let needs_dx = self.run.needs_dx(self.run.layers.end, store);
        let leaf = self.x.clone().autodiff().set_require_grad(needs_dx);
        let loss = lm_head.cross_entropy(norm.forward(leaf.clone()), labels, scale.of_tokens());
        self.measured.add_tokens(&loss);
        if !loss.total.is_tracked() {
            return;
        }
        let mut from = loss.total.backward();
        let mut gradients = collect(&norm, &format!("{}model.norm.", self.prefix), &mut from);
        gradients.extend(collect(&lm_head, &format!("{}lm_head.", self.prefix), &mut from));
        if let Some(dx) = leaf.grad_remove(&mut from) {
            self.x = dx;
        }
        store.add(Unit::Head, gradients);
    }

    /// The gradients of the last layer that is left; false when there is none.
    pub(super) fn layer(&mut self, store: &mut dyn ParameterStore, scale: LossScale) -> bool {
        let Some(SavedLayer { index, from }) = self.layers.pop() else { return false };
        let graph = match from {
            From::Graph(graph) => *graph,
            From::Input(input, experts) => {
                let layer = store.layer(index, self.next_unit(store));
                let needs_dx = self.run.needs_dx(index, store);
                let forward =
                    |layer: &DecoderLayer, x| layer.forward(x, &self.context, None, experts.as_ref());
                let losses = |routing: Routing| router_losses(routing.aux_loss, routing.z_loss);
                LayerGraph::run(layer, input, needs_dx, forward, losses)
            }
        };
        let prefix = format!("{}model.layers.{index}.", self.prefix);
        let experts = Experts::of(&graph.layer, &prefix).filter(|experts| experts.suit(store));
        experts.iter().for_each(Experts::open);
        let (gradients, dx) = graph.backward(self.x.clone(), scale, &prefix);
        store.add(Unit::Layer(index), gradients);
        if let Some(experts) = experts {
            store.defer(experts.close());
        }
        if let Some(dx) = dx {
            self.x = dx;
        }
        true
    }

    /// The gradients of the embeddings, and of the vision tower and the projector.
    pub(super) fn front(&mut self, store: &mut dyn ParameterStore, batch: &LabelledInputs) -> Result<()> {
        if !store.trains(Unit::Front) {
            return Ok(());
        }
        let (trained, embeds) = match self.front.take() {
            Some(front) => front,
            None => {
                let trained = store.front(None).train();
                let embeds = trained.embed(&batch.inputs)?;
                (trained, embeds)
            }
        };
        let mut gradients = Vec::new();
        if embeds.is_tracked() {
            let mut from = zero_with_gradient(embeds, self.x.clone()).backward();
            trained.take_gradients(&mut from, |key, gradient| gradients.push((key, gradient)));
        }
        store.add(Unit::Front, gradients);
        Ok(())
    }

    /// The unit that the way back needs after the one at hand: the last layer that is left, or the front; `None` where its
    /// graph was kept, or none is needed.
    fn next_unit(&self, store: &dyn ParameterStore) -> Option<Unit> {
        match self.layers.last() {
            Some(SavedLayer { index, from: From::Input(..) }) => Some(Unit::Layer(*index)),
            Some(SavedLayer { from: From::Graph(_), .. }) => None,
            None => {
                let is_needed = self.run.is_first && self.front.is_none() && store.trains(Unit::Front);
                is_needed.then_some(Unit::Front)
            }
        }
    }
}

/// Gradients by key.
type NamedGradients = Vec<(String, Tensor<1>)>;

/// Takes the gradients of a module's parameters out of a backward pass.
fn collect<M: Module>(module: &M, prefix: &str, from: &mut BurnGradients) -> NamedGradients {
    let mut gradients = Vec::new();
    take_gradients(module, from, |key, gradient| gradients.push((format!("{prefix}{key}"), gradient)));
    gradients
}
