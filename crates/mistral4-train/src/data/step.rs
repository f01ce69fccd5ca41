//! What makes a step: which samples go into which micro-batch, and how they become batches.

use std::sync::Arc;

use super::loader::{DataRank, LoaderOptions, LoaderState, Skipped};
use super::stream::StreamedSample;
use super::{Batch, DataSource, Sample};
use crate::error::{Error, Result};
use crate::recipe::OnError;

/// Decides what the next steps hold, in order.
pub(super) trait Planner: Send {
    /// The next step, and on into the next epoch.
    ///
    /// # Errors
    /// A stream that cannot be read, or that holds an unusable row.
    fn next_step(&mut self) -> Result<PlannedStep>;
}

/// One rank's part of a step, before its samples are made.
pub(super) struct PlannedStep {
    pub(super) micro_batches: Vec<MicroBatch>,
    /// Passes that every rank makes.
    pub(super) rounds: usize,
    pub(super) ends_epoch: bool,
    /// The place behind it.
    pub(super) next: LoaderState,
    /// What was left out on the way to it.
    pub(super) skipped: Skipped,
}

/// The samples of a micro-batch.
pub(super) type MicroBatch = Vec<Item>;

/// A sample that is made when it is needed.
pub(super) enum Item {
    /// By index.
    Index(usize),
    /// From a stream, with its number in the epoch.
    Streamed(usize, StreamedSample),
    /// From a stream that found it unusable.
    Unusable(usize, Error),
}

/// A row of the plan, several samples where it is packed.
pub(super) struct PlannedRow {
    pub(super) items: Vec<Item>,
    /// Tokens of the row; 0 where nothing needs to know.
    pub(super) tokens: usize,
}

/// Deals the rows of a step out to micro-batches, and takes a rank's share of them.
///
/// The micro-batches do not depend on the number of ranks: `local_batch_size` rows in their order, or, with a limit on
/// tokens, as many as fit it, the longest first.
pub(super) fn deal(
    rows: Vec<PlannedRow>,
    options: &LoaderOptions,
    rank: DataRank,
) -> (Vec<MicroBatch>, usize) {
    let groups = groups(&rows, options.max_tokens_per_micro_batch, options.local_batch_size);
    let (share, rounds) = rank.share(groups.len());
    let mut rows: Vec<Option<PlannedRow>> = rows.into_iter().map(Some).collect();
    let mine = groups[share].iter().map(|group| {
        group.iter().flat_map(|&row| rows[row].take().expect("a row is in one group").items).collect()
    });
    (mine.collect(), rounds)
}

/// Rows of each micro-batch.
fn groups(rows: &[PlannedRow], most_tokens: Option<usize>, most_rows: usize) -> Vec<Vec<usize>> {
    let Some(most) = most_tokens else {
        let all: Vec<usize> = (0..rows.len()).collect();
        return all.chunks(most_rows).map(<[usize]>::to_vec).collect();
    };
    let mut longest_first: Vec<usize> = (0..rows.len()).collect();
    longest_first.sort_by_key(|&row| std::cmp::Reverse(rows[row].tokens));
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for row in longest_first {
        let tokens = rows[row].tokens;
        match bins.iter_mut().find(|(used, _)| used + tokens <= most) {
            Some((used, bin)) => {
                *used += tokens;
                bin.push(row);
            }
            None => bins.push((tokens, vec![row])),
        }
    }
    bins.into_iter().map(|(_, bin)| bin).collect()
}

/// Makes samples and batches.
pub(super) struct BatchMaker {
    pub(super) source: DataSource,
    pub(super) options: LoaderOptions,
}

/// A batch, and what was left out of it.
pub(super) struct Made {
    /// `None` when no sample was usable.
    pub(super) batch: Option<Batch>,
    pub(super) skipped: Skipped,
}

impl BatchMaker {
    /// Makes one micro-batch.
    ///
    /// # Errors
    /// An unusable row, unless such rows are skipped.
    pub(super) fn batch(&self, items: MicroBatch) -> Result<Made> {
        let (mut samples, mut rows, mut skipped) = (Vec::new(), Vec::new(), Skipped::default());
        for item in items {
            let row = match &item {
                Item::Index(row) | Item::Streamed(row, _) | Item::Unusable(row, _) => *row,
            };
            if let Some(sample) = self.keep(self.sample(item), &mut skipped)? {
                samples.push(sample);
                rows.push(row);
            }
        }
        let lies_flat = self.options.packing.is_some() || self.options.max_tokens_per_micro_batch.is_some();
        let batch = (!samples.is_empty()).then(|| match lies_flat {
            true => Batch::packed(samples, rows),
            false => Batch::padded(samples, rows, self.options.pad_id),
        });
        Ok(Made { batch, skipped })
    }

