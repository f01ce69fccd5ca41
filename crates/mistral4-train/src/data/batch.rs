//! Rows of different lengths into one batch: padded on the right, or laid end to end.

use std::sync::Arc;

use mistral4_processor::ProcessedImage;

use super::{IGNORE_INDEX, Sample};

/// How the tokens of a batch lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BatchLayout {
    /// `batch` rows of `sequence` tokens, padded on the right.
    Rows {
        /// Rows, B.
        batch: usize,
        /// Tokens of a row, S.
        sequence: usize,
    },
    /// Sequences laid end to end: sequence `i` is `cu_seqlens[i]..cu_seqlens[i + 1]`; none sees another.
    Packed {
        /// Offsets, from 0 to the number of tokens.
        cu_seqlens: Vec<usize>,
    },
}

/// Samples that go through the model together.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Token ids, `[T]` (`[B * S]` row after row when padded).
    pub input_ids: Vec<u32>,
    /// What each position should predict, or [`IGNORE_INDEX`], `[T]`.
    pub labels: Vec<i64>,
    /// Position of each token in its sequence, `[T]`.
    pub position_ids: Vec<i64>,
    /// True for tokens, false for padding, `[T]`; `None` when nothing is padded.
    pub attention_mask: Option<Vec<bool>>,
    /// How the tokens lie.
    pub layout: BatchLayout,
    /// Images in the order of their tokens.
    pub images: Vec<Arc<ProcessedImage>>,
    /// Tokens without padding.
    pub num_tokens: usize,
    /// Positions that are learned.
    pub num_label_tokens: usize,
    /// Rows of the data set, for messages about this batch.
    pub rows: Vec<usize>,
}

impl Batch {
    /// Pads samples on the right with `pad_id` to the longest of them.
    pub fn padded(samples: Vec<Sample>, rows: Vec<usize>, pad_id: u32) -> Self {
        assert!(!samples.is_empty(), "a batch has at least one sample");
        let sequence = samples.iter().map(|sample| sample.input_ids.len()).max().unwrap_or(0);
        let batch = samples.len();
        let mut out = Self::empty(BatchLayout::Rows { batch, sequence }, rows);
        let mut mask = Vec::with_capacity(batch * sequence);
        for sample in samples {
            let length = out.push(sample);
            mask.extend((0..sequence).map(|t| t < length));
            let end = mask.len();
            out.input_ids.resize(end, pad_id);
            out.labels.resize(end, IGNORE_INDEX);
            out.position_ids.extend(length as i64..sequence as i64);
        }
        out.attention_mask = mask.contains(&false).then_some(mask);
        out
    }

    /// Pairs of a token and one that it sees, itself included.
    pub(crate) fn attended_pairs(&self) -> usize {
        let pairs = |length: usize| length * (length + 1) / 2;
        match (&self.layout, &self.attention_mask) {
            (BatchLayout::Packed { cu_seqlens }, _) => {
                cu_seqlens.windows(2).map(|ends| pairs(ends[1] - ends[0])).sum()
            }
            (&BatchLayout::Rows { batch, sequence }, None) => batch * pairs(sequence),
            (&BatchLayout::Rows { sequence, .. }, Some(mask)) => {
                mask.chunks(sequence.max(1)).map(|row| pairs(row.iter().filter(|&&real| real).count())).sum()
            }
        }
    }

    /// Lays samples end to end.
    pub fn packed(samples: Vec<Sample>, rows: Vec<usize>) -> Self {
        assert!(!samples.is_empty(), "a batch has at least one sample");
        let mut cu_seqlens = vec![0];
        let mut out = Self::empty(BatchLayout::Packed { cu_seqlens: Vec::new() }, rows);
        for sample in samples {
            out.push(sample);
            cu_seqlens.push(out.input_ids.len());
        }
        out.layout = BatchLayout::Packed { cu_seqlens };
        out
    }

