//! Batches of a data set in a seeded order that can be saved and continued.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::order::{self, Plan};
use super::{Batch, Dataset};
use crate::error::{Error, Result};
use crate::recipe::{OnError, PackedSequenceConfig};

/// How samples become batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Rows of a batch.
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
    /// Token that fills padded places.
    pub pad_id: u32,
}

/// A place in the data, to save with a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Current pass over the data.
    pub epoch: usize,
    /// Next batch of that pass.
    pub batch: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Usable rows of the data set.
    pub samples: usize,
    /// Rows of a batch.
    pub local_batch_size: usize,
}

/// Rows that were left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Rows that could not be used.
    pub unusable: usize,
    /// Rows with too many tokens.
    pub too_long: usize,
    /// The first messages about unusable rows.
    pub messages: Vec<String>,
}

/// The micro-batches of one optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepBatches {
    /// At most as many as were asked for; fewer at the end of an epoch.
    pub batches: Vec<Batch>,
    /// Whether the epoch ends with this step.
    pub ends_epoch: bool,
}

impl StepBatches {
    /// Positions that are learned in this step: what the summed loss is divided by.
    pub fn num_label_tokens(&self) -> usize {
        self.batches.iter().map(|batch| batch.num_label_tokens).sum()
    }

    /// Tokens of this step without padding.
    pub fn num_tokens(&self) -> usize {
        self.batches.iter().map(|batch| batch.num_tokens).sum()
    }
}

/// Makes batches, epoch after epoch.
pub struct Loader {
    dataset: Arc<dyn Dataset>,
    options: LoaderOptions,
    usable: Vec<usize>,
    /// Tokens by row of the data set; empty when nothing needed them.
    tokens: Vec<usize>,
    skipped: Skipped,
    plan: Plan,
    epoch: usize,
    batch: usize,
}

impl Loader {
    /// Prepares the first epoch.
    ///
    /// Packing, a maximal length and `on_error: skip` need every row to be looked at once, here, so that the number of
    /// batches is known before the first step.
    ///
    /// # Errors
    /// Unusable rows (unless they are to be skipped), samples longer than a packed row (unless they are to be left
    /// out), and a data set without a usable row.
    pub fn new(dataset: Arc<dyn Dataset>, options: LoaderOptions) -> Result<Self> {
        assert!(options.local_batch_size > 0, "a batch has at least one row");
        let rows = options.limit.unwrap_or(usize::MAX).min(dataset.len());
        let mut loader = Self {
            dataset,
            options,
            usable: (0..rows).collect(),
            tokens: Vec::new(),
            skipped: Skipped::default(),
            plan: Plan::single(Vec::new()),
            epoch: 0,
            batch: 0,
        };
        let options = &loader.options;
        if options.packing.is_some() || options.max_length.is_some() || options.on_error == OnError::Skip {
            loader.look_at_rows()?;
        }
        if loader.usable.is_empty() {
            let Skipped { unusable, too_long, messages } = &loader.skipped;
            let first = messages.first().map_or_else(String::new, |message| format!("; first: {message}"));
            return Err(Error::Inconsistent {
                key: "dataset".to_owned(),
                value: format!("{rows} rows"),
                message: format!("no row is usable ({unusable} malformed, {too_long} too long){first}"),
            });
        }
        loader.plan = loader.plan_of(0);
        Ok(loader)
    }

    /// Batches of the current epoch. With packing, epochs may differ by a few.
    pub fn batches_per_epoch(&self) -> usize {
        let (rows, size) = (self.plan.len(), self.options.local_batch_size);
        if self.options.drop_last { rows / size } else { rows.div_ceil(size) }
    }

    /// Rows that were left out.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// Samples of an epoch.
    pub fn num_samples(&self) -> usize {
        self.usable.len()
    }

