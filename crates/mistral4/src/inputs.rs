//! What goes into a forward pass, and the plan that every layer reads: positions, segments, masks.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::error::{Error, Result};
use crate::model::replay::RouterReplay;
use crate::ops::Segment;

/// How the tokens lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// `batch` rows of `sequence` tokens each (BSHD).
    Rows {
        /// Rows, B.
        batch: usize,
        /// Tokens a row, S.
        sequence: usize,
    },
    /// Sequences laid end to end (THD): sequence `i` is `cu_seqlens[i]..cu_seqlens[i + 1]`.
    Packed {
        /// Offsets of the sequences, from 0 to the number of tokens.
        cu_seqlens: Vec<usize>,
    },
}

impl Layout {
    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        match self {
            Layout::Rows { batch, sequence } => batch * sequence,
            Layout::Packed { cu_seqlens } => cu_seqlens.last().copied().unwrap_or(0),
        }
    }
}

/// Images of a batch, in the order in which their tokens stand in it.
#[derive(Debug, Clone)]
pub struct Images {
    /// `[images, channels, height, width]`, each image in the upper left corner, padded to the largest.
    pub pixel_values: Tensor<4>,
    /// Height and width of each image, in pixels.
    pub image_sizes: Vec<(usize, usize)>,
}

/// The arguments of a forward pass.
#[derive(Debug, Clone)]
pub struct ModelInputs {
    /// Token ids, `[T]`.
    pub input_ids: Option<Vec<u32>>,
    /// Embeddings in place of ids, `[T, D]`.
    pub inputs_embeds: Option<Tensor<2>>,
    /// How the tokens lie.
    pub layout: Layout,
    /// `[B * S]`, true for tokens, false for padding.
    pub attention_mask: Option<Vec<bool>>,
    /// `[B, 1 or N, S, S]`, added to the scores in place of the causal mask.
    pub explicit_mask: Option<Tensor<4>>,
    /// `[T]`; by default each row or sequence counts from 0.
    pub position_ids: Option<Vec<i64>>,
    /// Images whose features take the place of the image tokens.
    pub images: Option<Images>,
}

impl ModelInputs {
    /// `batch` rows of equal length.
    ///
    /// # Shapes
    /// - `input_ids`: `[B * S]`, row after row
    pub fn rows(input_ids: Vec<u32>, batch: usize) -> Self {
        assert!(
            batch > 0 && input_ids.len().is_multiple_of(batch),
            "{} ids do not make {batch} rows",
            input_ids.len()
        );
        let layout = Layout::Rows { batch, sequence: input_ids.len() / batch };
        Self::new(Some(input_ids), None, layout)
    }

    /// Sequences laid end to end.
    ///
    /// # Shapes
    /// - `input_ids`: `[T]`, `cu_seqlens`: `[sequences + 1]`
    pub fn packed(input_ids: Vec<u32>, cu_seqlens: Vec<usize>) -> Self {
        Self::new(Some(input_ids), None, Layout::Packed { cu_seqlens })
    }

    /// Embeddings in place of token ids.
    ///
    /// # Shapes
    /// - `inputs_embeds`: `[T, D]`
    pub fn embeddings(inputs_embeds: Tensor<2>, layout: Layout) -> Self {
        Self::new(None, Some(inputs_embeds), layout)
    }

    fn new(input_ids: Option<Vec<u32>>, inputs_embeds: Option<Tensor<2>>, layout: Layout) -> Self {
        Self {
            input_ids,
            inputs_embeds,
            layout,
            attention_mask: None,
            explicit_mask: None,
            position_ids: None,
            images: None,
        }
    }

    /// Marks padding (false).
    pub fn with_attention_mask(mut self, mask: Vec<bool>) -> Self {
        self.attention_mask = Some(mask);
        self
    }

    /// Replaces the causal mask by one that is added to the scores.
    pub fn with_explicit_mask(mut self, mask: Tensor<4>) -> Self {
        self.explicit_mask = Some(mask);
        self
    }

    /// Sets the positions.
    pub fn with_position_ids(mut self, position_ids: Vec<i64>) -> Self {
        self.position_ids = Some(position_ids);
        self
    }

    /// Adds images.
    pub fn with_images(mut self, images: Images) -> Self {
        self.images = Some(images);
        self
    }

