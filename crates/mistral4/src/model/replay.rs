//! Routing that an earlier pass decided, to be taken again.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Int, Tensor};

use crate::error::{Error, Result};
use crate::model::decoder_layer::FeedForward;
use crate::model::gate::Routing;
use crate::model::text::Mistral4Model;

/// The experts of every token, by layer, as an earlier pass chose them.
///
/// A pass that gets them sends every token to the same experts again. Weights and losses of the router are computed as
/// ever, from its logits of that pass, so that gradients flow into it.
///
/// Source: `RouterReplay` in NeMo AutoModel (`components/moe/router_replay.py`).
#[derive(Debug, Clone, Default)]
pub struct RouterReplay(BTreeMap<usize, Tensor<2, Int>>);

impl RouterReplay {
    /// The choices of a forward pass that returned its routing
    /// ([`ForwardOptions::output_routing`](crate::inputs::ForwardOptions::output_routing)).
    pub fn of(routing: &[(usize, Routing)]) -> Self {
        Self(routing.iter().map(|(layer, routing)| (*layer, routing.indices.clone())).collect())
    }

    /// The experts of layer `layer`, `[T, K]`.
    pub fn layer(&self, layer: usize) -> Option<&Tensor<2, Int>> {
        self.0.get(&layer)
    }

    /// Checks that it says where each of `tokens` tokens goes in every mixture layer among `layers`.
    ///
    /// # Errors
    /// Names the layer that is missing, or whose choices are of other tokens or of experts that are not there.
    pub fn check(&self, model: &Mistral4Model, layers: Range<usize>, tokens: usize) -> Result<()> {
        for index in layers {
            let FeedForward::Moe(moe) = &model.layers[index].mlp else { continue };
            let Some(chosen) = self.layer(index) else {
                return Err(Error::Unsupported(format!(
                    "the router replay holds no experts for layer {index}"
                )));
            };
            let (experts, top_k) = moe.gate.choices();
            if chosen.dims() != [tokens, top_k] {
                return Err(Error::Unsupported(format!(
                    "the router replay of layer {index} is {:?}, expected [{tokens} tokens, {top_k} experts each]",
                    chosen.dims()
                )));
            }
            let values = crate::model::gate::int_values(chosen.clone());
            if let Some(at) = values.iter().position(|&expert| !(0..experts as i32).contains(&expert)) {
                let (value, allowed) = (i64::from(values[at]), format!("0..{experts}, in layer {index}"));
                return Err(Error::Range {
                    name: "an expert of the router replay",
                    value,
                    index: at,
                    allowed,
                });
            }
        }
        Ok(())
    }
}
