//! Data files as other programs write them: tests/golden/data was written by pyarrow (tools/golden/rows.py).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mistral4_processor::image::{ImageProcessor, ImageProcessorConfig};
use mistral4_processor::tokenizer::TekkenBuilder;
use mistral4_processor::{Processor, SpecialTokens};
use mistral4_train::Result;
use mistral4_train::data::{self, Batch, DataContext, DataRank, Loader, LoaderOptions};
use mistral4_train::recipe::{Override, Recipe};
use proptest::prelude::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(name)
}

fn context() -> DataContext {
    let file = TekkenBuilder::new(TekkenBuilder::MIN_VOCAB_SIZE).train([]).unwrap();
    let config = ImageProcessorConfig {
        patch_size: 4,
        max_height: 32,
        max_width: 32,
        ..ImageProcessorConfig::default()
    };
    let processor = Processor::new(file.tokenizer().unwrap(), Some(ImageProcessor::new(config)));
    DataContext { processor: Some(Arc::new(processor)), vocab_size: 2000, seed: 1 }
}

/// A loader of the data that a recipe's `dataset` names, a row at a time.
fn open(dataset: &str, more: &[(&str, &str)]) -> Result<Loader> {
    let text = format!(
        "recipe: FinetuneRecipeForVLM\nmodel: {{config: tiny}}\ndataset: {dataset}\n\
         dataloader: {{shuffle: false, num_workers: 2}}\n\
         step_scheduler: {{global_batch_size: 1, local_batch_size: 1}}\n"
    );
    let more =
        more.iter().map(|(key, value)| Override { key: (*key).to_owned(), value: (*value).to_owned() });
    let recipe = Recipe::parse("r.yaml", text.as_bytes(), &more.collect::<Vec<_>>(), &|_| None)?;
    let source = data::open(&recipe.dataset, &context())?;
    Loader::new(source, LoaderOptions::training(&recipe, 11), DataRank::SINGLE)
}

fn epoch(loader: &mut Loader) -> Result<Vec<Batch>> {
    let mut batches = Vec::new();
    loop {
        let step = loader.next_step()?;
        batches.extend(step.batches);
        if step.ends_epoch {
            return Ok(batches);
        }
    }
}

fn all(dataset: &str, more: &[(&str, &str)]) -> Vec<Batch> {
    epoch(&mut open(dataset, more).unwrap()).unwrap()
}

/// What a batch learns, as text.
fn learned(batch: &Batch) -> String {
    let ids: Vec<u32> = batch.labels.iter().filter(|&&label| label >= 0).map(|&label| label as u32).collect();
    context().processor.unwrap().tokenizer().decode(&ids, SpecialTokens::Keep).unwrap()
}

#[test]
fn parquet_rows_are_the_samples_of_their_json_twins() {
    for (name, target, rows, images) in [
        ("chat", "ChatDataset", 3, 0),
        ("chat_strings", "ChatDataset", 3, 0),
        ("share_gpt", "ChatDataset", 40, 0),
        ("vlm_image", "ChatDataset", 3, 3),
        ("vlm_images", "ChatDataset", 1, 2),
        ("medpix", "make_medpix_dataset", 3, 3),
        ("text", "text, seq_length: 32", 60, 0),
        (
            "instruction",
            "ColumnMappedTextInstructionDataset, column_mapping: {context: definition, question: inputs, answer: targets}",
            5,
            0,
        ),
    ] {
        let read = |extension: &str| {
            let path = fixture(&format!("{name}.{extension}"));
            all(&format!("{{_target_: {target}, path_or_dataset: {}}}", path.display()), &[])
        };
        let (parquet, json) = (read("parquet"), read("jsonl"));
        assert_eq!(parquet, json, "{name}");
        assert!(json.len() >= rows, "{name}");
        assert_eq!(json.iter().map(|batch| batch.images.len()).sum::<usize>(), images, "{name}");
    }
    let chat = all(
        &format!("{{_target_: ChatDataset, path_or_dataset: {}}}", fixture("chat.parquet").display()),
        &[],
    );
    assert_eq!(learned(&chat[0]), "hello</s>");
    assert_eq!(learned(&chat[1]), "[TOOL_CALLS]weather[ARGS]{\"city\": \"Rome\"}</s>It is sunny.</s>");
    assert_eq!(learned(&chat[2]), "[THINK]two and two[/THINK]4</s>6</s>");
}