    /// The next batch of this epoch; `None` once at its end, after which the next epoch begins.
    ///
    /// # Errors
    /// An unusable row.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.batch >= self.batches_per_epoch() {
            self.begin_epoch(self.epoch + 1);
            return Ok(None);
        }
        let size = self.options.local_batch_size;
        let rows = self.batch * size..((self.batch + 1) * size).min(self.plan.len());
        let indices: Vec<usize> = rows.flat_map(|row| self.plan.row(row).to_vec()).collect();
        let samples = indices.iter().map(|&index| self.dataset.get(index)).collect::<Result<Vec<_>>>()?;
        self.batch += 1;
        Ok(Some(match self.options.packing {
            Some(_) => Batch::packed(samples, indices),
            None => Batch::padded(samples, indices, self.options.pad_id),
        }))
    }

    /// The micro-batches of the next optimizer step, and on into the next epoch.
    ///
    /// # Errors
    /// As [`Loader::next_batch`].
    pub fn next_step(&mut self, grad_acc_steps: usize) -> Result<StepBatches> {
        assert!(self.batches_per_epoch() > 0, "StepScheduler::new refuses an epoch without batches");
        let mut batches = Vec::new();
        while batches.len() < grad_acc_steps && self.batch < self.batches_per_epoch() {
            batches.extend(self.next_batch()?);
        }
        let ends_epoch = self.batch >= self.batches_per_epoch();
        if ends_epoch {
            self.begin_epoch(self.epoch + 1);
        }
        Ok(StepBatches { batches, ends_epoch })
    }

    /// The place of the next batch.
    pub fn state(&self) -> LoaderState {
        LoaderState {
            epoch: self.epoch,
            batch: self.batch,
            seed: self.options.seed,
            samples: self.usable.len(),
            local_batch_size: self.options.local_batch_size,
        }
    }

    /// Continues from a saved place.
    ///
    /// # Errors
    /// A place of other data, another seed or another batch size.
    pub fn resume(&mut self, saved: LoaderState) -> Result<()> {
        let current = self.state();
        for (field, saved, current) in [
            ("seed", saved.seed, current.seed),
            ("number of samples", saved.samples as u64, current.samples as u64),
            ("local_batch_size", saved.local_batch_size as u64, current.local_batch_size as u64),
        ] {
            if saved != current {
                let (saved, current) = (saved.to_string(), current.to_string());
                return Err(Error::Resume { field, saved, current });
            }
        }
        self.begin_epoch(saved.epoch);
        if saved.batch > self.batches_per_epoch() {
            return Err(Error::Resume {
                field: "batch",
                saved: saved.batch.to_string(),
                current: format!("at most {}", self.batches_per_epoch()),
            });
        }
        self.batch = saved.batch;
        Ok(())
    }

    fn begin_epoch(&mut self, epoch: usize) {
        self.plan = self.plan_of(epoch);
        self.epoch = epoch;
        self.batch = 0;
    }

    fn plan_of(&self, epoch: usize) -> Plan {
        let mut order = self.usable.clone();
        if self.options.shuffle {
            order::shuffle(&mut order, self.options.seed, epoch);
        }
        match self.options.packing {
            Some(packing) => {
                Plan::packed(&order, &self.tokens, packing.packed_sequence_size, packing.buffer_size)
            }
            None => Plan::single(order),
        }
    }

    /// Measures every row and leaves out those that may not stay.
    fn look_at_rows(&mut self) -> Result<()> {
        const MESSAGES: usize = 5;
        let packing = self.options.packing;
        let longest = self.options.max_length.unwrap_or(usize::MAX);
        let longest = longest.min(packing.map_or(usize::MAX, |packing| packing.packed_sequence_size));
        let refuse_long = packing.filter(|packing| !packing.drop_long_samples);
        self.tokens = vec![0; self.usable.len()];
        let mut usable = Vec::with_capacity(self.usable.len());
        for index in 0..self.usable.len() {
            match self.dataset.tokens(index) {
                Ok(tokens) if tokens <= longest => {
                    self.tokens[index] = tokens;
                    usable.push(index);
                }
                Ok(tokens) => {
                    if let Some(packing) = refuse_long.filter(|packing| tokens > packing.packed_sequence_size)
                    {
                        return Err(Error::Inconsistent {
                            key: "packed_sequence.packed_sequence_size".to_owned(),
                            value: packing.packed_sequence_size.to_string(),
                            message: format!("row {index} has {tokens} tokens and drop_long_samples is off"),
                        });
                    }
                    self.skipped.too_long += 1;
                }
                Err(error) if self.options.on_error == OnError::Skip => {
                    self.skipped.unusable += 1;
                    if self.skipped.messages.len() < MESSAGES {
                        self.skipped.messages.push(error.to_string());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        self.usable = usable;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{MockDataset, Sample};
    use proptest::prelude::*;

    /// Sample `i` is `i + 1` repeated `1 + i % 7` times; every `bad`-th row is unusable.
    struct Numbered {
        rows: usize,
        bad: Option<usize>,
    }

    impl Dataset for Numbered {
        fn len(&self) -> usize {
            self.rows
        }

        fn get(&self, index: usize) -> Result<Sample> {
            if self.bad.is_some_and(|bad| index % bad == bad - 1) {
                return Err(Error::Dataset { path: "rows".into(), message: format!("row {index}") });
            }
            let ids = vec![index as u32 + 1; 1 + index % 7];
            let labels = ids.iter().map(|&id| i64::from(id)).collect();
            Ok(Sample::from_unshifted(ids, labels))
        }
    }

    fn options() -> LoaderOptions {
        LoaderOptions {
            local_batch_size: 3,
            shuffle: true,
            seed: 1,
            drop_last: false,
            on_error: OnError::Fail,
            limit: None,
            max_length: None,
            packing: None,
            pad_id: 0,
        }
    }

    fn packing(size: usize) -> Option<PackedSequenceConfig> {
        Some(PackedSequenceConfig { packed_sequence_size: size, buffer_size: 8, drop_long_samples: true })
    }

    fn loader(rows: usize, options: LoaderOptions) -> Loader {
        Loader::new(Arc::new(Numbered { rows, bad: None }), options).unwrap()
    }

    fn epoch(loader: &mut Loader) -> Vec<Batch> {
        std::iter::from_fn(|| loader.next_batch().unwrap()).collect()
    }

    #[test]
    fn drop_last_and_limit_count_batches() {
        assert_eq!(loader(10, options()).batches_per_epoch(), 4);
        assert_eq!(loader(10, LoaderOptions { drop_last: true, ..options() }).batches_per_epoch(), 3);
        assert_eq!(loader(10, LoaderOptions { limit: Some(4), ..options() }).batches_per_epoch(), 2);
    }

    #[test]
    fn without_shuffling_rows_come_in_order() {
        let mut loader = loader(7, LoaderOptions { shuffle: false, ..options() });
        for _ in 0..2 {
            let rows: Vec<_> = epoch(&mut loader).into_iter().flat_map(|batch| batch.rows).collect();
            assert_eq!(rows, [0, 1, 2, 3, 4, 5, 6]);
        }
    }

    #[test]
    fn bad_rows_stop_or_are_counted() {
        let data = || Arc::new(Numbered { rows: 10, bad: Some(4) });
        let mut failing = Loader::new(data(), LoaderOptions { shuffle: false, ..options() }).unwrap();
        assert!(failing.next_batch().is_ok());
        assert_eq!(failing.next_batch().unwrap_err().to_string(), "rows: row 3");
        let mut skipping =
            Loader::new(data(), LoaderOptions { on_error: OnError::Skip, ..options() }).unwrap();
        assert_eq!(skipping.skipped().unusable, 2);
        assert_eq!(skipping.skipped().messages, ["rows: row 3", "rows: row 7"]);
        assert_eq!(epoch(&mut skipping).iter().map(|batch| batch.rows.len()).sum::<usize>(), 8);
        let all_bad = Arc::new(Numbered { rows: 3, bad: Some(1) });
        let error =
            Loader::new(all_bad, LoaderOptions { on_error: OnError::Skip, ..options() }).err().unwrap();
        assert!(error.to_string().contains("3 malformed"), "{error}");
    }

    #[test]
    fn long_rows_are_left_out_or_refused() {
        let short = loader(14, LoaderOptions { max_length: Some(5), ..options() });
        assert_eq!((short.num_samples(), short.skipped().too_long), (10, 4));
        let packing = packing(5).map(|packing| PackedSequenceConfig { drop_long_samples: false, ..packing });
        let refused =
            Loader::new(Arc::new(Numbered { rows: 14, bad: None }), LoaderOptions { packing, ..options() });
        assert!(refused.err().unwrap().to_string().contains("row 5 has 6 tokens"));
    }

    #[test]
    fn a_step_takes_what_is_left_of_an_epoch() {
        let mut loader = loader(10, options());
        let sizes: Vec<_> = (0..4)
            .map(|_| loader.next_step(3).unwrap())
            .map(|step| (step.batches.len(), step.ends_epoch))
            .collect();
        assert_eq!(sizes, [(3, false), (1, true), (3, false), (1, true)]);
        assert_eq!(loader.state().epoch, 2);
    }

    #[test]
    fn a_place_of_other_data_is_refused() {
        let state = loader(10, options()).state();
        assert!(loader(11, options()).resume(state).is_err());
        assert!(loader(10, LoaderOptions { seed: 2, ..options() }).resume(state).is_err());
        assert!(loader(10, options()).resume(LoaderState { batch: 5, ..state }).is_err());
    }

    #[test]
    fn mock_rows_repeat() {
        let mock = MockDataset { vocab_size: 50, seq_len: 8, num_samples: 3, seed: 1 };
        assert_eq!(mock.get(1).unwrap(), mock.get(1).unwrap());
        assert_ne!(mock.get(1).unwrap(), mock.get(2).unwrap());
    }

    proptest! {
        #[test]
        fn every_sample_appears_once_an_epoch(
            rows in 1usize..60, size in 1usize..9, pack in proptest::option::of(7usize..30), seed in any::<u64>()
        ) {
            let packing = pack.and_then(packing);
            let mut loader = loader(rows, LoaderOptions { local_batch_size: size, seed, packing, ..options() });
            for _ in 0..2 {
                let batches = epoch(&mut loader);
                let mut seen: Vec<_> = batches.iter().flat_map(|batch| batch.rows.clone()).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
                for batch in &batches {
                    if let crate::data::BatchLayout::Packed { cu_seqlens } = &batch.layout {
                        // A sequence is one sample, whole: its ids are all alike and as many as the sample has.
                        for (sequence, &row) in cu_seqlens.windows(2).zip(&batch.rows) {
                            let ids = &batch.input_ids[sequence[0]..sequence[1]];
                            prop_assert_eq!(ids, &vec![row as u32 + 1; 1 + row % 7][..]);
                        }
                    }
                }
            }
        }

        #[test]
        fn a_resumed_run_equals_an_uninterrupted_one(
            rows in 1usize..40, stop in 0usize..30, pack in proptest::option::of(7usize..30), grad_acc in 1usize..4
        ) {
            let options = LoaderOptions { packing: pack.and_then(packing), ..options() };
            let mut whole = loader(rows, options.clone());
            for _ in 0..stop {
                whole.next_step(grad_acc).unwrap();
            }
            let saved = serde_json::to_string(&whole.state()).unwrap();
            let mut resumed = loader(rows, options);
            resumed.resume(serde_json::from_str(&saved).unwrap()).unwrap();
            for _ in 0..12 {
                prop_assert_eq!(whole.next_step(grad_acc).unwrap(), resumed.next_step(grad_acc).unwrap());
            }
        }
    }
}