    /// Makes one sample.
    ///
    /// # Errors
    /// An unusable row.
    pub(super) fn sample(&self, item: Item) -> Result<Sample> {
        match (item, &self.source) {
            (Item::Unusable(_, error), _) => Err(error),
            (Item::Streamed(_, StreamedSample::Ready(sample)), _) => Ok(sample),
            (Item::Streamed(_, StreamedSample::Row(row)), DataSource::Streamed(data)) => data.sample(row),
            (Item::Index(index), DataSource::Indexed(data)) => data.get(index),
            _ => unreachable!("items come from the loader's own source"),
        }
    }

    /// The sample, if it is usable and not too long; else it is counted.
    ///
    /// # Errors
    /// An unusable row, unless such rows are skipped; a sample that is longer than a packed row, unless such are left
    /// out.
    pub(super) fn keep(&self, sample: Result<Sample>, skipped: &mut Skipped) -> Result<Option<Sample>> {
        let sample = match sample {
            Ok(sample) => sample,
            Err(error @ Error::Row { .. }) if self.options.on_error == OnError::Skip => {
                skipped.note(error);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let tokens = sample.input_ids.len();
        if self.is_too_long(tokens)? {
            skipped.too_long += 1;
            return Ok(None);
        }
        Ok(Some(sample))
    }

    /// Whether a sample of so many tokens is left out.
    ///
    /// # Errors
    /// A sample that is longer than a packed row, unless such are left out.
    pub(super) fn is_too_long(&self, tokens: usize) -> Result<bool> {
        let longest = self.options.max_length.unwrap_or(usize::MAX);
        match self.options.packing {
            Some(packing) if tokens > packing.packed_sequence_size && tokens <= longest => {
                if packing.drop_long_samples {
                    return Ok(true);
                }
                Err(Error::Inconsistent {
                    key: "packed_sequence.packed_sequence_size".to_owned(),
                    value: packing.packed_sequence_size.to_string(),
                    message: format!("a row has {tokens} tokens and drop_long_samples is off"),
                })
            }
            _ => Ok(tokens > longest),
        }
    }
}

impl BatchMaker {
    /// The parts of a loader's state that never change.
    pub(super) fn fixed_state(&self) -> LoaderState {
        let options = &self.options;
        let (samples, is_stream) = match &self.source {
            DataSource::Indexed(data) => (Some(data.len()), false),
            DataSource::Streamed(data) => (data.num_rows(), true),
        };
        LoaderState {
            epoch: 0,
            row: 0,
            window: None,
            seed: options.seed,
            samples: samples.map(|samples| samples.min(options.limit.unwrap_or(usize::MAX))),
            packed_sequence_size: options.packing.map_or(0, |packing| packing.packed_sequence_size),
            shuffle_buffer_size: if is_stream && options.shuffle { options.shuffle_buffer_size } else { 0 },
        }
    }

    /// An epoch gives no row.
    pub(super) fn nothing_usable(&self, skipped: &Skipped) -> Error {
        let Skipped { unusable, too_long, messages } = skipped;
        let first = messages.first().map_or_else(String::new, |message| format!("; first: {message}"));
        Error::Inconsistent {
            key: "dataset".to_owned(),
            value: self
                .fixed_state()
                .samples
                .map_or_else(|| "a stream".to_owned(), |rows| format!("{rows} rows")),
            message: format!("no row is usable ({unusable} malformed, {too_long} too long){first}"),
        }
    }
}

/// Shared by the planner and the threads that make batches.
pub(super) type SharedMaker = Arc<BatchMaker>;

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tokens: &[usize]) -> Vec<PlannedRow> {
        tokens.iter().map(|&tokens| PlannedRow { items: Vec::new(), tokens }).collect()
    }

    #[test]
    fn micro_batches_fill_up_to_their_tokens_longest_rows_first() {
        let lengths = [10, 90, 40, 60, 30, 120, 5];
        for most in [100, 120, 1000] {
            let groups = groups(&rows(&lengths), Some(most), 2);
            let mut dealt: Vec<usize> = groups.concat();
            dealt.sort_unstable();
            assert_eq!(dealt, (0..lengths.len()).collect::<Vec<_>>(), "each row once");
            for group in &groups {
                let tokens: usize = group.iter().map(|&row| lengths[row]).sum();
                // A row longer than the limit is alone.
                assert!(tokens <= most || group.len() == 1, "{group:?} of {most}");
                assert!(group.windows(2).all(|pair| lengths[pair[0]] >= lengths[pair[1]]));
            }
        }
        assert_eq!(groups(&rows(&lengths), Some(100), 2), [vec![5], vec![1, 0], vec![3, 2], vec![4, 6]]);
        assert_eq!(groups(&rows(&[1, 9, 1]), None, 2), [vec![0, 1], vec![2]]);
    }
}
