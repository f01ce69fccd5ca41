//! Token ids equal to `mistral_common`'s, on the fixtures of `tools/golden/processor.py`.
//!
//! With `MISTRAL4_PROCESSOR_GOLDENS=DIR` the same checks run over a folder that the script wrote with `--full --out DIR`,
//! which holds Mistral's whole vocabulary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mistral4_processor::chat::{ChatRenderer, ChatRequest, ImageSource};
use mistral4_processor::image::ImageProcessorKind;
use mistral4_processor::{Error, ImageProcessor, SpecialTokens, Tokenizer, TokenizerVersion, ValidationMode};
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

fn golden_dir() -> PathBuf {
    match std::env::var_os("MISTRAL4_PROCESSOR_GOLDENS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/processor"),
    }
}

fn read(name: &str) -> String {
    let path = golden_dir().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[derive(Deserialize)]
struct Goldens<T> {
    format_version: u32,
    cases: Vec<T>,
}

fn goldens<T: for<'de> Deserialize<'de>>(name: &str) -> Vec<T> {
    let goldens: Goldens<T> = serde_json::from_str(&read(name)).expect("the golden file parses");
    assert_eq!(goldens.format_version, 1);
    goldens.cases
}

#[derive(Deserialize)]
struct StringCase {
    text: String,
    times: Option<usize>,
    ids: Option<Vec<u32>>,
    count: Option<usize>,
    fnv: Option<String>,
    hf_ids: Option<Vec<u32>>,
}

impl StringCase {
    fn text(&self) -> String {
        self.text.repeat(self.times.unwrap_or(1))
    }

    fn check(&self, ids: &[u32]) {
        match &self.ids {
            Some(expected) => assert_eq!(ids, expected, "{:?}", self.text),
            None => assert_eq!(
                (Some(ids.len()), Some(fnv(ids))),
                (self.count, self.fnv.clone()),
                "{:?}",
                self.text
            ),
        }
    }
}

fn fnv(ids: &[u32]) -> String {
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn strings_give_the_ids_of_mistral_common_and_decode_back() {
    let tokenizer = Tokenizer::from_file(&golden_dir().join("tekken.json")).expect("the fixture loads");
    let cases: Vec<StringCase> = goldens("strings.json");
    assert!(cases.len() >= 2000);
    for case in cases {
        let text = case.text();
        let ids = tokenizer.encode(&text).expect("text encodes");
        case.check(&ids);
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Keep).expect("ids decode"), text);
        let mut stream = tokenizer.decode_stream(SpecialTokens::Keep);
        let mut streamed: String = ids.iter().map(|id| stream.push(*id).expect("known ids")).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, text);
    }
}

#[test]
fn tokenizer_json_gives_the_ids_of_hugging_face() {
    let mut file: Value = serde_json::from_str(&read("tokenizer.json")).expect("the fixture parses");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("tokenizer.json");
    for ignore_merges in [true, false] {
        // In this vocabulary every token is reached by merges, so both settings give the same ids.
        file["model"]["ignore_merges"] = ignore_merges.into();
        std::fs::write(&path, file.to_string()).expect("the folder is writable");
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("the fixture loads");
        assert_eq!(tokenizer.version(), TokenizerVersion::V15);
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (1, 2, Some(11)));
        for case in goldens::<StringCase>("strings.json") {
            let text = case.text();
            let ids = tokenizer.encode(&text).expect("text encodes");
            match &case.hf_ids {
                Some(expected) => assert_eq!(ids, *expected, "{text:?}"),
                None => case.check(&ids),
            }
            assert_eq!(tokenizer.decode(&ids, SpecialTokens::Keep).expect("ids decode"), text);
        }
    }
}

#[derive(Deserialize)]
struct ConversationCase {
    version: String,
    mode: String,
    request: Box<RawValue>,
    images: Vec<(usize, usize)>,
    ids: Option<Vec<u32>>,
    refused: Option<String>,
    reason: Option<String>,
}

/// The fixture's vocabulary as a file of each version.
fn tokenizers() -> BTreeMap<String, Tokenizer> {
    let file: Value = serde_json::from_str(&read("tekken.json")).expect("the fixture parses");
    ["v3", "v7", "v11", "v13", "v15"]
        .into_iter()
        .map(|version| {
            let mut file = file.clone();
            file["config"]["version"] = version.into();
            if version != "v15" {
                file.as_object_mut().expect("an object").remove("model_settings_builder");
            }
            let tokenizer =
                Tokenizer::from_tekken_bytes(file.to_string().as_bytes(), Path::new("tekken.json"));
            (version.to_owned(), tokenizer.expect("the fixture loads as every version"))
        })
        .collect()
}

#[test]
fn conversations_give_the_ids_of_mistral_common_or_are_refused_alike() {
    let tokenizers = tokenizers();
    let cases: Vec<ConversationCase> = goldens("conversations.json");
    assert!(cases.len() >= 200);
    let mut failures = Vec::new();
    for case in &cases {
        let tokenizer = &tokenizers[&case.version];
        let config = tokenizer.image_config().expect("the fixture has an image section");
        let images = ImageProcessor::new(config.into()).with_kind(ImageProcessorKind::MistralCommon);
        let mode = match case.mode.as_str() {
            "test" => ValidationMode::Test,
            "finetuning" => ValidationMode::Finetuning,
            other => panic!("unknown mode {other}"),
        };
        let rendered = ChatRequest::from_json(case.request.get()).and_then(|request| {
            ChatRenderer::new(tokenizer).render(&request, mode, &mut |source| {
                let ImageSource::Supplied(index) = source else {
                    panic!("only bare image parts in the fixture")
                };
                let (width, height) = case.images[*index];
                Ok(images.token_grid(height, width))
            })
        });
        let label = format!("{} {} {}", case.version, case.mode, case.request.get());
        match (rendered, &case.ids, &case.refused) {
            (Ok(rendered), Some(ids), None) => {
                if rendered.ids != *ids {
                    let text = |ids: &[u32]| tokenizer.decode(ids, SpecialTokens::Keep).expect("known ids");
                    failures.push(format!(
                        "{label}\n  ours   {}\n  theirs {}",
                        text(&rendered.ids),
                        text(ids)
                    ));
                }
            }
            (Err(Error::Refused { refusal, reason }), None, Some(refused)) => {
                if format!("{refusal:?}") != *refused {
                    let theirs = case.reason.as_deref().unwrap_or_default();
                    failures
                        .push(format!("{label}\n  ours   {refusal:?} {reason}\n  theirs {refused} {theirs}"));
                }
            }
            (ours, ids, refused) => {
                let ours = ours
                    .map(|rendered| tokenizer.decode(&rendered.ids, SpecialTokens::Keep).expect("known ids"));
                let theirs =
                    ids.as_ref().map(|ids| tokenizer.decode(ids, SpecialTokens::Keep).expect("known ids"));
                failures.push(format!(
                    "{label}\n  ours   {ours:?}\n  theirs {theirs:?} {refused:?} {:?}",
                    case.reason
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{} of {} differ:\n{}", failures.len(), cases.len(), failures.join("\n"));
}
