//! Batches of a data set in a seeded order that can be saved and continued.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::indexed::{IndexPlanner, Indices};
use super::prefetch::Prefetcher;
use super::step::{BatchMaker, Made, PlannedStep, Planner, SharedMaker};
use super::stream::StreamPlace;
use super::windows::WindowPlanner;
use super::{Batch, DataSource};
use crate::error::{Error, Result};
use crate::recipe::{OnError, PackedSequenceConfig};

/// How samples become batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Rows of a step, over all ranks.
    pub global_batch_size: usize,
    /// Rows of a micro-batch.
    pub local_batch_size: usize,
    /// Whether each epoch has its own order.
    pub shuffle: bool,
    /// Seed of that order.
    pub seed: u64,
    /// Whether a last batch that is not full is left out.
    pub drop_last: bool,
    /// What to do with unusable rows.
    pub on_error: OnError,
    /// Only the first rows are used.
    pub limit: Option<usize>,
    /// Rows with more tokens are left out.
    pub max_length: Option<usize>,
    /// Packing; `None`: rows are padded.
    pub packing: Option<PackedSequenceConfig>,
    /// Tokens that a micro-batch may hold, in place of `local_batch_size` rows; its rows are laid end to end.
    pub max_tokens_per_micro_batch: Option<usize>,
    /// Rows of a stream that are shuffled among each other.
    pub shuffle_buffer_size: usize,
    /// Threads that make batches; 0: they are made when they are asked for.
    pub num_workers: usize,
    /// Micro-batches that each thread makes ahead.
    pub prefetch_factor: usize,
    /// Token that fills padded places.
    pub pad_id: u32,
}

/// Which data-parallel rank of how many a loader serves.
///
/// The micro-batches of a step are the same for any number of ranks: rank after rank takes its share of them, so that
/// the global batch is what the ranks hold, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataRank {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
}

impl DataRank {
    /// The only rank.
    pub const SINGLE: Self = Self { rank: 0, world: 1 };

    /// The micro-batches of a step that this rank takes, and how many passes every rank makes.
    pub(super) fn share(self, micro_batches: usize) -> (Range<usize>, usize) {
        let Self { rank, world } = self;
        let start = |rank| micro_batches * rank / world;
        (start(rank)..start(rank + 1), micro_batches.div_ceil(world))
    }
}

/// A place in the data, to save with a checkpoint. It does not depend on the number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Current pass over the data.
    pub epoch: usize,
    /// Next row (a sample, or several packed ones) of that pass, or of the window, counted over all ranks.
    pub row: usize,
    /// Window of a stream that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<StreamPlace>,
    /// Seed of the order.
    pub seed: u64,
    /// Samples of the data set, where they are known.
    pub samples: Option<usize>,
    /// Tokens of a packed row; 0 without packing.
    pub packed_sequence_size: usize,
    /// Rows of a stream that are shuffled among each other; 0 elsewhere.
    pub shuffle_buffer_size: usize,
}

/// Rows that were left out so far, by this rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Rows that could not be used.
    pub unusable: usize,
    /// Rows with too many tokens.
    pub too_long: usize,
    /// The first messages about unusable rows.
    pub messages: Vec<String>,
}

impl Skipped {
    /// All of them.
    pub fn total(&self) -> usize {
        self.unusable + self.too_long
    }

    pub(super) fn note(&mut self, error: Error) {
        self.add(Self { unusable: 1, too_long: 0, messages: vec![error.to_string()] });
    }

    pub(super) fn add(&mut self, more: Self) {
        const MESSAGES: usize = 5;
        self.unusable += more.unusable;
        self.too_long += more.too_long;
        let room = MESSAGES.saturating_sub(self.messages.len());
        self.messages.extend(more.messages.into_iter().take(room));
    }
}

