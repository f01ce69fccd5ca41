//! Where a walk through a model finds parameters and leaves gradients.

use std::collections::HashSet;

use burn::tensor::{Device, Tensor};
use mistral4::model::Mistral4;
use mistral4::model::decoder_layer::DecoderLayer;
use mistral4::model::linear::Linear;
use mistral4::model::norm::RmsNorm;

use super::{DeferredGradients, Gradients};
use crate::optim::Optimizer;

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

impl Unit {
    /// The unit of a canonical key, of a model whose decoder's keys begin with `prefix`.
    pub fn of(key: &str, prefix: &str) -> Self {
        let Some(rest) = key.strip_prefix(prefix) else { return Self::Front };
        if let Some(rest) = rest.strip_prefix("model.layers.") {
            let index = rest.split('.').next().and_then(|index| index.parse().ok());
            return Self::Layer(index.expect("layers are numbered"));
        }
        let is_head = rest.starts_with("model.norm.") || rest.starts_with("lm_head.");
        if is_head { Self::Head } else { Self::Front }
    }
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

    /// Says whether the backward passes that follow are the step's last ones.
    fn set_last(&mut self, _is_last: bool) {}

    /// Takes the gradients of a unit's parameters, by canonical key, flat.
    fn add(&mut self, unit: Unit, gradients: Vec<(String, Tensor<1>)>);

    /// Whether the gradient of a stack of weights may come as a product, to [`ParameterStore::defer`] in place of
    /// [`ParameterStore::add`]. Nothing may be added to it then.
    fn takes_deferred(&self, _key: &str, _shape: &[usize], _device: &Device) -> bool {
        false
    }

    /// Takes gradients that are not multiplied out.
    fn defer(&mut self, _gradients: DeferredGradients) {
        unreachable!("a store that takes none gets none")
    }
}

/// A model that is all here, or a stage that is.
pub struct Whole<'a> {
    model: &'a Mistral4,
    trained: HashSet<Unit>,
    gradients: &'a mut Gradients,
    /// Who takes gradients that are not multiplied out.
    optimizer: Option<&'a Optimizer>,
}

impl<'a> Whole<'a> {
    /// The model, and where its gradients go.
    pub fn new(model: &'a Mistral4, gradients: &'a mut Gradients) -> Self {
        let trained = model.parameters().into_iter().filter(|parameter| parameter.trainable);
        let trained = trained.map(|parameter| Unit::of(&parameter.key, model.text_prefix())).collect();
        Self { model, trained, gradients, optimizer: None }
    }

    /// The same, for the only backward pass before a step of `optimizer`, which need not have gradients multiplied out.
    pub fn deferring(self, optimizer: &'a Optimizer) -> Self {
        Self { optimizer: Some(optimizer), ..self }
    }
}

impl ParameterStore for Whole<'_> {
    fn front(&mut self, _: Option<Unit>) -> Mistral4 {
        // Values of other units must not be shared: an optimizer may change them while the front's graph lives.
        let prefix = self.model.text_prefix();
        self.model.clone().reshape_parameters(|key, (shape, values)| match Unit::of(key, prefix) {
            Unit::Front => (shape, values),
            _ => (vec![0; shape.len()], Tensor::zeros([0], (&values.device(), values.dtype()))),
        })
    }

    fn layer(&mut self, index: usize, _: Option<Unit>) -> DecoderLayer {
        self.model.text().model.layers[index].clone()
    }

    fn head(&mut self, _: Option<Unit>) -> (RmsNorm, Linear) {
        let text = self.model.text();
        (text.model.norm.clone(), text.lm_head.clone())
    }

    fn trains(&self, unit: Unit) -> bool {
        self.trained.contains(&unit)
    }

    fn add(&mut self, _: Unit, gradients: Vec<(String, Tensor<1>)>) {
        gradients.into_iter().for_each(|(key, gradient)| self.gradients.add(key, gradient));
    }

    fn takes_deferred(&self, key: &str, shape: &[usize], device: &Device) -> bool {
        self.optimizer.is_some_and(|optimizer| optimizer.takes_deferred(key, shape, device))
    }

    fn defer(&mut self, gradients: DeferredGradients) {
        self.gradients.defer(gradients);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_found_by_key() {
        assert_eq!(Unit::of("model.layers.12.mlp.gate.weight", ""), Unit::Layer(12));
        assert_eq!(Unit::of("language_model.lm_head.weight", "language_model."), Unit::Head);
        assert_eq!(Unit::of("language_model.model.embed_tokens.weight", "language_model."), Unit::Front);
        assert_eq!(Unit::of("vision_tower.ln_pre.weight", "language_model."), Unit::Front);
    }
}
