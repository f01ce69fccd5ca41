use super::*;
use crate::data::stream::{SampleStream, StreamDataset, StreamPlace, StreamedSample, part_order};
use crate::data::{BatchLayout, Dataset, MockDataset, Row, Sample};
use crate::error::RowPlace;
use proptest::prelude::*;

/// Sample `i` is `i + 1` repeated `1 + i % 7` times; every `bad`-th row is unusable.
#[derive(Clone, Copy)]
struct Numbered {
    rows: usize,
    bad: Option<usize>,
}

fn bad_row(line: usize) -> Error {
    Error::Row {
        path: "rows".into(),
        place: RowPlace::Line(line),
        field: "number".into(),
        message: "bad".into(),
    }
}

impl Dataset for Numbered {
    fn len(&self) -> usize {
        self.rows
    }

    fn get(&self, index: usize) -> Result<Sample> {
        if self.bad.is_some_and(|bad| index % bad == bad - 1) {
            return Err(bad_row(index));
        }
        let ids = vec![index as u32 + 1; 1 + index % 7];
        let labels = ids.iter().map(|&id| i64::from(id)).collect();
        Ok(Sample::from_unshifted(ids, labels))
    }
}

/// The same rows as a stream, in parts of 5.
struct NumberedStream(Numbered);

struct NumberedRows {
    data: Numbered,
    order: Vec<usize>,
    place: StreamPlace,
}

impl StreamDataset for NumberedStream {
    fn num_rows(&self) -> Option<usize> {
        Some(self.0.rows)
    }

    fn read(&self, shuffle: Option<(u64, usize)>, from: StreamPlace) -> Result<Box<dyn SampleStream>> {
        let order = part_order(self.0.rows.div_ceil(5), shuffle);
        Ok(Box::new(NumberedRows { data: self.0, order, place: from }))
    }

    fn sample(&self, _row: Row) -> Result<Sample> {
        unreachable!("samples are ready")
    }
}

impl SampleStream for NumberedRows {
    fn next(&mut self) -> Option<Result<StreamedSample>> {
        loop {
            let part = *self.order.get(self.place.part)?;
            let row = part * 5 + self.place.position as usize;
            if self.place.position < 5 && row < self.data.rows {
                self.place.position += 1;
                self.place.sample += 1;
                return Some(self.data.get(row).map(StreamedSample::Ready));
            }
            self.place =
                StreamPlace { sample: self.place.sample, ..StreamPlace::of_part(self.place.part + 1) };
        }
    }

    fn place(&self) -> StreamPlace {
        self.place
    }
}

fn options() -> LoaderOptions {
    LoaderOptions {
        global_batch_size: 3,
        local_batch_size: 3,
        shuffle: true,
        seed: 1,
        drop_last: false,
        on_error: OnError::Fail,
        limit: None,
        max_length: None,
        packing: None,
        max_tokens_per_micro_batch: None,
        shuffle_buffer_size: 8,
        num_workers: 0,
        prefetch_factor: 2,
        pad_id: 0,
    }
}

fn packing(size: usize) -> Option<PackedSequenceConfig> {
    Some(PackedSequenceConfig { packed_sequence_size: size, buffer_size: 8, drop_long_samples: true })
}

fn open(rows: Numbered, is_stream: bool, options: LoaderOptions, rank: DataRank) -> Result<Loader> {
    let source = match is_stream {
        true => DataSource::Streamed(Arc::new(NumberedStream(rows))),
        false => DataSource::Indexed(Arc::new(rows)),
    };
    Loader::new(source, options, rank)
}

fn loader(rows: usize, options: LoaderOptions) -> Loader {
    open(Numbered { rows, bad: None }, false, options, DataRank::SINGLE).unwrap()
}

fn epoch(loader: &mut Loader) -> Vec<Batch> {
    let mut batches = Vec::new();
    loop {
        let step = loader.next_step().unwrap();
        batches.extend(step.batches);
        if step.ends_epoch {
            return batches;
        }
    }
}

/// The rows of an epoch, by the ids that they hold.
fn rows_of(batches: &[Batch]) -> Vec<usize> {
    let mut rows = Vec::new();
    for batch in batches {
        match &batch.layout {
            BatchLayout::Packed { cu_seqlens } => {
                rows.extend(cu_seqlens.windows(2).map(|w| batch.input_ids[w[0]] as usize - 1));
            }
            BatchLayout::Rows { batch: count, sequence } => {
                rows.extend((0..*count).map(|row| batch.input_ids[row * sequence] as usize - 1));
            }
        }
    }
    rows
}

#[test]
fn drop_last_and_limit_count_steps() {
    assert_eq!(loader(10, options()).steps_per_epoch(), Some(4));
    assert_eq!(loader(10, LoaderOptions { drop_last: true, ..options() }).steps_per_epoch(), Some(3));
    assert_eq!(loader(10, LoaderOptions { limit: Some(4), ..options() }).steps_per_epoch(), Some(2));
}

