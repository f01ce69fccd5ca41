//! The latent cache: `compressed_kv` and `k_pe` of every past token, R + rope values a token and layer.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::error::{Error, Result};
use crate::inputs::{Layout, ModelInputs};
use crate::ops::Segment;

/// Slots that a cache grows by at least.
const GROWTH: usize = 256;

/// Past latents of a batch of rows that advance together.
#[derive(Debug, Clone, Default)]
pub struct LatentCache {
    layers: Vec<LayerCache>,
    /// Slots in use, the same in each row.
    length: usize,
    /// First slot of each row that holds a token (left padding lies before it).
    starts: Vec<usize>,
}

/// Past latents of one layer.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    /// `[B, capacity, R + rope]`: the normed `compressed_kv`, then the rotated `k_pe`.
    latent: Option<Tensor<3>>,
    length: usize,
}

impl LatentCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens in each row, padding included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing has been cached yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that the latents take, slots kept free for later tokens included.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor<3>| t.shape().num_elements() * t.dtype().size();
        self.layers.iter().filter_map(|l| l.latent.as_ref()).map(of).sum()
    }

    /// Checks that `inputs` continue this cache and notes where their rows begin; called once a forward pass.
    ///
    /// # Errors
    /// Packed input, right padding, another number of rows, or padding after the first pass.
    pub(crate) fn begin(&mut self, inputs: &ModelInputs, layers: usize) -> Result<()> {
        let Layout::Rows { batch, sequence } = inputs.layout else {
            return Err(Error::Unsupported("a cache goes with rows, not with packed input".into()));
        };
        if inputs.explicit_mask.is_some() {
            return Err(Error::Unsupported("a cache does not go with an explicit mask".into()));
        }
        if self.is_empty() {
            self.layers = vec![LayerCache::default(); layers];
            self.starts = (0..batch)
                .map(|row| match inputs.valid_span(row, sequence) {
                    Some((start, end)) if end == sequence => Ok(start),
                    _ => {
                        Err(Error::Unsupported(format!("row {row}: a cache takes padding on the left only")))
                    }
                })
                .collect::<Result<_>>()?;
        } else if inputs.attention_mask.as_ref().is_some_and(|mask| mask.contains(&false)) {
            return Err(Error::Unsupported("padding after the first pass of a cache".into()));
        }
        if batch != self.starts.len() {
            let why = "rows of the first pass".into();
            return Err(Error::Length { name: "batch", got: batch, expected: self.starts.len(), why });
        }
        Ok(())
    }

    /// Counts the tokens of a finished forward pass.
    pub(crate) fn advance(&mut self, sequence: usize) {
        self.length += sequence;
    }

    pub(crate) fn layer(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }

    /// Takes the slots of a single row out, layer by layer, from its first token on; `None` for several rows or none.
    ///
    /// # Shapes
    /// - each layer: `[tokens, R + rope]`
    #[cfg(feature = "flex")]
    pub(crate) fn take_row(&mut self) -> Option<Vec<Tensor<2>>> {
        let [start] = self.starts[..] else { return None };
        let length = std::mem::take(&mut self.length);
        let slots = |layer: LayerCache| {
            let latent = layer.latent?;
            let [_, capacity, width] = latent.dims();
            Some(latent.reshape([capacity, width]).slice_dim(0, start..length))
        };
        std::mem::take(&mut self.layers).into_iter().map(slots).collect()
    }

    /// Segments of `sequence` new tokens a row over the cached ones and themselves, keys indexed in the flattened
    /// `[B * slots]`, where `slots` counts the cached and new tokens.
    pub(crate) fn segments(&self, sequence: usize) -> Arc<[Segment]> {
        let slots = self.length + sequence;
        let rows = self.starts.iter().enumerate();
        rows.map(|(row, &start)| {
            // Queries before the first token of a left-padded row see nothing.
            let skipped = start.saturating_sub(self.length).min(sequence);
            Segment {
                q: row * sequence + skipped..(row + 1) * sequence,
                k: row * slots + start.min(slots)..(row + 1) * slots,
                causal: Some((self.length + skipped).saturating_sub(start) as isize),
            }
        })
        .collect()
    }
}

impl LayerCache {
    /// Appends the latents of new tokens and returns all.
    ///
    /// # Shapes
    /// - `new`: `[B, S, R + rope]`, output: `[B, length + S, R + rope]`
    pub(crate) fn append(&mut self, new: Tensor<3>) -> Tensor<3> {
        let [batch, sequence, width] = new.dims();
        let length = self.length + sequence;
        let latent = match self.latent.take() {
            Some(latent) if latent.dims()[1] >= length => latent,
            old => {
                let capacity = (length + GROWTH).max(old.as_ref().map_or(0, |t| 2 * t.dims()[1]));
                let grown = Tensor::zeros([batch, capacity, width], (&new.device(), new.dtype()));
                match old {
                    Some(old) => {
                        let old = old.slice_dim(1, 0..self.length);
                        grown.slice_assign([0..batch, 0..self.length, 0..width], old)
                    }
                    None => grown,
                }
            }
        };
        let latent = latent.slice_assign([0..batch, self.length..length, 0..width], new);
        self.length = length;
        let all = latent.clone().slice_dim(1, 0..length);
        self.latent = Some(latent);
        all
    }
}
