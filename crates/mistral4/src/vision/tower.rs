//! The Pixtral vision tower: patches, two-dimensional rotary embedding, attention within each image.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mistral4_checkpoint::config::VisionConfig;

use super::{Grid, rope};
use crate::error::{Error, Result};
use crate::inputs::Images;
use crate::model::linear::Linear;
use crate::model::mlp::Mlp;
use crate::model::norm::RmsNorm;
use crate::ops::{self, AttentionSpec, RopeSpec, Segment};
use crate::weights::Parameters;

/// Epsilon of every norm in the tower.
///
/// Source: `PixtralAttentionLayer.__init__` in transformers.
const NORM_EPS: f64 = 1e-5;

/// The convolution that turns a patch into a vector, as one linear map over its pixels.
#[derive(Module, Debug)]
pub struct PatchConv {
    /// `[D, channels, patch, patch]`
    pub weight: Param<Tensor<4>>,
}

/// The tower.
#[derive(Module, Debug)]
pub struct PixtralVisionModel {
    /// From pixels to vectors.
    pub patch_conv: PatchConv,
    /// Norm before the first layer.
    pub ln_pre: RmsNorm,
    /// The layers.
    pub transformer: PixtralTransformer,
    patch_size: usize,
    head_dim: usize,
    rope_theta: f64,
}

/// The layers of the tower.
#[derive(Module, Debug)]
pub struct PixtralTransformer {
    /// The layers.
    pub layers: Vec<PixtralAttentionLayer>,
}

/// One layer of the tower.
#[derive(Module, Debug)]
pub struct PixtralAttentionLayer {
    /// Norm before attention.
    pub attention_norm: RmsNorm,
    /// Attention within an image.
    pub attention: PixtralAttention,
    /// Norm before the feed-forward.
    pub ffn_norm: RmsNorm,
    /// The feed-forward.
    pub feed_forward: Mlp,
}

/// Attention in which every patch sees every patch of its image.
#[derive(Module, Debug)]
pub struct PixtralAttention {
    /// `[D, D]`
    pub q_proj: Linear,
    /// `[D, D]`
    pub k_proj: Linear,
    /// `[D, D]`
    pub v_proj: Linear,
    /// `[D, D]`
    pub o_proj: Linear,
    heads: usize,
    head_dim: usize,
}

/// What the layers of one pass share.
struct TowerContext {
    cos: Tensor<2>,
    sin: Tensor<2>,
    segments: Arc<[Segment]>,
}

impl PixtralVisionModel {
    /// Takes the tower from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(c: &VisionConfig, parameters: &Parameters) -> Result<Self> {
        let layers = parameters.pp("transformer").pp("layers");
        let layer = |i: usize| PixtralAttentionLayer::new(c, &layers.pp(i));
        let kernel = [c.hidden_size, c.num_channels, c.patch_size, c.patch_size];
        Ok(Self {
            patch_conv: PatchConv { weight: parameters.pp("patch_conv").get("weight", kernel)? },
            ln_pre: RmsNorm::new(c.hidden_size, NORM_EPS, &parameters.pp("ln_pre"))?,
            transformer: PixtralTransformer {
                layers: (0..c.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            },
            patch_size: c.patch_size,
            head_dim: c.head_dim,
            rope_theta: c.rope_theta,
        })
    }

    /// Hidden state `feature_layer` (0: the input of the first layer) of every patch, and each image's grid.
    ///
    /// # Shapes
    /// - output: `[P, D]`, the patches of the images end to end, row by row
    ///
    /// # Errors
    /// Image sizes that do not fit the pixels.
    pub fn forward(&self, images: &Images, feature_layer: usize) -> Result<(Tensor<2>, Vec<Grid>)> {
        let (patches, grids) = self.patches(images)?;
        let [hidden, ..] = self.patch_conv.weight.dims();
        let kernel = self.patch_conv.weight.val();
        let width = patches.dims()[1];
        let patches = patches.cast(kernel.dtype());
        let x = ops::linear(patches, kernel.reshape([hidden, width]));
        let mut x = self.ln_pre.forward(x);
        let device = x.device().without_autodiff();
        let (cos, sin) = rope::tables(self.rope_theta, self.head_dim, &grids, &device);
        let context = TowerContext { cos, sin, segments: segments(&grids) };
        for layer in self.transformer.layers.iter().take(feature_layer) {
            x = layer.forward(x, &context);
        }
        Ok((x, grids))
    }

