//! Outside input of any kind gives a result or an error, and encoding and decoding are inverse.

use std::path::Path;
use std::sync::LazyLock;

use mistral4_processor::chat::{ChatRenderer, ChatRequest};
use mistral4_processor::image::TokenGrid;
use mistral4_processor::json::Json;
use mistral4_processor::tokenizer::{ImageConfig, TekkenBuilder};
use mistral4_processor::{
    ImageProcessor, SourceImage, SpecialTokens, Tokenizer, TokenizerVersion, ValidationMode,
};
use proptest::prelude::*;

const TEXT: &str = "the cat and the dog, the cat ate; naïve café 漢字 漢字 😀😀 [INST] 123 123\n\n  the end";

static FILE: LazyLock<String> = LazyLock::new(|| {
    let image = ImageConfig { image_patch_size: 2, max_image_size: 16, spatial_merge_size: 2 };
    TekkenBuilder::new(340).image(image).train([TEXT]).expect("the text is learnable").to_json()
});

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| read(FILE.as_bytes()).expect("the file loads"));

fn read(bytes: &[u8]) -> mistral4_processor::Result<Tokenizer> {
    Tokenizer::from_tekken_bytes(bytes, Path::new("tekken.json"))
}

/// Byte-pair encoding as it is defined: again and again, the first of the lowest-ranked neighbours.
fn merge_by_definition(piece: &[u8]) -> Vec<Vec<u8>> {
    let rank = |bytes: &[u8]| {
        (0..TOKENIZER.vocab_size() as u32).find(|id| TOKENIZER.token_bytes(*id) == Some(bytes))
    };
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|byte| vec![*byte]).collect();
    loop {
        let joined =
            parts.windows(2).enumerate().filter_map(|(at, pair)| rank(&pair.concat()).map(|rank| (rank, at)));
        let Some((_, at)) = joined.min() else { return parts };
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
}

/// Text with what tokenizers and chat forms stumble over.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        "[a-e ]{0,12}",
        Just("the cat".to_owned()),
        Just("[INST]</s>[IMG]".to_owned()),
        Just("漢字😀\u{301}".to_owned()),
        Just("\r\n \t  ".to_owned()),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

const WORDS: &[&str] = &[
    "user",
    "assistant",
    "system",
    "tool",
    "text",
    "image",
    "thinking",
    "function",
    "high",
    "abcdefghi",
    "{}",
];

const KEYS: &[&str] = &[
    "role",
    "content",
    "type",
    "text",
    "thinking",
    "closed",
    "tool_calls",
    "tool_call_id",
    "id",
    "function",
    "name",
    "arguments",
    "parameters",
    "messages",
    "tools",
    "reasoning_effort",
    "reasoning_content",
    "prefix",
    "properties",
    "pattern",
    "required",
    "items",
    "path",
    "image_url",
    "url",
];

/// JSON values around the shape of a request.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        prop::sample::select(WORDS).prop_map(Into::into),
        text().prop_map(Into::into),
    ];
    leaf.prop_recursive(5, 48, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
            prop::collection::vec((prop::sample::select(KEYS), inner), 0..6).prop_map(|entries| {
                entries
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            }),
        ]
    })
}

fn tokenizer_of(version: TokenizerVersion) -> Tokenizer {
    let mut file: serde_json::Value = serde_json::from_str(&FILE).expect("the file is JSON");
    file["config"]["version"] = version.as_str().into();
    if version != TokenizerVersion::V15 {
        file.as_object_mut().expect("an object").remove("model_settings_builder");
    }
    read(file.to_string().as_bytes()).expect("the file loads as every version")
}

static VERSIONS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| TokenizerVersion::ALL.map(tokenizer_of).into());

