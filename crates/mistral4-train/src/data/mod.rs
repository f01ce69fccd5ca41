//! From files to batches: data sets, a seeded and resumable order, padding or packing.
//!
//! A [`Dataset`] gives one [`Sample`] for an index, a [`StreamDataset`] gives them one after another; a [`Loader`] decides
//! which of them make a [`Batch`].

mod batch;
mod chat;
mod documents;
mod image_questions;
mod images;
mod indexed;
mod instruction;
mod jsonl;
mod loader;
mod mock;
pub mod optdigits;
mod order;
mod parquet;
mod paths;
mod prefetch;
mod pretokenized;
mod row;
mod source;
mod step;
mod stream;
mod text;
mod windows;

use std::sync::Arc;

pub use batch::{Batch, BatchLayout};
pub use loader::{DataRank, Loader, LoaderOptions, LoaderState, Skipped, StepBatches};
pub use mock::MockDataset;
pub(crate) use order::SplitMix64;
pub use pretokenized::PretokenizedJsonl;
pub use row::Row;
pub use source::{DataContext, guess_target, learn_tokenizer, open};
pub use stream::{SampleStream, StreamDataset, StreamPlace, StreamedSample};

use mistral4_processor::ProcessedImage;

use crate::error::Result;

/// The label of a position that is not learned.
pub const IGNORE_INDEX: i64 = -100;

/// One training example.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Token ids, `[S]`.
    pub input_ids: Vec<u32>,
    /// What position `t` should predict, or [`IGNORE_INDEX`], `[S]`.
    pub labels: Vec<i64>,
    /// Images in the order of their tokens.
    pub images: Vec<Arc<ProcessedImage>>,
}

impl Sample {
    /// A sample from ids with labels that line up with them: position `t` learns the label of `t + 1`.
    ///
    /// # Shapes
    /// - `input_ids`, `labels`: `[S]`
    pub fn from_unshifted(input_ids: Vec<u32>, mut labels: Vec<i64>) -> Self {
        assert_eq!(input_ids.len(), labels.len(), "ids and labels line up");
        if !labels.is_empty() {
            labels.rotate_left(1);
            let last = labels.len() - 1;
            labels[last] = IGNORE_INDEX;
        }
        Self { input_ids, labels, images: Vec::new() }
    }

    /// Positions that are learned.
    pub fn num_label_tokens(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE_INDEX).count()
    }
}

/// Samples by index. The same index always gives the same sample.
pub trait Dataset: Send + Sync {
    /// Number of rows, unusable ones included.
    fn len(&self) -> usize;

    /// Whether there are no rows.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One sample.
    ///
    /// # Errors
    /// A row that cannot be used, with file, line and field.
    fn get(&self, index: usize) -> Result<Sample>;

    /// Tokens of a sample; data sets that know it without making the sample say so faster.
    ///
    /// # Errors
    /// As [`Dataset::get`].
    fn tokens(&self, index: usize) -> Result<usize> {
        Ok(self.get(index)?.input_ids.len())
    }
}

/// A data set of either kind.
#[derive(Clone)]
pub enum DataSource {
    /// Samples by index: every epoch has an order of all of them.
    Indexed(Arc<dyn Dataset>),
    /// Samples one after another: an order within windows.
    Streamed(Arc<dyn StreamDataset>),
}