#[test]
fn without_shuffling_rows_come_in_order() {
    for is_stream in [false, true] {
        let options = LoaderOptions { shuffle: false, ..options() };
        let mut loader = open(Numbered { rows: 7, bad: None }, is_stream, options, DataRank::SINGLE).unwrap();
        for _ in 0..2 {
            assert_eq!(rows_of(&epoch(&mut loader)), [0, 1, 2, 3, 4, 5, 6]);
        }
    }
}

#[test]
fn bad_rows_stop_at_their_step_or_are_counted() {
    for (is_stream, num_workers) in [(false, 0), (false, 3), (true, 0), (true, 2)] {
        let data = Numbered { rows: 10, bad: Some(4) };
        let options = LoaderOptions { num_workers, ..options() };
        let start = |data, options| open(data, is_stream, options, DataRank::SINGLE);
        let mut failing = start(data, LoaderOptions { shuffle: false, ..options.clone() }).unwrap();
        assert!(failing.next_step().is_ok());
        assert_eq!(failing.next_step().unwrap_err().to_string(), "rows:3: field `number`: bad");
        let skip = LoaderOptions { on_error: OnError::Skip, ..options };
        let mut skipping = start(data, skip.clone()).unwrap();
        let batches = epoch(&mut skipping);
        assert_eq!(batches.iter().map(|batch| batch.rows.len()).sum::<usize>(), 8);
        assert_eq!(skipping.skipped().unusable, 2);
        assert_eq!(skipping.skipped().messages.len(), 2);
        let mut all_bad = start(Numbered { rows: 3, bad: Some(1) }, skip).unwrap();
        let error = all_bad.next_step().err().unwrap();
        assert!(error.to_string().contains("3 malformed"), "{error}");
    }
}

#[test]
fn long_rows_are_left_out_or_refused() {
    let mut short = loader(14, LoaderOptions { max_length: Some(5), ..options() });
    let kept: usize = epoch(&mut short).iter().map(|batch| batch.rows.len()).sum();
    assert_eq!((kept, short.skipped().too_long), (10, 4));
    let packing = packing(5).map(|packing| PackedSequenceConfig { drop_long_samples: false, ..packing });
    for is_stream in [false, true] {
        let rows = Numbered { rows: 14, bad: None };
        let refused = open(rows, is_stream, LoaderOptions { packing, ..options() }, DataRank::SINGLE);
        let error = refused.and_then(|mut loader| loader.next_step()).err().unwrap();
        assert!(error.to_string().contains("a row has 6 tokens"), "{error}");
    }
}

#[test]
fn a_step_takes_what_is_left_of_an_epoch() {
    for is_stream in [false, true] {
        let options = LoaderOptions { global_batch_size: 9, ..options() };
        let mut loader =
            open(Numbered { rows: 10, bad: None }, is_stream, options, DataRank::SINGLE).unwrap();
        let sizes: Vec<_> = (0..4)
            .map(|_| loader.next_step().unwrap())
            .map(|step| (step.batches.len(), step.ends_epoch))
            .collect();
        assert_eq!(sizes, [(3, false), (1, true), (3, false), (1, true)]);
        assert_eq!(loader.state().epoch, 2);
    }
}

#[test]
fn a_place_of_other_data_is_refused() {
    let state = loader(10, options()).state();
    assert!(loader(11, options()).resume(state).is_err());
    assert!(loader(10, LoaderOptions { seed: 2, ..options() }).resume(state).is_err());
    assert!(loader(10, LoaderOptions { packing: packing(7), ..options() }).resume(state).is_err());
    assert!(loader(10, options()).resume(LoaderState { row: 10, ..state }).is_err());
    let stream = |size| {
        let options = LoaderOptions { shuffle_buffer_size: size, ..options() };
        open(Numbered { rows: 10, bad: None }, true, options, DataRank::SINGLE).unwrap()
    };
    assert!(stream(8).resume(stream(9).state()).is_err());
}

#[test]
fn dropping_a_loader_ends_its_threads() {
    let options = LoaderOptions { num_workers: 4, global_batch_size: 12, ..options() };
    for taken in 0..4 {
        let data = Arc::new(Numbered { rows: 1000, bad: None });
        let source = DataSource::Indexed(data.clone());
        let mut loader = Loader::new(source, options.clone(), DataRank::SINGLE).unwrap();
        (0..taken).for_each(|_| drop(loader.next_step().unwrap()));
        drop(loader);
        assert_eq!(Arc::strong_count(&data), 1, "a thread still holds the data");
    }
}

#[test]
fn mock_rows_repeat() {
    let mock = MockDataset { vocab_size: 50, seq_len: 8, num_samples: 3, seed: 1 };
    assert_eq!(mock.get(1).unwrap(), mock.get(1).unwrap());
    assert_ne!(mock.get(1).unwrap(), mock.get(2).unwrap());
}

