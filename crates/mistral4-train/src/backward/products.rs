//! Gradients of experts' weights that stay products until the optimizer needs them.

use std::collections::BTreeMap;

use burn::tensor::Device;
use mistral4::model::decoder_layer::{DecoderLayer, FeedForward};
use mistral4::ops::{Deferral, DeferredGradient, ExpertGradients};

use super::ParameterStore;

/// Gradients by canonical key that are not multiplied out.
pub type DeferredGradients = BTreeMap<String, DeferredGradient>;

/// The routed experts of a layer.
pub(super) struct Experts {
    keys: [String; 2],
    shapes: [[usize; 3]; 2],
    device: Device,
    deferral: Deferral,
}

impl Experts {
    /// Those of a layer whose keys begin with `prefix`.
    pub(super) fn of(layer: &DecoderLayer, prefix: &str) -> Option<Self> {
        let FeedForward::Moe(moe) = &layer.mlp else { return None };
        let experts = &moe.experts;
        Some(Self {
            keys: ["gate_up_proj", "down_proj"].map(|name| format!("{prefix}mlp.experts.{name}")),
            shapes: [experts.gate_up_proj.dims(), experts.down_proj.dims()],
            device: layer.input_layernorm.weight.device(),
            deferral: experts.deferral.clone(),
        })
    }

    /// Whether a store takes the gradients as products.
    pub(super) fn suit(&self, store: &dyn ParameterStore) -> bool {
        let mut weights = self.keys.iter().zip(&self.shapes);
        weights.all(|(key, shape)| store.takes_deferred(key, shape, &self.device))
    }

    /// Lets the backward pass that follows leave them.
    pub(super) fn open(&self) {
        self.deferral.open();
    }

    /// What it left.
    pub(super) fn close(self) -> DeferredGradients {
        let Some(ExpertGradients { gate_up, down }) = self.deferral.close() else { return BTreeMap::new() };
        self.keys.into_iter().zip([gate_up, down]).collect()
    }
}