    /// One token that counts nowhere: what a rank passes through the model when others have a batch left and it has none.
    pub fn filler(pad_id: u32) -> Self {
        Self {
            input_ids: vec![pad_id],
            labels: vec![IGNORE_INDEX],
            position_ids: vec![0],
            ..Self::empty(BatchLayout::Rows { batch: 1, sequence: 1 }, Vec::new())
        }
    }

    /// Whether it is a filler.
    pub fn is_filler(&self) -> bool {
        self.num_tokens == 0
    }

    fn empty(layout: BatchLayout, rows: Vec<usize>) -> Self {
        Self {
            input_ids: Vec::new(),
            labels: Vec::new(),
            position_ids: Vec::new(),
            attention_mask: None,
            layout,
            images: Vec::new(),
            num_tokens: 0,
            num_label_tokens: 0,
            rows,
        }
    }

    /// Appends one sample and returns its length.
    fn push(&mut self, sample: Sample) -> usize {
        let length = sample.input_ids.len();
        self.num_tokens += length;
        self.num_label_tokens += sample.num_label_tokens();
        self.input_ids.extend(sample.input_ids);
        self.labels.extend(sample.labels);
        self.position_ids.extend(0..length as i64);
        self.images.extend(sample.images);
        length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(ids: &[u32]) -> Sample {
        Sample::from_unshifted(ids.to_vec(), ids.iter().map(|&id| i64::from(id)).collect())
    }

    #[test]
    fn rows_are_padded_on_the_right() {
        let batch = Batch::padded(vec![sample(&[5, 6, 7]), sample(&[8])], vec![0, 1], 11);
        assert_eq!(batch.input_ids, [5, 6, 7, 8, 11, 11]);
        assert_eq!(batch.labels, [6, 7, -100, -100, -100, -100]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1, 2]);
        assert_eq!(batch.attention_mask.as_deref(), Some(&[true, true, true, true, false, false][..]));
        assert_eq!(batch.layout, BatchLayout::Rows { batch: 2, sequence: 3 });
        assert_eq!((batch.num_tokens, batch.num_label_tokens), (4, 2));
    }

    #[test]
    fn equal_rows_need_no_mask() {
        assert_eq!(Batch::padded(vec![sample(&[1, 2]), sample(&[3, 4])], vec![0, 1], 0).attention_mask, None);
    }

    #[test]
    fn packed_positions_restart() {
        let batch = Batch::packed(vec![sample(&[5, 6, 7]), sample(&[8, 9])], vec![0, 1]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1]);
        assert_eq!(batch.labels, [6, 7, -100, 9, -100]);
        assert_eq!(batch.layout, BatchLayout::Packed { cu_seqlens: vec![0, 3, 5] });
    }

    proptest! {
        #[test]
        fn padding_and_packing_hold_the_same_tokens(
            rows in proptest::collection::vec(proptest::collection::vec(0u32..50, 1..12), 1..8)
        ) {
            let samples: Vec<_> = rows.iter().map(|row| sample(row)).collect();
            let padded = Batch::padded(samples.clone(), Vec::new(), 99);
            let packed = Batch::packed(samples, Vec::new());
            let keep = padded.attention_mask.clone().unwrap_or_else(|| vec![true; padded.input_ids.len()]);
            let kept = |t: &usize| keep[*t];
            let tokens: Vec<_> = (0..keep.len()).filter(kept).map(|t| padded.input_ids[t]).collect();
            let labels: Vec<_> = (0..keep.len()).filter(kept).map(|t| padded.labels[t]).collect();
            let positions: Vec<_> = (0..keep.len()).filter(kept).map(|t| padded.position_ids[t]).collect();
            prop_assert_eq!(tokens, packed.input_ids);
            prop_assert_eq!(labels, packed.labels);
            prop_assert_eq!(positions, packed.position_ids);
            prop_assert_eq!(padded.num_label_tokens, packed.num_label_tokens);
        }
    }
}