    /// Checks lengths and ranges against each other and against the vocabulary.
    ///
    /// # Errors
    /// Names the input, its length or value, and what was expected.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        if let Layout::Packed { cu_seqlens } = &self.layout {
            if cu_seqlens.first() != Some(&0) {
                return Err(Error::Unsupported("cu_seqlens must begin with 0".into()));
            }
            if let Some(i) = cu_seqlens.windows(2).position(|w| w[1] < w[0]) {
                return Err(Error::Range {
                    name: "cu_seqlens",
                    value: cu_seqlens[i + 1] as i64,
                    index: i + 1,
                    allowed: format!("at least {}", cu_seqlens[i]),
                });
            }
        }
        let tokens = self.layout.tokens();
        let length = |name, got: usize| {
            if got == tokens {
                return Ok(());
            }
            Err(Error::Length { name, got, expected: tokens, why: format!("layout {:?}", self.layout) })
        };
        match (&self.input_ids, &self.inputs_embeds) {
            (Some(ids), None) => {
                length("input_ids", ids.len())?;
                if let Some(index) = ids.iter().position(|&id| id as usize >= vocab_size) {
                    let (value, allowed) = (ids[index] as i64, format!("0..{vocab_size} (vocab_size)"));
                    return Err(Error::Range { name: "input_ids", value, index, allowed });
                }
            }
            (None, Some(embeds)) => length("inputs_embeds", embeds.dims()[0])?,
            (None, None) => return Err(Error::InputChoice { given: "neither" }),
            (Some(_), Some(_)) => return Err(Error::InputChoice { given: "both" }),
        }
        if let Some(mask) = &self.attention_mask {
            length("attention_mask", mask.len())?;
            if matches!(self.layout, Layout::Packed { .. }) {
                return Err(Error::Unsupported(
                    "attention_mask goes with rows; packed input says it by cu_seqlens".into(),
                ));
            }
        }
        if let Some(positions) = &self.position_ids {
            length("position_ids", positions.len())?;
            if let Some(index) = positions.iter().position(|&p| p < 0) {
                return Err(Error::Range {
                    name: "position_ids",
                    value: positions[index],
                    index,
                    allowed: "0 and above".into(),
                });
            }
        }
        if let Some(mask) = &self.explicit_mask {
            let Layout::Rows { batch, sequence } = self.layout else {
                return Err(Error::Unsupported(
                    "an explicit mask goes with rows, not with packed input".into(),
                ));
            };
            let [b, _, q, k] = mask.dims();
            if (b, q, k) != (batch, sequence, sequence) {
                return Err(Error::Unsupported(format!(
                    "explicit mask is {:?}, expected [{batch}, heads or 1, {sequence}, {sequence}]",
                    mask.dims()
                )));
            }
        }
        Ok(())
    }

    /// Positions of the tokens: as given, else counted from `past` in each row or sequence.
    pub(crate) fn positions(&self, past: usize) -> Vec<i64> {
        if let Some(positions) = &self.position_ids {
            return positions.clone();
        }
        match &self.layout {
            Layout::Rows { batch, sequence } => {
                (0..*batch).flat_map(|_| (past..past + sequence).map(|p| p as i64)).collect()
            }
            Layout::Packed { cu_seqlens } => {
                cu_seqlens.windows(2).flat_map(|w| 0..(w[1] - w[0]) as i64).collect()
            }
        }
    }

    /// Causal segments of the tokens among themselves, or `None` when the padding has holes, so that only a dense
    /// mask can say it.
    pub(crate) fn segments(&self) -> Option<Arc<[Segment]>> {
        match &self.layout {
            Layout::Packed { cu_seqlens } => Some(
                cu_seqlens
                    .windows(2)
                    .filter(|w| w[1] > w[0])
                    .map(|w| Segment { q: w[0]..w[1], k: w[0]..w[1], causal: Some(0) })
                    .collect(),
            ),
            Layout::Rows { batch, sequence } => (0..*batch)
                .map(|row| {
                    let base = row * sequence;
                    let (start, end) = self.valid_span(row, *sequence)?;
                    // Queries after the last token (right padding) see the tokens, as in transformers; queries
                    // before the first one (left padding) see nothing.
                    Some(Segment {
                        q: base + start..base + sequence,
                        k: base + start..base + end,
                        causal: Some(0),
                    })
                })
                .collect(),
        }
    }

    /// First token and end of the tokens of a row; `None` if padding lies between them.
    pub(crate) fn valid_span(&self, row: usize, sequence: usize) -> Option<(usize, usize)> {
        let Some(mask) = &self.attention_mask else { return Some((0, sequence)) };
        let mask = &mask[row * sequence..(row + 1) * sequence];
        let Some(start) = mask.iter().position(|&m| m) else { return Some((sequence, sequence)) };
        let end = mask.iter().rposition(|&m| m).map_or(start, |last| last + 1);
        mask[start..end].iter().all(|&m| m).then_some((start, end))
    }
}

/// What a forward pass returns besides logits.
#[derive(Debug, Clone, Default)]
pub struct ForwardOptions {
    /// For which positions logits are computed.
    pub logits_to_keep: LogitsToKeep,
    /// Return the residual stream before each layer and after the final norm.
    pub output_hidden_states: bool,
    /// Return each layer's routing.
    pub output_routing: bool,
    /// Send the tokens to these experts, in place of the routers' choices.
    pub router_replay: Option<RouterReplay>,
}

/// For which positions logits are computed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LogitsToKeep {
    /// All positions.
    #[default]
    All,
    /// The last `n` of each row (of the whole, when packed); 0 means all, as in transformers.
    Last(usize),
    /// These positions of each row (of the whole, when packed).
    Indices(Vec<usize>),
    /// None: the caller wants hidden states only.
    Nothing,
}

impl Images {
    /// Puts the images of several prompts into one batch; `None` for no prompts.
    pub fn join(batches: Vec<Images>) -> Option<Images> {
        let sizes = batches.iter().map(|b| b.pixel_values.dims());
        let height = sizes.clone().map(|d| d[2]).max()?;
        let width = sizes.map(|d| d[3]).max()?;
        let pad = |pixels: &Tensor<4>| {
            let [images, channels, h, w] = pixels.dims();
            let padded = Tensor::zeros([images, channels, height, width], (&pixels.device(), pixels.dtype()));
            padded.slice_assign([0..images, 0..channels, 0..h, 0..w], pixels.clone())
        };
        let pixel_values = Tensor::cat(batches.iter().map(|b| pad(&b.pixel_values)).collect(), 0);
        Some(Images { pixel_values, image_sizes: batches.into_iter().flat_map(|b| b.image_sizes).collect() })
    }
}