#[test]
fn parquet_is_shuffled_and_split_as_other_data() {
    let path = fixture("share_gpt.parquet");
    let dataset =
        format!("{{_target_: ChatDataset, path_or_dataset: {}, split: 'train[10:35]'}}", path.display());
    let mut shuffled = open(&dataset, &[("dataloader.shuffle", "true")]).unwrap();
    assert_eq!((shuffled.num_samples(), shuffled.steps_per_epoch()), (Some(25), Some(25)));
    let texts = |batches: &[Batch]| batches.iter().map(learned).collect::<Vec<_>>();
    let in_order: Vec<_> = (10..35).map(|i| format!("answer {i}</s>")).collect();
    assert_eq!(texts(&all(&dataset, &[])), in_order);
    let (first, second) = (texts(&epoch(&mut shuffled).unwrap()), texts(&epoch(&mut shuffled).unwrap()));
    assert!(first != in_order && first != second);
    for mut texts in [first, second] {
        texts.sort();
        assert_eq!(texts, in_order);
    }
}

#[test]
fn questions_about_images_come_from_the_files_of_their_split() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["train-00000-of-00001", "validation-00000-of-00001"] {
        std::fs::copy(fixture("medpix.parquet"), folder.path().join(format!("{name}.parquet"))).unwrap();
    }
    let place = folder.path().display();
    let dataset = |split: &str| {
        format!("{{_target_: make_medpix_dataset, path_or_dataset: {place}, split: '{split}'}}")
    };
    let batches = all(&dataset("train"), &[]);
    let texts: Vec<_> = batches.iter().map(learned).collect();
    assert_eq!(texts, [0, 1, 2].map(|i| format!("noise {i}</s>")));
    assert!(batches.iter().all(|batch| batch.images.len() == 1));
    assert_eq!(all(&dataset("validation[1:]"), &[]).len(), 2);
    let error = open(&dataset("test"), &[]).err().unwrap().to_string();
    assert!(error.contains("no file of the split `test`"), "{error}");
    let rows = "{\"image_id\": \"a.png\", \"question\": \"?\"}\n";
    std::fs::write(folder.path().join("broken.jsonl"), rows).unwrap();
    let mut broken = open(&dataset("broken"), &[]).unwrap();
    let error = epoch(&mut broken).unwrap_err().to_string();
    assert!(error.contains("broken.jsonl") && error.contains("answer"), "{error}");
}

#[test]
fn shards_are_read_from_folders_patterns_and_lists() {
    let folder = tempfile::tempdir().unwrap();
    for shard in ["train-00000-of-00002", "train-00001-of-00002"] {
        std::fs::copy(fixture("share_gpt.parquet"), folder.path().join(format!("{shard}.parquet"))).unwrap();
    }
    let place = folder.path().display();
    for paths in [
        format!("{place}"),
        format!("'{place}/train-*.parquet'"),
        format!("[{place}/train-00000-of-00002.parquet, {place}/train-00001-of-00002.parquet]"),
    ] {
        assert_eq!(
            all(&format!("{{_target_: ChatDataset, path_or_dataset: {paths}}}"), &[]).len(),
            80,
            "{paths}"
        );
    }
    std::fs::copy(fixture("chat.jsonl"), folder.path().join("more.jsonl")).unwrap();
    let error = open(&format!("{{_target_: ChatDataset, path_or_dataset: {place}}}"), &[]).err().unwrap();
    assert!(error.to_string().contains("JSON or Parquet, not both"), "{error}");
}