/// One rank's micro-batches of an optimizer step.
#[derive(Debug, Clone)]
pub struct StepBatches {
    /// As many on every rank; fewer at the end of an epoch. A rank that has nothing left gets [`Batch::filler`].
    pub batches: Vec<Batch>,
    /// Whether the epoch ends with this step.
    pub ends_epoch: bool,
    /// How long the caller waited for them.
    pub data_wait: Duration,
}

impl StepBatches {
    /// Positions that this rank learns; summed over the ranks, what the summed loss is divided by.
    pub fn num_label_tokens(&self) -> usize {
        self.batches.iter().map(|batch| batch.num_label_tokens).sum()
    }

    /// This rank's tokens without padding.
    pub fn num_tokens(&self) -> usize {
        self.batches.iter().map(|batch| batch.num_tokens).sum()
    }
}

/// Makes one rank's batches, step after step and epoch after epoch.
///
/// With `num_workers`, threads read, tokenise and decode images ahead of the step; the batches and their order are the
/// same for any number of them, and so is the step at which an error comes.
pub struct Loader {
    maker: SharedMaker,
    rank: DataRank,
    /// Which samples are used and how long they are; `None` for streams.
    indices: Option<Arc<Indices>>,
    skipped: Skipped,
    /// The next step.
    state: LoaderState,
    engine: Option<Engine>,
    /// Samples of the epoch that were usable, and those that were asked for.
    seen: (usize, usize),
}

/// Where batches are made.
enum Engine {
    Here(Box<dyn Planner>),
    Threads(Prefetcher),
}

/// A step with everything made.
pub(super) struct MadeStep {
    pub(super) made: Vec<Made>,
    pub(super) rounds: usize,
    pub(super) ends_epoch: bool,
    pub(super) next: LoaderState,
    pub(super) skipped: Skipped,
}

impl Loader {
    /// Prepares the first epoch.
    ///
    /// Packing and a limit of tokens need the length of every indexed row, so that all are looked at once, here.
    ///
    /// # Errors
    /// Where rows are looked at: unusable ones (unless they are to be skipped), and samples longer than a packed row
    /// (unless they are to be left out); a data set without a usable row.
    pub fn new(source: DataSource, options: LoaderOptions, rank: DataRank) -> Result<Self> {
        assert!(
            options.local_batch_size > 0 && options.global_batch_size > 0,
            "a batch has at least one row"
        );
        assert!(rank.rank < rank.world, "rank {} of {}", rank.rank, rank.world);
        let maker = Arc::new(BatchMaker { source, options });
        let mut skipped = Skipped::default();
        let indices = match &maker.source {
            DataSource::Indexed(_) => Some(Arc::new(Indices::new(&maker, &mut skipped)?)),
            DataSource::Streamed(_) => None,
        };
        let state = maker.fixed_state();
        Ok(Self { maker, rank, indices, skipped, state, engine: None, seen: (0, 0) })
    }

    /// Optimizer steps of the current epoch; 0 where the data does not fill a batch and `drop_last` is on, `None` for
    /// streams whose rows nobody has counted. With packing, epochs may differ by a few.
    pub fn steps_per_epoch(&self) -> Option<usize> {
        let options = &self.maker.options;
        let rows = match &self.indices {
            Some(indices) => indices.plan(options, self.state.epoch).len(),
            None if options.packing.is_some() => return None,
            None => self.state.samples?,
        };
        Some(options.whole_batches(rows).div_ceil(options.global_batch_size))
    }

    /// Rows that were left out so far.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// Samples of an epoch, where they are known.
    pub fn num_samples(&self) -> Option<usize> {
        self.indices.as_ref().map_or(self.state.samples, |indices| Some(indices.len()))
    }

