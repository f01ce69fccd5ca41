//! Steps of indexed data: one order of all rows an epoch.

use std::sync::Arc;

use super::loader::{DataRank, LoaderOptions, LoaderState, Skipped};
use super::order::{self, Plan};
use super::step::{BatchMaker, Item, PlannedRow, PlannedStep, Planner, SharedMaker, deal};
use super::{DataSource, Dataset};
use crate::error::Result;

/// Which rows are used, and how long they are.
pub(super) struct Indices {
    usable: Vec<usize>,
    /// Tokens by row of the data set; empty when nothing needs them.
    tokens: Vec<usize>,
}

impl Indices {
    /// Measures the rows, where that is needed, in as many threads as there are workers.
    ///
    /// # Errors
    /// The first unusable row, unless such are skipped; no usable row.
    pub(super) fn new(maker: &BatchMaker, skipped: &mut Skipped) -> Result<Self> {
        let DataSource::Indexed(data) = &maker.source else { unreachable!("streams have no indices") };
        let options = &maker.options;
        let rows = options.limit.unwrap_or(usize::MAX).min(data.len());
        let mut usable: Vec<usize> = (0..rows).collect();
        let mut tokens = Vec::new();
        if options.packing.is_some() || options.max_tokens_per_micro_batch.is_some() {
            tokens = vec![0; rows];
            usable.clear();
            for (index, measured) in measure(data.as_ref(), rows, options.num_workers).into_iter().enumerate()
            {
                let length = match measured {
                    Ok(length) if !maker.is_too_long(length)? => length,
                    Ok(_) => {
                        skipped.too_long += 1;
                        continue;
                    }
                    Err(error) => {
                        // As for a sample that is made.
                        maker.keep(Err(error), skipped)?;
                        continue;
                    }
                };
                tokens[index] = length;
                usable.push(index);
            }
        }
        if usable.is_empty() {
            return Err(maker.nothing_usable(skipped));
        }
        Ok(Self { usable, tokens })
    }

    pub(super) fn len(&self) -> usize {
        self.usable.len()
    }

    /// The rows of an epoch.
    pub(super) fn plan(&self, options: &LoaderOptions, epoch: usize) -> Plan {
        let mut order = self.usable.clone();
        if options.shuffle {
            order::shuffle(&mut order, options.seed, epoch);
        }
        match options.packing {
            Some(packing) => {
                Plan::packed(&order, &self.tokens, packing.packed_sequence_size, packing.buffer_size)
            }
            None => Plan::single(order),
        }
    }
}

/// Tokens of every row.
fn measure(data: &dyn Dataset, rows: usize, threads: usize) -> Vec<Result<usize>> {
    if threads < 2 {
        return (0..rows).map(|row| data.tokens(row)).collect();
    }
    let part = rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..rows)
            .step_by(part)
            .map(|start| {
                scope.spawn(move || (start..(start + part).min(rows)).map(|row| data.tokens(row)).collect())
            })
            .collect();
        let parts = parts.into_iter().map(|part| part.join());
        parts
            .flat_map(|part: std::thread::Result<Vec<_>>| {
                part.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

/// Plans the steps of indexed data.
pub(super) struct IndexPlanner {
    maker: SharedMaker,
    indices: Arc<Indices>,
    rank: DataRank,
    plan: Plan,
    epoch: usize,
    row: usize,
}

impl IndexPlanner {
    pub(super) fn new(maker: SharedMaker, indices: Arc<Indices>, rank: DataRank, from: LoaderState) -> Self {
        let plan = indices.plan(&maker.options, from.epoch);
        Self { maker, indices, rank, plan, epoch: from.epoch, row: from.row }
    }

    fn planned_row(&self, row: usize) -> PlannedRow {
        let samples = self.plan.row(row);
        let tokens =
            samples.iter().map(|&sample| self.indices.tokens.get(sample).copied().unwrap_or(0)).sum();
        PlannedRow { items: samples.iter().map(|&sample| Item::Index(sample)).collect(), tokens }
    }
}

impl Planner for IndexPlanner {
    fn next_step(&mut self) -> Result<PlannedStep> {
        let options = &self.maker.options;
        let rows = options.whole_batches(self.plan.len());
        assert!(rows > 0, "StepScheduler::new refuses an epoch without steps");
        let end = (self.row + options.global_batch_size).min(rows);
        let step = (self.row..end).map(|row| self.planned_row(row)).collect();
        let (micro_batches, rounds) = deal(step, options, self.rank);
        let ends_epoch = end == rows;
        self.row = end;
        if ends_epoch {
            (self.epoch, self.row) = (self.epoch + 1, 0);
            self.plan = self.indices.plan(options, self.epoch);
        }
        let next = LoaderState { epoch: self.epoch, row: self.row, ..self.maker.fixed_state() };
        Ok(PlannedStep { micro_batches, rounds, ends_epoch, next, skipped: Skipped::default() })
    }
}
