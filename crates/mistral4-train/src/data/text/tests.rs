use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::data::{DataRank, DataSource, Loader, LoaderOptions, LoaderState};
use crate::recipe::{OnError, PackedSequenceConfig};
use mistral4_processor::SpecialTokens;
use mistral4_processor::tokenizer::TekkenBuilder;
use proptest::prelude::*;

const AUSTEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/austen/pride_and_prejudice_1_23.txt");

fn processor() -> Arc<Processor> {
    let text = "It is a truth universally acknowledged, that a single man in possession of a good fortune";
    let file = TekkenBuilder::new(400).train([text]).unwrap();
    Arc::new(Processor::new(file.tokenizer().unwrap(), None))
}

fn config(paths: Vec<PathBuf>, seq_length: usize, split: Option<Split>) -> TextDatasetConfig {
    TextDatasetConfig { paths, text_column: "text".to_owned(), seq_length, split }
}

fn samples(data: &TextDataset) -> Vec<Sample> {
    let mut stream = data.read(None, StreamPlace::default()).unwrap();
    let sample = |sample| match sample {
        StreamedSample::Ready(sample) => sample,
        StreamedSample::Row(_) => panic!("pieces are ready"),
    };
    std::iter::from_fn(|| stream.next()).map(|next| sample(next.unwrap())).collect()
}

/// The text that pieces hold together.
fn text_of(samples: &[Sample], processor: &Processor) -> String {
    let mut ids: Vec<u32> = samples.iter().flat_map(|sample| sample.input_ids.clone()).collect();
    ids.retain(|&id| id != processor.tokenizer().bos());
    processor.tokenizer().decode(&ids, SpecialTokens::Skip).unwrap()
}

#[test]
fn reading_in_chunks_gives_the_tokens_of_the_whole_text() {
    let processor = processor();
    let text = std::fs::read_to_string(AUSTEN).unwrap();
    assert!(text.len() > 1 << 16, "several chunks");
    let mut whole = vec![processor.tokenizer().bos()];
    whole.extend(processor.tokenizer().encode(&text).unwrap());
    whole.push(processor.tokenizer().eos());
    let data = TextDataset::open(&config(vec![AUSTEN.into()], 100, None), processor.clone()).unwrap();
    let pieces = samples(&data);
    assert_eq!(pieces.len(), (whole.len() - 1).div_ceil(100));
    let inputs: Vec<u32> = pieces.iter().flat_map(|piece| piece.input_ids.clone()).collect();
    let labels: Vec<i64> = pieces.iter().flat_map(|piece| piece.labels.clone()).collect();
    assert_eq!(inputs, whole[..whole.len() - 1]);
    assert!(labels.iter().zip(&whole[1..]).all(|(&label, &id)| label == i64::from(id)));
}

#[test]
fn a_stream_goes_on_from_every_place() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..9000).map(|i| format!("Line {i} of a text.\n")).collect();
    std::fs::write(folder.path().join("a.txt"), &text).unwrap();
    std::fs::write(folder.path().join("b.txt"), "A short one.").unwrap();
    let rows: String =
        (0..40).map(|i| format!("{{\"text\": \"{}\"}}\n\n", "row ".repeat(1 + i % 9))).collect();
    std::fs::write(folder.path().join("c.jsonl"), rows).unwrap();
    let data = TextDataset::open(&config(vec![folder.path().into()], 700, None), processor()).unwrap();
    for shuffle in [None, Some((3, 1))] {
        let mut stream = data.read(shuffle, StreamPlace::default()).unwrap();
        let mut all = Vec::new();
        loop {
            let place = stream.place();
            match stream.next() {
                Some(sample) => all.push((place, format!("{:?}", sample.unwrap()))),
                None => break,
            }
        }
        assert!(all.len() > 100);
        for (i, (place, _)) in all.iter().enumerate() {
            let mut again = data.read(shuffle, *place).unwrap();
            for (_, sample) in all.iter().skip(i).take(3) {
                assert_eq!(format!("{:?}", again.next().unwrap().unwrap()), *sample, "from {place:?}");
            }
        }
    }
}

#[test]
fn documents_never_share_a_piece() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, "{\"text\": \"aa\"}\n{\"text\": \"bbb\"}\n{\"text\": \"\"}\n").unwrap();
    let processor = processor();
    let data = TextDataset::open(&config(vec![path], 50, None), processor.clone()).unwrap();
    let texts: Vec<_> =
        samples(&data).iter().map(|sample| text_of(std::slice::from_ref(sample), &processor)).collect();
    assert_eq!(texts, ["aa", "bbb", ""]);
}