    /// This rank's micro-batches of the next optimizer step, and on into the next epoch.
    ///
    /// # Errors
    /// An unusable row (unless such are skipped), and an epoch of which no row is usable.
    pub fn next_step(&mut self) -> Result<StepBatches> {
        let started = Instant::now();
        let engine = self.engine.get_or_insert_with(|| {
            let planner = planner(&self.maker, &self.indices, self.rank, self.state);
            match self.maker.options.num_workers {
                0 => Engine::Here(planner),
                _ => Engine::Threads(Prefetcher::start(self.maker.clone(), planner, self.rank)),
            }
        });
        let step = match engine {
            Engine::Here(planner) => planner.next_step().and_then(|step| make(&self.maker, step)),
            Engine::Threads(prefetcher) => prefetcher.next_step(),
        }?;
        self.skipped.add(step.skipped);
        let mut batches = Vec::with_capacity(step.rounds);
        for Made { batch, skipped } in step.made {
            self.seen.1 += batch.as_ref().map_or(0, |batch| batch.rows.len()) + skipped.total();
            self.seen.0 += batch.as_ref().map_or(0, |batch| batch.rows.len());
            self.skipped.add(skipped);
            batches.extend(batch);
        }
        batches.resize_with(step.rounds, || Batch::filler(self.maker.options.pad_id));
        self.state = step.next;
        if step.ends_epoch && matches!(std::mem::take(&mut self.seen), (0, asked) if asked > 0) {
            return Err(self.maker.nothing_usable(&self.skipped));
        }
        Ok(StepBatches { batches, ends_epoch: step.ends_epoch, data_wait: started.elapsed() })
    }

    /// The place of the next step.
    pub fn state(&self) -> LoaderState {
        self.state
    }

    /// Goes back to the first epoch's first step.
    pub fn restart(&mut self) {
        self.go_to(self.maker.fixed_state());
    }

    /// Continues from a saved place, whatever the batch sizes and the number of ranks were there.
    ///
    /// # Errors
    /// A place of other data, of another seed, of other packing or another window.
    pub fn resume(&mut self, saved: LoaderState) -> Result<()> {
        let current = self.maker.fixed_state();
        let samples = |state: &LoaderState| state.samples.map_or("unknown".to_owned(), |n| n.to_string());
        for (field, saved, current) in [
            ("seed", saved.seed.to_string(), current.seed.to_string()),
            ("number of samples", samples(&saved), samples(&current)),
            (
                "packed_sequence_size",
                saved.packed_sequence_size.to_string(),
                current.packed_sequence_size.to_string(),
            ),
            (
                "shuffle_buffer_size",
                saved.shuffle_buffer_size.to_string(),
                current.shuffle_buffer_size.to_string(),
            ),
        ] {
            if saved != current {
                return Err(Error::Resume { field, saved, current });
            }
        }
        if let Some(indices) = &self.indices {
            let options = &self.maker.options;
            let rows = options.whole_batches(indices.plan(options, saved.epoch).len());
            if saved.row >= rows {
                let (saved, current) = (saved.row.to_string(), format!("below {rows}"));
                return Err(Error::Resume { field: "row", saved, current });
            }
        }
        self.go_to(saved);
        Ok(())
    }

    fn go_to(&mut self, state: LoaderState) {
        self.engine = None;
        self.state = state;
        self.seen = (0, 0);
    }
}

fn planner(
    maker: &SharedMaker,
    indices: &Option<Arc<Indices>>,
    rank: DataRank,
    from: LoaderState,
) -> Box<dyn Planner> {
    match indices {
        Some(indices) => Box::new(IndexPlanner::new(maker.clone(), indices.clone(), rank, from)),
        None => Box::new(WindowPlanner::new(maker.clone(), rank, from)),
    }
}

fn make(maker: &BatchMaker, step: PlannedStep) -> Result<MadeStep> {
    let PlannedStep { micro_batches, rounds, ends_epoch, next, skipped } = step;
    let made = micro_batches.into_iter().map(|items| maker.batch(items)).collect::<Result<Vec<_>>>()?;
    Ok(MadeStep { made, rounds, ends_epoch, next, skipped })
}

impl LoaderOptions {
    /// Rows of an epoch that are used.
    pub(super) fn whole_batches(&self, rows: usize) -> usize {
        if self.drop_last { rows / self.local_batch_size * self.local_batch_size } else { rows }
    }
}

#[cfg(test)]
mod tests;