    /// Cuts the images into patches.
    ///
    /// # Shapes
    /// - output: `[P, channels * patch * patch]`
    fn patches(&self, images: &Images) -> Result<(Tensor<2>, Vec<Grid>)> {
        let [count, channels, height, width] = images.pixel_values.dims();
        let p = self.patch_size;
        if images.image_sizes.len() != count {
            let why = "images in pixel_values".into();
            return Err(Error::Length {
                name: "image_sizes",
                got: images.image_sizes.len(),
                expected: count,
                why,
            });
        }
        let mut parts = Vec::with_capacity(count);
        let mut grids = Vec::with_capacity(count);
        for (index, &(h, w)) in images.image_sizes.iter().enumerate() {
            for (side, limit) in [(h, height), (w, width)] {
                if side < p || side > limit {
                    let allowed = format!("{p}..={limit} (one patch to the size of pixel_values)");
                    return Err(Error::Range { name: "image_sizes", value: side as i64, index, allowed });
                }
            }
            let (rows, columns) = (h / p, w / p);
            let image = images.pixel_values.clone();
            let image = image.slice([index..index + 1, 0..channels, 0..rows * p, 0..columns * p]);
            let cut = image.reshape([channels, rows, p, columns, p]).permute([1, 3, 0, 2, 4]);
            parts.push(cut.reshape([rows * columns, channels * p * p]));
            grids.push((rows, columns));
        }
        if parts.is_empty() {
            return Err(Error::Unsupported("pixel_values holds no image".into()));
        }
        Ok((Tensor::cat(parts, 0), grids))
    }
}

/// Each image's patches see each other and nothing else.
fn segments(grids: &[Grid]) -> Arc<[Segment]> {
    let mut end = 0;
    let span = |(h, w): &Grid| {
        let start = end;
        end += h * w;
        Segment { q: start..end, k: start..end, causal: None }
    };
    grids.iter().map(span).collect()
}

impl PixtralAttentionLayer {
    fn new(c: &VisionConfig, parameters: &Parameters) -> Result<Self> {
        let norm = |name| RmsNorm::new(c.hidden_size, NORM_EPS, &parameters.pp(name));
        let feed_forward = parameters.pp("feed_forward");
        Ok(Self {
            attention_norm: norm("attention_norm")?,
            attention: PixtralAttention::new(c, &parameters.pp("attention"))?,
            ffn_norm: norm("ffn_norm")?,
            feed_forward: Mlp::new(c.hidden_size, c.intermediate_size, c.hidden_act, &feed_forward)?,
        })
    }

    fn forward(&self, x: Tensor<2>, context: &TowerContext) -> Tensor<2> {
        let x = x.clone() + self.attention.forward(self.attention_norm.forward(x), context);
        x.clone() + self.feed_forward.forward(self.ffn_norm.forward(x))
    }
}

impl PixtralAttention {
    fn new(c: &VisionConfig, parameters: &Parameters) -> Result<Self> {
        let inner = c.num_attention_heads * c.head_dim;
        let linear = |name, input, output| Linear::new(input, output, false, &parameters.pp(name));
        Ok(Self {
            q_proj: linear("q_proj", c.hidden_size, inner)?,
            k_proj: linear("k_proj", c.hidden_size, inner)?,
            v_proj: linear("v_proj", c.hidden_size, inner)?,
            o_proj: linear("o_proj", inner, c.hidden_size)?,
            heads: c.num_attention_heads,
            head_dim: c.head_dim,
        })
    }

    fn forward(&self, x: Tensor<2>, context: &TowerContext) -> Tensor<2> {
        let patches = x.dims()[0];
        let (heads, width) = (self.heads, self.head_dim);
        let split = |x: Tensor<2>| x.reshape([patches, heads, width]);
        let rotate = |x| {
            let spec = RopeSpec { offset: 0, interleaved: false, scale: None };
            ops::rope(x, context.cos.clone(), context.sin.clone(), spec)
        };
        let q = rotate(split(self.q_proj.forward(x.clone())));
        let k = rotate(split(self.k_proj.forward(x.clone())));
        let v = split(self.v_proj.forward(x));
        let spec = AttentionSpec { scale: (width as f64).powf(-0.5), segments: context.segments.clone() };
        self.o_proj.forward(ops::attention(q, k, v, spec).reshape([patches, heads * width]))
    }
}