#[test]
fn the_held_out_part_is_never_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let processor = processor();
    for name in ["lines.txt", "rows.jsonl"] {
        let path = folder.path().join(name);
        let line = |i: usize| {
            if name == "rows.jsonl" { format!("{{\"text\": \"n{i}\"}}\n") } else { format!("n{i}\n") }
        };
        std::fs::write(&path, (0..400).map(line).collect::<String>()).unwrap();
        let read = |split| {
            let data =
                TextDataset::open(&config(vec![path.clone()], 64, Some(split)), processor.clone()).unwrap();
            text_of(&samples(&data), &processor)
        };
        let (train, held_out) = (read(Split::Train), read(Split::Validation));
        assert!(
            train.starts_with("n0") && held_out.ends_with("399\n") || held_out.ends_with("n399"),
            "{held_out}"
        );
        let first = held_out.trim_start().split(['\n', 'n']).find(|number| !number.is_empty()).unwrap();
        let first: usize = first.parse().unwrap();
        assert!((360..399).contains(&first), "{first}");
        assert!(train.contains(&format!("n{}", first - 1)) && !train.contains(&format!("n{first}")));
    }
}

#[test]
fn malformed_documents_name_line_and_field() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(
        &path,
        b"{\"text\": \"good\"}\n\n{\"body\": 1}\n[]\n{\"text\": 3}\n\xff\n{\"text\": \"last\"}\n",
    )
    .unwrap();
    let data = TextDataset::open(&config(vec![path], 50, None), processor()).unwrap();
    let mut stream = data.read(None, StreamPlace::default()).unwrap();
    let messages: Vec<String> = std::iter::from_fn(|| stream.next())
        .map(|next| next.map_or_else(|error| error.to_string(), |_| "a sample".to_owned()))
        .collect();
    let wanted = [
        "a sample",
        "rows.jsonl:3: field `text`: is missing",
        "rows.jsonl:4: field `(row)`: must be an object",
        "rows.jsonl:5: field `text`: must be text",
        "rows.jsonl:6: field `(row)`: not UTF-8",
        "a sample",
    ];
    assert_eq!(messages.len(), wanted.len(), "{messages:?}");
    for (message, wanted) in messages.iter().zip(wanted) {
        assert!(message.contains(wanted), "{message}");
    }
    let path = folder.path().join("latin1.txt");
    std::fs::write(&path, b"caf\xe9 au lait").unwrap();
    let data = TextDataset::open(&config(vec![path], 50, None), processor()).unwrap();
    let error = data.read(None, StreamPlace::default()).unwrap().next().unwrap().err().unwrap().to_string();
    assert!(error.contains("not UTF-8 text at byte 3"), "{error}");
}

fn options(seed: u64) -> LoaderOptions {
    LoaderOptions {
        global_batch_size: 4,
        local_batch_size: 2,
        shuffle: true,
        seed,
        drop_last: false,
        on_error: OnError::Fail,
        limit: None,
        max_length: None,
        packing: Some(PackedSequenceConfig {
            packed_sequence_size: 64,
            buffer_size: 8,
            drop_long_samples: true,
        }),
        max_tokens_per_micro_batch: None,
        shuffle_buffer_size: 16,
        num_workers: 1,
        prefetch_factor: 2,
        pad_id: 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_resumed_stream_goes_on_in_the_same_order(
        lengths in proptest::collection::vec(0usize..200, 1..30), stop in 0usize..12, seed in any::<u64>()
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut files: BTreeMap<usize, String> = BTreeMap::new();
        for (i, length) in lengths.iter().enumerate() {
            let row = format!("{{\"text\": \"{}\"}}\n", format!("{i} ").repeat(*length));
            files.entry(i % 3).or_default().push_str(&row);
        }
        for (file, rows) in files {
            std::fs::write(folder.path().join(format!("{file}.jsonl")), rows).unwrap();
        }
        let open = || {
            let data = TextDataset::open(&config(vec![folder.path().into()], 30, None), processor()).unwrap();
            Loader::new(DataSource::Streamed(Arc::new(data)), options(seed), DataRank::SINGLE).unwrap()
        };
        let mut whole = open();
        (0..stop).for_each(|_| drop(whole.next_step().unwrap()));
        let state: LoaderState = serde_json::from_str(&serde_json::to_string(&whole.state()).unwrap()).unwrap();
        let mut resumed = open();
        resumed.resume(state).unwrap();
        for _ in 0..8 {
            let (a, b) = (whole.next_step().unwrap(), resumed.next_step().unwrap());
            prop_assert_eq!((a.batches, a.ends_epoch), (b.batches, b.ends_epoch));
        }
    }
}
