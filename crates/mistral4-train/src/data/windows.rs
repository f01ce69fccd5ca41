//! Steps of streamed data: read a window, shuffle it, pack it, and go on with the next.

use std::collections::VecDeque;

use super::DataSource;
use super::loader::{DataRank, LoaderState, Skipped};
use super::order::{self, Plan, STREAM_WINDOW};
use super::step::{Item, PlannedRow, PlannedStep, Planner, SharedMaker, deal};
use super::stream::{SampleStream, StreamDataset, StreamPlace, StreamedSample};
use crate::error::{Error, Result};

/// Plans the steps of a stream.
///
/// A window begins at a place of the stream and is a function of it, so that a window's place and the number of its rows
/// that were taken are all that a resumed run needs.
pub(super) struct WindowPlanner {
    maker: SharedMaker,
    rank: DataRank,
    epoch: usize,
    stream: Option<Box<dyn SampleStream>>,
    /// Rows that were planned, each with its place.
    queue: VecDeque<(RowPlace, PlannedRow)>,
    /// Where the next window begins.
    next_window: StreamPlace,
    /// Rows of the next window that an earlier run has taken.
    taken: usize,
    /// Whether the epoch's last window is in the queue.
    ended: bool,
    skipped: Skipped,
}

/// A row's window, and its number in it.
#[derive(Clone, Copy)]
struct RowPlace {
    window: StreamPlace,
    row: usize,
}

impl WindowPlanner {
    pub(super) fn new(maker: SharedMaker, rank: DataRank, from: LoaderState) -> Self {
        Self {
            maker,
            rank,
            epoch: from.epoch,
            stream: None,
            queue: VecDeque::new(),
            next_window: from.window.unwrap_or_default(),
            taken: from.row,
            ended: false,
            skipped: Skipped::default(),
        }
    }

    fn data(&self) -> &dyn StreamDataset {
        match &self.maker.source {
            DataSource::Streamed(data) => data.as_ref(),
            DataSource::Indexed(_) => unreachable!("only streams have windows"),
        }
    }

    /// Reads windows until `rows` rows are planned or the epoch ends.
    fn fill(&mut self, rows: usize) -> Result<()> {
        while self.queue.len() < rows && !self.ended {
            self.read_window()?;
        }
        Ok(())
    }

    fn read_window(&mut self) -> Result<()> {
        let options = self.maker.options.clone();
        let shuffle = options.shuffle.then_some((options.seed, self.epoch));
        let start = self.next_window;
        if self.stream.is_none() {
            self.stream = Some(self.data().read(shuffle, start)?);
        }
        let stream = self.stream.as_mut().expect("it was opened above");
        let packing_buffer = options.packing.map_or(1, |packing| packing.buffer_size);
        let size =
            if options.shuffle { options.shuffle_buffer_size.max(packing_buffer) } else { packing_buffer };
        let limit = options.limit.unwrap_or(usize::MAX);
        let measured = options.packing.is_some() || options.max_tokens_per_micro_batch.is_some();
        let (mut items, mut tokens) = (Vec::new(), Vec::new());
        // Unusable rows count as read, so that a window is the same whether they are skipped here or later.
        for _ in 0..size {
            let number = stream.place().sample;
            let next = if number < limit { stream.next() } else { None };
            let Some(next) = next else {
                self.ended = true;
                break;
            };
            let sample = match next {
                // Made, or reported, when its step comes.
                Ok(sample) if !measured => {
                    items.push(Item::Streamed(number, sample));
                    tokens.push(0);
                    continue;
                }
                Err(error @ Error::Row { .. }) if !measured => {
                    items.push(Item::Unusable(number, error));
                    tokens.push(0);
                    continue;
                }
                Ok(sample) => self.maker.sample(Item::Streamed(number, sample)),
                Err(error) => Err(error),
            };
            if let Some(sample) = self.maker.keep(sample, &mut self.skipped)? {
                tokens.push(sample.input_ids.len());
                items.push(Item::Streamed(number, StreamedSample::Ready(sample)));
            }
        }
        self.next_window = stream.place();
        let mut order: Vec<usize> = (0..items.len()).collect();
        if options.shuffle {
            // Epochs are few, so that both fit one number.
            let window = (self.epoch << 40) ^ start.sample;
            order::shuffle(&mut order, options.seed ^ STREAM_WINDOW, window);
        }
        let plan = match options.packing {
            Some(packing) => Plan::packed(&order, &tokens, packing.packed_sequence_size, packing.buffer_size),
            None => Plan::single(order),
        };
        let mut items: Vec<Option<Item>> = items.into_iter().map(Some).collect();
        let skip = std::mem::take(&mut self.taken);
        for row in skip..plan.len() {
            let samples = plan.row(row);
            let tokens = samples.iter().map(|&sample| tokens[sample]).sum();
            let take = |&sample: &usize| items[sample].take().expect("a sample is in one row");
            let items = samples.iter().map(take).collect();
            self.queue.push_back((RowPlace { window: start, row }, PlannedRow { items, tokens }));
        }
        Ok(())
    }

    fn state(&self) -> LoaderState {
        let (window, row) = match self.queue.front() {
            Some((place, _)) => (place.window, place.row),
            None => (self.next_window, 0),
        };
        LoaderState { epoch: self.epoch, row, window: Some(window), ..self.maker.fixed_state() }
    }
}

impl Planner for WindowPlanner {
    fn next_step(&mut self) -> Result<PlannedStep> {
        let options = self.maker.options.clone();
        // One row more (with `drop_last` a whole micro-batch) tells whether this step ends the epoch.
        let ahead = if options.drop_last { options.local_batch_size } else { 1 };
        self.fill(options.global_batch_size + ahead)?;
        let usable = match self.ended && options.drop_last {
            true => self.queue.len() / options.local_batch_size * options.local_batch_size,
            false => self.queue.len(),
        };
        // The step that takes an epoch's last row ends it, so that only an epoch without any comes here.
        if usable == 0 {
            return Err(self.maker.nothing_usable(&self.skipped));
        }
        let rows = usable.min(options.global_batch_size);
        let ends_epoch = self.ended && usable == rows;
        let step = self.queue.drain(..rows).map(|(_, row)| row).collect();
        let (micro_batches, rounds) = deal(step, &options, self.rank);
        if ends_epoch {
            self.queue.clear();
            self.stream = None;
            self.epoch += 1;
            self.next_window = StreamPlace::default();
            self.ended = false;
        }
        let skipped = std::mem::take(&mut self.skipped);
        Ok(PlannedStep { micro_batches, rounds, ends_epoch, next: self.state(), skipped })
    }
}