fn try_to_render(request: &str) {
    let Ok(request) = ChatRequest::from_json(request) else { return };
    for tokenizer in VERSIONS.iter() {
        for mode in [
            ValidationMode::Test,
            ValidationMode::Serving,
            ValidationMode::Finetuning,
            ValidationMode::Agnostic,
        ] {
            let grid = TokenGrid { rows: 2, columns: 3 };
            if let Ok(rendered) = ChatRenderer::new(tokenizer).render(&request, mode, &mut |_| Ok(grid)) {
                assert_eq!(rendered.ids.len(), rendered.kinds.len());
                assert_eq!(rendered.ids.len(), rendered.mask(false, false).len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn text_survives_encoding_and_never_becomes_a_control_token(text in text()) {
        let ids = TOKENIZER.encode(&text).expect("text encodes");
        prop_assert!(ids.iter().all(|id| !TOKENIZER.is_special(*id)));
        prop_assert_eq!(TOKENIZER.decode(&ids, SpecialTokens::Skip).expect("ids decode"), text);
    }

    #[test]
    fn merges_follow_their_definition(piece in "[a-z]{1,24}") {
        let ids = TOKENIZER.encode(&piece).expect("text encodes");
        let parts: Vec<Vec<u8>> = ids.iter().map(|id| TOKENIZER.token_bytes(*id).expect("text ids").to_vec()).collect();
        prop_assert_eq!(parts, merge_by_definition(piece.as_bytes()));
    }

    #[test]
    fn a_vocabulary_learned_from_any_text_encodes_it(texts in prop::collection::vec(text(), 0..4), size in 296_usize..420) {
        let file = TekkenBuilder::new(size).train(texts.iter().map(String::as_str)).expect("any text is learnable");
        prop_assert!(file.vocab_size() <= size);
        let tokenizer = file.tokenizer().expect("the built file loads");
        for text in &texts {
            let ids = tokenizer.encode(text).expect("text encodes");
            prop_assert_eq!(&tokenizer.decode(&ids, SpecialTokens::Keep).expect("ids decode"), text);
        }
    }

    #[test]
    fn a_stream_says_what_decoding_says(ids in prop::collection::vec(0_u32..340, 0..60), keep in any::<bool>()) {
        let ids: Vec<u32> = ids.into_iter().filter(|id| (*id as usize) < TOKENIZER.vocab_size()).collect();
        let special_tokens = if keep { SpecialTokens::Keep } else { SpecialTokens::Skip };
        let mut stream = TOKENIZER.decode_stream(special_tokens);
        let mut streamed: String = ids.iter().map(|id| stream.push(*id).expect("known ids")).collect();
        streamed.push_str(&stream.finish());
        prop_assert_eq!(streamed, TOKENIZER.decode(&ids, special_tokens).expect("known ids"));
    }

    #[test]
    fn json_survives_writing_and_reading(value in json()) {
        let read = Json::parse(&value.to_string()).expect("serde_json writes JSON");
        prop_assert_eq!(Json::parse(&read.dump()).expect("we write JSON"), read);
    }

    #[test]
    fn requests_of_any_shape_are_rendered_or_refused(value in json()) {
        try_to_render(&value.to_string());
    }

    #[test]
    fn conversations_of_any_content_are_rendered_or_refused(values in prop::collection::vec((0..4_usize, json()), 1..5)) {
        let messages = values.into_iter().map(|(role, value)| {
            let role = ["user", "assistant", "system", "tool"][role];
            serde_json::json!({"role": role, "content": value, "tool_calls": value, "tool_call_id": "abcdefghi"})
        });
        try_to_render(&serde_json::Value::Array(messages.collect()).to_string());
    }

    #[test]
    fn a_truncated_or_changed_tokenizer_file_is_read_or_refused(
        cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut bytes = FILE.clone().into_bytes();
        let place = at.index(bytes.len());
        bytes[place] = byte;
        if let Ok(tokenizer) = read(&bytes) {
            tokenizer.encode(TEXT).expect("a loaded tokenizer encodes");
        }
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn pictures_of_any_bytes_are_decoded_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200), format in 0..5_usize,
    ) {
        let starts: [&[u8]; 5] = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP"];
        let bytes = [starts[format], &bytes].concat();
        let _ = SourceImage::from_bytes(&bytes, "fuzz");
    }

    #[test]
    fn a_changed_picture_is_decoded_or_refused(name in 0..4_usize, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let name = ["rgb.png", "420.jpg", "lossy.webp", "palette.gif"][name];
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/processor/images").join(name);
        let mut bytes = std::fs::read(path).expect("the fixture is there");
        for (at, byte) in changes {
            let place = at.index(bytes.len());
            bytes[place] = byte;
        }
        if let Ok(picture) = SourceImage::from_bytes(&bytes, name)
            && picture.height() * picture.width() < 1_000_000
        {
            let processor = ImageProcessor::new(TOKENIZER.image_config().expect("there is an image section").into());
            let image = processor.process(&picture).expect("a picture of any size");
            prop_assert!(image.height <= 16 && image.width <= 16);
        }
    }
}

#[test]
fn deep_nesting_never_exhausts_the_stack() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        assert!(ChatRequest::from_json(&deep).is_err());
        assert!(read(deep.as_bytes()).is_err());
        let unknown_key = FILE.replacen("\"config\"", &format!("\"more\": {deep}, \"config\""), 1);
        assert!(read(unknown_key.as_bytes()).is_ok(), "what is not read is skipped, however deep");
        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["tokenizer.json", "preprocessor_config.json", "config.json"] {
            std::fs::write(dir.path().join(name), &deep).expect("the folder is writable");
        }
        assert!(Tokenizer::from_dir(dir.path()).is_err());
        assert!(ImageProcessor::from_dir(dir.path(), None).is_err());
    }
    let mut file: serde_json::Value = serde_json::from_str(&FILE).expect("the file is JSON");
    file["config"]["pattern"] = "(".repeat(100_000).into();
    assert!(read(file.to_string().as_bytes()).is_err());
}