#[test]
fn instructions_are_masked_as_in_nemo() {
    let path = fixture("instruction.jsonl");
    let read = |more: &str| {
        let batches = all(
            &format!(
                "{{_target_: ColumnMappedTextInstructionDataset, path_or_dataset_id: {}, \
                 column_mapping: {{context: definition, question: inputs, answer: targets}}{more}}}",
                path.display()
            ),
            &[],
        );
        let ids = context().processor.unwrap().tokenizer().decode(&batches[1].input_ids, SpecialTokens::Keep);
        (ids.unwrap(), learned(&batches[1]))
    };
    assert_eq!(read(""), ("<s>Add. 1 + 1 2".to_owned(), "2</s>".to_owned()));
    let all_tokens = ("<s>Add. 1 + 1 2".to_owned(), "Add. 1 + 1 2</s>".to_owned());
    assert_eq!(read(", answer_only_loss_mask: false"), all_tokens);
    let (ids, learned) = read(", use_hf_chat_template: true");
    assert!(ids.starts_with("<s>[SYSTEM_PROMPT]Add.[/SYSTEM_PROMPT]"), "{ids}");
    assert!(ids.ends_with("[INST]1 + 1[/INST]2") && learned == "2</s>", "{ids} {learned}");
    let (ids, learned) = read(", seq_length: 13, truncation: true");
    assert_eq!((ids.as_str(), learned.as_str()), ("<s>Add. 1 + 1 ", "2"));
}

#[test]
fn malformed_rows_name_their_place_and_are_counted() {
    let chat = fixture("chat.parquet").display().to_string();
    // Every row has text in place of a conversation's last column.
    let wrong = format!(
        "{{_target_: ColumnMappedTextInstructionDataset, path_or_dataset: {chat}, \
         column_mapping: {{question: messages, answer: tools}}"
    );
    let error = epoch(&mut open(&format!("{wrong}}}"), &[]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("chat.parquet: row group 0, row 0: field `messages`: must be text"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let good = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    std::fs::write(&path, format!("{good}\n{{\"messages\": 3}}\n{good}\nnot json\n{good}\n")).unwrap();
    for packing in ["0", "64"] {
        let dataset =
            format!("{{_target_: ChatDataset, path_or_dataset: {}, on_error: skip}}", path.display());
        let mut loader = open(&dataset, &[("packed_sequence.packed_sequence_size", packing)]).unwrap();
        let batches = epoch(&mut loader).unwrap();
        assert_eq!(batches.iter().map(|batch| batch.num_label_tokens).sum::<usize>(), 3 * 2);
        assert_eq!(loader.skipped().unusable, 2);
        let messages = loader.skipped().messages.join("\n");
        for part in ["rows.jsonl:2: field `messages`", "rows.jsonl:4: field `(row)`"] {
            assert!(messages.contains(part), "{messages}");
        }
    }
    let strict = format!("{{_target_: ChatDataset, path_or_dataset: {}}}", path.display());
    let error = epoch(&mut open(&strict, &[]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:2: field `messages`"), "{error}");
    for (name, want) in [("missing.parquet", "cannot read"), ("rows.parquet", "no Parquet file")] {
        std::fs::write(folder.path().join("rows.parquet"), "PAR1 and nothing").unwrap();
        let dataset =
            format!("{{_target_: ChatDataset, path_or_dataset: {}}}", folder.path().join(name).display());
        let error = open(&dataset, &[]).err().unwrap().to_string();
        assert!(error.contains(want), "{error}");
    }
    let text = format!(
        "{{_target_: text, seq_length: 8, text_column: body, path_or_dataset: {}}}",
        fixture("text.parquet").display()
    );
    let error = open(&text, &[]).err().unwrap().to_string();
    assert!(error.contains("there is no column `body`; there are id, text"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_parquet_files_never_panic(
        name in prop_oneof![Just("chat"), Just("text"), Just("vlm_image")],
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let mut bytes = std::fs::read(fixture(&format!("{name}.parquet"))).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.parquet");
        std::fs::write(&path, bytes).unwrap();
        let target = if name == "text" { "text, seq_length: 16" } else { "ChatDataset" };
        let dataset = format!("{{_target_: {target}, on_error: skip, path_or_dataset: {}}}", path.display());
        let _ = open(&dataset, &[]).and_then(|mut loader| epoch(&mut loader));
    }
}
