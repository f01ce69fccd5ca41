//! From the tower's features to the decoder's embeddings: norm, merging of neighbouring patches, two linear maps.

use burn::module::Module;
use burn::tensor::Tensor;
use mistral4_checkpoint::config::{Activation, MultimodalConfig, TextConfig};

use super::Grid;
use crate::error::Result;
use crate::model::linear::Linear;
use crate::model::norm::RmsNorm;
use crate::ops::activation;
use crate::weights::Parameters;

/// Merges each square of `spatial_merge_size` patches a side into one.
#[derive(Module, Debug)]
pub struct PatchMerger {
    /// `[Dv, Dv * merge * merge]`
    pub merging_layer: Linear,
    merge: usize,
}

/// `linear_2(act(linear_1(patch_merger(norm(x)))))`.
///
/// Source: `Mistral3MultiModalProjector` in transformers.
#[derive(Module, Debug)]
pub struct MultiModalProjector {
    /// `[Dv]`
    pub norm: RmsNorm,
    /// Merging of neighbouring patches.
    pub patch_merger: PatchMerger,
    /// `[D, Dv]`
    pub linear_1: Linear,
    /// `[D, D]`
    pub linear_2: Linear,
    /// Which hidden state of the tower is projected.
    pub vision_feature_layer: usize,
    #[module(skip)]
    act: Activation,
}

impl MultiModalProjector {
    /// Takes the projector from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(c: &MultimodalConfig, text: &TextConfig, parameters: &Parameters) -> Result<Self> {
        let (vision, hidden) = (c.vision_config.hidden_size, text.hidden_size);
        let bias = c.multimodal_projector_bias;
        let merge = c.spatial_merge_size;
        let merger = parameters.pp("patch_merger").pp("merging_layer");
        Ok(Self {
            norm: RmsNorm::new(vision, text.rms_norm_eps, &parameters.pp("norm"))?,
            patch_merger: PatchMerger {
                merging_layer: Linear::new(vision * merge * merge, vision, false, &merger)?,
                merge,
            },
            linear_1: Linear::new(vision, hidden, bias, &parameters.pp("linear_1"))?,
            linear_2: Linear::new(hidden, hidden, bias, &parameters.pp("linear_2"))?,
            vision_feature_layer: c.vision_feature_layer,
            act: c.projector_hidden_act,
        })
    }

    /// # Shapes
    /// - `features`: `[P, Dv]`, output: `[merged patches, D]`
    pub fn forward(&self, features: Tensor<2>, grids: &[Grid]) -> Tensor<2> {
        let merged = self.patch_merger.forward(self.norm.forward(features), grids);
        self.linear_2.forward(activation::apply(self.act, self.linear_1.forward(merged)))
    }
}

impl PatchMerger {
    /// # Shapes
    /// - `features`: `[P, Dv]`, output: `[merged patches, Dv]`
    pub fn forward(&self, features: Tensor<2>, grids: &[Grid]) -> Tensor<2> {
        let width = features.dims()[1];
        let m = self.merge;
        let mut start = 0;
        let mut parts = Vec::with_capacity(grids.len());
        for &(height, columns) in grids {
            let image = features.clone().slice_dim(0, start..start + height * columns);
            start += height * columns;
            // Patches beyond the last whole square fall away, as torch's unfold does it.
            let (rows, cols) = (height / m, columns / m);
            let image = image.reshape([height, columns, width]).slice([0..rows * m, 0..cols * m, 0..width]);
            let squares = image.reshape([rows, m, cols, m, width]).permute([0, 2, 4, 1, 3]);
            parts.push(squares.reshape([rows * cols, width * m * m]));
        }
        self.merging_layer.forward(Tensor::cat(parts, 0))
    }
}
