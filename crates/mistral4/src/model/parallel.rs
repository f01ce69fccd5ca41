//! A model of which each rank holds a part: whole layers, heads and columns, or experts.
//!
//! What a rank holds is decided when its parameters are read; here the modules learn whom to compute with.

use std::sync::Arc;

use crate::model::Mistral4;
use crate::model::decoder_layer::FeedForward;
use crate::ops::Group;

/// The ranks that hold the other parts of this rank's layers; `None`: there are no others.
#[derive(Debug, Clone, Default)]
pub struct ModelGroups {
    /// Ranks with the other heads of attention and the other columns of every feed-forward.
    pub tensor: Option<Arc<dyn Group>>,
    /// Ranks with the other experts.
    pub expert: Option<Arc<dyn Group>>,
}

impl Mistral4 {
    /// Makes the layers, of whose parameters this rank holds a part, compute together with the other ranks.
    ///
    /// Call it once, on a model whose parameters are the parts of the same ranks.
    pub fn set_groups(&mut self, groups: &ModelGroups) {
        for layer in &mut self.text_mut().model.layers {
            if let Some(group) = &groups.tensor {
                layer.self_attn.set_tensor_group(group.clone());
            }
            match &mut layer.mlp {
                FeedForward::Dense(mlp) => {
                    mlp.divide(&groups.tensor);
                    mlp.tensor_group = groups.tensor.clone();
                }
                // The shared experts' part is summed along with that of the routed ones.
                FeedForward::Moe(moe) => {
                    moe.experts.divide(&groups.tensor);
                    moe.shared_experts.divide(&groups.tensor);
                    moe.tensor_group = groups.tensor.clone();
                    moe.expert_group = groups.expert.clone();
                }
            }
        }
    }
}
