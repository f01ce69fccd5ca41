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
    /// Slots that each row has memory for.
    capacity: usize,
    /// First slot of each row that holds a token (left padding lies before it).
    starts: Vec<usize>,
}

/// Past latents of one layer.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    /// `[B, capacity, R + rope]`: the normed `compressed_kv`, then the rotated `k_pe`.
    latent: Option<Tensor<3>>,
    length: usize,
    /// Slots that a row has memory for, or will have when something is appended.
    capacity: usize,
}

/// Who sees whom in a pass that begins or continues a cache.
#[derive(Debug, Clone)]
pub struct CachedMask {
    /// Rows.
    pub batch: usize,
    /// Over the slots in use of all rows, one row after the other.
    pub dense: Arc<[Segment]>,
    /// Over all slots, free ones between those of two rows.
    pub in_place: Arc<[Segment]>,
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
        let slots = self.length + sequence;
        if slots > self.capacity {
            self.capacity = (slots + GROWTH).max(2 * self.capacity);
        }
        Ok(())
    }

    /// Counts the tokens of a finished forward pass.
    pub(crate) fn advance(&mut self, sequence: usize) {
        self.length += sequence;
    }

    /// A layer's part, with memory for this pass.
    pub(crate) fn layer(&mut self, index: usize) -> &mut LayerCache {
        let layer = &mut self.layers[index];
        layer.capacity = self.capacity;
        layer
    }

    /// Takes the slots of a single row out, layer by layer, from its first token on; `None` for several rows or none.
    ///
    /// # Shapes
    /// - each layer: `[tokens, R + rope]`
    #[cfg(feature = "flex")]
    pub(crate) fn take_row(&mut self) -> Option<Vec<Tensor<2>>> {
        let [start] = self.starts[..] else { return None };
        let length = std::mem::take(&mut self.length);
        self.capacity = 0;
        let slots = |layer: LayerCache| {
            let latent = layer.latent?;
            let [_, capacity, width] = latent.dims();
            Some(latent.reshape([capacity, width]).slice_dim(0, start..length))
        };
        std::mem::take(&mut self.layers).into_iter().map(slots).collect()
    }

    /// Who sees whom when each row gets `sequence` new tokens.
    pub(crate) fn mask(&self, sequence: usize) -> CachedMask {
        let slots = self.length + sequence;
        CachedMask {
            batch: self.starts.len(),
            dense: self.segments(sequence, slots),
            in_place: self.segments(sequence, self.capacity),
        }
    }

    /// Segments of `sequence` new tokens a row over the cached ones and themselves; the keys of a row begin `stride` after
    /// those of the row before.
    fn segments(&self, sequence: usize, stride: usize) -> Arc<[Segment]> {
        let slots = self.length + sequence;
        let rows = self.starts.iter().enumerate();
        rows.map(|(row, &start)| {
            // Queries before the first token of a left-padded row see nothing.
            let skipped = start.saturating_sub(self.length).min(sequence);
            Segment {
                q: row * sequence + skipped..(row + 1) * sequence,
                k: row * stride + start.min(slots)..row * stride + slots,
                causal: Some((self.length + skipped).saturating_sub(start) as isize),
            }
        })
        .collect()
    }
}

impl LayerCache {
    /// Appends the latents of new tokens.
    ///
    /// # Shapes
    /// - `new`: `[B, S, R + rope]`
    pub(crate) fn append(&mut self, new: Tensor<3>) {
        let [batch, sequence, width] = new.dims();
        let length = self.length + sequence;
        let latent = match self.latent.take() {
            Some(latent) if latent.dims()[1] >= self.capacity => latent,
            old => {
                let grown = Tensor::zeros([batch, self.capacity, width], (&new.device(), new.dtype()));
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
        self.latent = Some(latent);
    }

    /// Slots in use.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// All slots, the free ones among them, where they lie.
    ///
    /// # Shapes
    /// - output: `[B * capacity, R + rope]`
    pub(crate) fn in_place(&self) -> Tensor<2> {
        let latent = self.latent.clone().expect("something was appended");
        latent.flatten(0, 1)
    }

    /// The slots in use, which are copied together where there are several rows.
    ///
    /// # Shapes
    /// - output: `[B * length, R + rope]`
    pub(crate) fn dense(&self) -> Tensor<2> {
        let latent = self.latent.clone().expect("something was appended");
        latent.slice_dim(1, 0..self.length).flatten(0, 1)
    }
}