/// How data are read and batched.
#[derive(Debug, Clone)]
struct Way {
    rows: usize,
    is_stream: bool,
    options: LoaderOptions,
}

impl Way {
    fn open(&self, rank: DataRank) -> Loader {
        open(Numbered { rows: self.rows, bad: None }, self.is_stream, self.options.clone(), rank).unwrap()
    }
}

prop_compose! {
    fn way()(
        rows in 1usize..60, local in 1usize..4, acc in 1usize..4, seed in any::<u64>(), shuffle in any::<bool>(),
        is_stream in any::<bool>(), pack in proptest::option::of(7usize..30),
        tokens in proptest::option::of(7usize..30), buffer in 1usize..20, num_workers in 0usize..3
    ) -> Way {
        let options = LoaderOptions {
            // For any number of ranks up to 4.
            global_batch_size: local * acc * 12,
            local_batch_size: local,
            seed,
            shuffle,
            packing: pack.and_then(packing),
            max_tokens_per_micro_batch: tokens,
            shuffle_buffer_size: buffer,
            num_workers,
            ..options()
        };
        Way { rows, is_stream, options }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_sample_appears_once_an_epoch_and_alone(way in way()) {
        let mut loader = way.open(DataRank::SINGLE);
        for _ in 0..2 {
            let batches = epoch(&mut loader);
            let mut seen: Vec<_> = batches.iter().flat_map(|batch| batch.rows.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..way.rows).collect::<Vec<_>>());
            let mut seen = rows_of(&batches);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..way.rows).collect::<Vec<_>>());
            for batch in &batches {
                let BatchLayout::Packed { cu_seqlens } = &batch.layout else { continue };
                // A sequence is one sample, whole: its ids are all alike, as many as it has, and its positions count
                // from 0, so that none sees another.
                for sequence in cu_seqlens.windows(2) {
                    let ids = &batch.input_ids[sequence[0]..sequence[1]];
                    let length = 1 + (ids[0] as usize - 1) % 7;
                    prop_assert_eq!(ids, &vec![ids[0]; length][..]);
                    let positions = &batch.position_ids[sequence[0]..sequence[1]];
                    prop_assert_eq!(positions, &(0..length as i64).collect::<Vec<_>>()[..]);
                }
                if let Some(most) = way.options.max_tokens_per_micro_batch {
                    // A packed row is never torn apart, even if it alone is longer.
                    let row = way.options.packing.map_or(7, |packing| packing.packed_sequence_size);
                    prop_assert!(batch.num_tokens <= most.max(row));
                }
            }
        }
    }

    #[test]
    fn ranks_hold_the_global_batch_one_after_the_other(way in way(), world in 1usize..5, drop_last in any::<bool>()) {
        let way = Way { options: LoaderOptions { drop_last, ..way.options }, ..way };
        let mut whole = way.open(DataRank::SINGLE);
        prop_assume!(!drop_last || (way.rows >= way.options.local_batch_size && way.options.packing.is_none()));
        let mut ranks: Vec<_> = (0..world).map(|rank| way.open(DataRank { rank, world })).collect();
        for _ in 0..6 {
            let step = whole.next_step().unwrap();
            let parts: Vec<_> = ranks.iter_mut().map(|rank| rank.next_step().unwrap()).collect();
            prop_assert!(parts.iter().all(|part| part.batches.len() == parts[0].batches.len()));
            prop_assert!(parts.iter().all(|part| part.ends_epoch == step.ends_epoch));
            let joined = parts.into_iter().flat_map(|part| part.batches);
            let joined: Vec<_> = joined.filter(|batch| batch.num_tokens > 0).collect();
            prop_assert_eq!(joined, step.batches);
            prop_assert!(ranks.iter().all(|rank| rank.state() == whole.state()));
        }
    }

    #[test]
    fn a_resumed_run_equals_an_uninterrupted_one_on_any_number_of_ranks(
        way in way(), stop in 0usize..12, before in 1usize..5, after in 1usize..5, threads in 0usize..3
    ) {
        let mut whole = way.open(DataRank { rank: before - 1, world: before });
        (0..stop).for_each(|_| drop(whole.next_step().unwrap()));
        let saved: LoaderState = serde_json::from_str(&serde_json::to_string(&whole.state()).unwrap()).unwrap();
        let rank = DataRank { rank: after - 1, world: after };
        let mut same_rank = way.open(rank);
        (0..stop).for_each(|_| drop(same_rank.next_step().unwrap()));
        let mut resumed = Way { options: LoaderOptions { num_workers: threads, ..way.options }, ..way }.open(rank);
        resumed.resume(saved).unwrap();
        for _ in 0..6 {
            let (a, b) = (same_rank.next_step().unwrap(), resumed.next_step().unwrap());
            prop_assert_eq!((a.batches, a.ends_epoch), (b.batches, b.ends_epoch));
        }
    }
}
