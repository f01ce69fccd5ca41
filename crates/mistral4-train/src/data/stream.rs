//! Samples that come one after another, for data that is too large to index.

use serde::{Deserialize, Serialize};

use super::Sample;
use super::order::{self, STREAM_PARTS};
use super::row::Row;
use crate::error::Result;

/// A place in streamed data: where the next sample begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StreamPlace {
    /// Part of the data (a file, or a row group of one), in the order of the epoch.
    pub part: usize,
    /// Byte of a text or JSONL file, row of a row group.
    pub position: u64,
    /// Lines of the part that lie before it.
    pub line: usize,
    /// Tokens of what stands there that belong to earlier samples.
    pub tokens: usize,
    /// Samples of the epoch before it.
    pub sample: usize,
}

impl StreamPlace {
    /// The start of a part.
    pub(crate) fn of_part(part: usize) -> Self {
        Self { part, ..Self::default() }
    }
}

/// What a stream gives: a sample, or a row of which [`StreamDataset::sample`] makes one.
///
/// A rank passes over the rows of other ranks without rendering them.
#[derive(Debug, Clone)]
pub enum StreamedSample {
    /// A sample.
    Ready(Sample),
    /// A row.
    Row(Row),
}

/// One pass over streamed data.
pub trait SampleStream: Send {
    /// The next sample, in the order of the files; `None` at the end. After an unusable row it goes on behind it.
    fn next(&mut self) -> Option<Result<StreamedSample>>;

    /// Where the sample that comes next begins.
    fn place(&self) -> StreamPlace;
}

/// Samples in order. The same place always gives the same samples.
pub trait StreamDataset: Send + Sync {
    /// Rows of an epoch, unusable ones included, where they are known.
    fn num_rows(&self) -> Option<usize>;

    /// Reads from a place on; with seed and epoch, the parts come in an order of that epoch.
    ///
    /// # Errors
    /// Files that cannot be read.
    fn read(&self, shuffle: Option<(u64, usize)>, from: StreamPlace) -> Result<Box<dyn SampleStream>>;

    /// The sample of a row.
    ///
    /// # Errors
    /// A row that cannot be used, with file, place and field.
    fn sample(&self, row: Row) -> Result<Sample>;
}

/// The parts in file order, or shuffled for an epoch.
pub(crate) fn part_order(parts: usize, shuffle: Option<(u64, usize)>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..parts).collect();
    if let Some((seed, epoch)) = shuffle {
        order::shuffle(&mut order, seed ^ STREAM_PARTS, epoch);
    }
    order
}
