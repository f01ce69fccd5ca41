//! What broken files and requests are answered with.

use std::fmt::Write as _;
use std::path::Path;

use mistral4_processor::chat::{ChatRenderer, ChatRequest};
use mistral4_processor::image::TokenGrid;
use mistral4_processor::tokenizer::TekkenBuilder;
use mistral4_processor::{ImageProcessor, Processor, RenderOptions, SourceImage, Tokenizer, ValidationMode};
use serde_json::{Value, json};

fn tekken() -> Value {
    let file =
        TekkenBuilder::new(TekkenBuilder::MIN_VOCAB_SIZE).train([]).expect("nothing to learn").to_json();
    serde_json::from_str(&file).expect("the file is JSON")
}

/// One line for each case: its name and its error.
fn lines<T>(cases: Vec<(&str, mistral4_processor::Result<T>)>) -> String {
    let mut text = String::new();
    for (name, result) in cases {
        let error = result.err().unwrap_or_else(|| panic!("{name} was accepted"));
        writeln!(text, "{name}: {error}").expect("a string takes text");
    }
    text
}

/// Compares with a snapshot, folders left out.
#[track_caller]
fn check(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_omit_expression(true);
    settings.add_filter(r"/\S+/(\w+\.json)", "DIR/$1");
    settings.add_filter(r#""!" and ".+?"|".+?" and "!""#, "\"!\" and another");
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn tekken_files() {
    let changed = |change: fn(&mut Value)| {
        let mut file = tekken();
        change(&mut file);
        Tokenizer::from_tekken_bytes(file.to_string().as_bytes(), Path::new("tekken.json"))
    };
    let text = |text: &[u8]| Tokenizer::from_tekken_bytes(text, Path::new("tekken.json"));
    check(
        "tekken_files",
        &lines(vec![
            ("empty", text(b"")),
            ("truncated", text(b"{\"config\": {\"pattern\": \"a")),
            ("not an object", text(b"[1]")),
            ("not UTF-8", text(b"{\"config\": {\"pattern\": \"\xff\"}}")),
            ("two objects", text(format!("{}{{}}", tekken()).as_bytes())),
            ("no config", changed(|file| drop(file.as_object_mut().expect("an object").remove("config")))),
            ("no vocab", changed(|file| drop(file.as_object_mut().expect("an object").remove("vocab")))),
            ("no special tokens", changed(|file| file["special_tokens"] = Value::Null)),
            ("unknown version", changed(|file| file["config"]["version"] = json!("v99"))),
            ("version is a number", changed(|file| file["config"]["version"] = json!(15))),
            ("bad pattern", changed(|file| file["config"]["pattern"] = json!("(a"))),
            ("huge vocabulary", changed(|file| file["config"]["default_vocab_size"] = json!(u64::MAX))),
            (
                "huge special count",
                changed(|file| file["config"]["default_num_special_tokens"] = json!(1u64 << 40)),
            ),
            ("negative size", changed(|file| file["config"]["default_vocab_size"] = json!(-1))),
            ("too small", changed(|file| file["config"]["default_vocab_size"] = json!(100))),
            ("rank out of order", changed(|file| file["vocab"][7]["rank"] = json!(8))),
            ("not base64", changed(|file| file["vocab"][7]["token_bytes"] = json!("%%"))),
            ("wrong byte", changed(|file| file["vocab"][7]["token_bytes"] = json!("QQ=="))),
            ("token bytes missing", changed(|file| file["vocab"][7] = json!({"rank": 7}))),
            ("special rank too high", changed(|file| file["special_tokens"][3]["rank"] = json!(4000))),
            ("special rank twice", changed(|file| file["special_tokens"][3]["rank"] = json!(4))),
            ("special text twice", changed(|file| file["special_tokens"][3]["token_str"] = json!("<s>"))),
            ("no end token", changed(|file| file["special_tokens"][2]["token_str"] = json!("<end>"))),
            (
                "effort default missing",
                changed(|file| {
                    file["model_settings_builder"]["reasoning_effort"]["default"] = Value::Null;
                }),
            ),
            (
                "effort default not offered",
                changed(|file| {
                    file["model_settings_builder"]["reasoning_effort"]["default"] = json!("max");
                }),
            ),
            (
                "effort twice",
                changed(|file| {
                    file["model_settings_builder"]["reasoning_effort"]["values"] = json!(["none", "none"]);
                }),
            ),
            ("unknown setting", changed(|file| file["model_settings_builder"]["color"] = json!(1))),
            ("settings before v15", changed(|file| file["config"]["version"] = json!("v13"))),
            (
                "patch of zero",
                changed(|file| file["image"] = json!({"image_patch_size": 0, "max_image_size": 1})),
            ),
            (
                "image in the old place",
                changed(|file| {
                    file["multimodal"] = json!({"image_patch_size": 1, "max_image_size": 1});
                }),
            ),
        ]),
    );
}

#[test]
fn tokenizer_json_files() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/processor/tokenizer.json");
    let original: Value =
        serde_json::from_str(&std::fs::read_to_string(golden).expect("the fixture is there"))
            .expect("the fixture parses");
    let changed = |change: fn(&mut Value)| {
        let mut file = original.clone();
        change(&mut file);
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).expect("the folder is writable");
        Tokenizer::from_dir(dir.path())
    };
    let text = lines(vec![
        ("no model", changed(|file| drop(file.as_object_mut().expect("an object").remove("model")))),
        ("other model", changed(|file| file["model"]["type"] = json!("Unigram"))),
        ("byte fallback", changed(|file| file["model"]["byte_fallback"] = json!(true))),
        ("dropout", changed(|file| file["model"]["dropout"] = json!(0.1))),
        ("normalizer", changed(|file| file["normalizer"] = json!({"type": "NFC"}))),
        ("metaspace", changed(|file| file["pre_tokenizer"] = json!({"type": "Metaspace"}))),
        (
            "bad pattern",
            changed(|file| file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("[")),
        ),
        ("unknown merge", changed(|file| file["model"]["merges"][3] = json!(["qq", "zz"]))),
        ("merge of one", changed(|file| file["model"]["merges"][3] = json!("alone"))),
        ("huge id", changed(|file| file["model"]["vocab"]["!"] = json!(4_000_000_000u32))),
        ("shared id", changed(|file| file["model"]["vocab"]["!"] = json!(300))),
        ("no begin token", changed(|file| file["added_tokens"][1]["content"] = json!("<begin>"))),
        ("vocab is a list", changed(|file| file["model"]["vocab"] = json!([]))),
    ]);
    check("tokenizer_json_files", &text);
}

#[test]
fn image_settings() {
    let read = |name: &str, value: Value| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join(name), value.to_string()).expect("the folder is writable");
        ImageProcessor::from_dir(dir.path(), None)
    };
    let pixels = |value: Value| read("preprocessor_config.json", value);
    let text = lines(vec![
        ("patch of zero", pixels(json!({"patch_size": 0}))),
        ("oblong patch", pixels(json!({"patch_size": {"height": 14, "width": 16}}))),
        ("huge side", pixels(json!({"size": {"longest_edge": 1u64 << 40}}))),
        ("half a size", pixels(json!({"size": {"height": 14}}))),
        ("two means", pixels(json!({"image_mean": [0.5, 0.5]}))),
        ("no deviation", pixels(json!({"image_std": 0}))),
        ("nearest", pixels(json!({"resample": 0}))),
        ("crop", pixels(json!({"do_center_crop": true}))),
        ("flag", pixels(json!({"do_resize": "yes"}))),
        ("rescale", pixels(json!({"rescale_factor": 0.0}))),
        ("merge", read("processor_config.json", json!({"image_processor": {}, "spatial_merge_size": "two"}))),
        ("params", read("params.json", json!({"vision_encoder": {"patch_size": -1}}))),
        ("vision", read("config.json", json!({"vision_config": {"patch_size": 1.5}}))),
    ]);
    check("image_settings", &text);
}

#[test]
fn pictures() {
    let bomb = {
        // A BMP header that promises 2^30 x 2^30 pixels.
        let mut bytes =
            b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\0\0\0\x40\0\0\0\x40\x01\0\x18\0\0\0\0\0".to_vec();
        bytes.resize(64, 0);
        bytes
    };
    let decode = |bytes: &[u8]| SourceImage::from_bytes(bytes, "picture");
    check(
        "pictures",
        &lines(vec![
            ("empty", decode(b"")),
            ("text", decode(b"hello")),
            ("cut PNG", decode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")),
            ("cut JPEG", decode(b"\xff\xd8\xff\xe0\0\x10JFIF")),
            ("bomb", decode(&bomb)),
        ]),
    );
}

#[test]
fn requests() {
    let tokenizer = Tokenizer::from_tekken_bytes(tekken().to_string().as_bytes(), Path::new("tekken.json"));
    let tokenizer = tokenizer.expect("the file loads");
    let render = |request: &str| {
        ChatRequest::from_json(request).and_then(|request| {
            let grid = TokenGrid { rows: 1, columns: 1 };
            ChatRenderer::new(&tokenizer).render(&request, ValidationMode::Test, &mut |_| Ok(grid))
        })
    };
    check(
        "requests",
        &lines(vec![
            ("not JSON", render("[{]")),
            ("a string", render("\"hello\"")),
            ("no messages", render("{}")),
            ("no message", render("[]")),
            ("unknown role", render(r#"[{"role": "robot", "content": "x"}]"#)),
            ("no content", render(r#"[{"role": "user"}]"#)),
            ("unknown part", render(r#"[{"role": "user", "content": [{"type": "video"}]}]"#)),
            (
                "wrong order",
                render(
                    r#"[{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "tool_call_id": "c"}]"#,
                ),
            ),
            (
                "ends with assistant",
                render(r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#),
            ),
            (
                "unknown effort",
                render(r#"{"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "huge"}"#),
            ),
            (
                "effort not offered",
                render(r#"{"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low"}"#),
            ),
            (
                "bad schema",
                render(
                    r#"{"messages": [{"role": "user", "content": "a"}],
                    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}}]}"#,
                ),
            ),
            (
                "thinking system",
                render(r#"[{"role": "system", "content": [{"type": "thinking", "thinking": "x"}]}]"#),
            ),
        ]),
    );
}

#[test]
fn images_of_a_request() {
    let tokenizer = Tokenizer::from_tekken_bytes(tekken().to_string().as_bytes(), Path::new("tekken.json"));
    let blind = Processor::new(tokenizer.expect("the file loads"), None);
    let mut file = tekken();
    file["image"] = json!({"image_patch_size": 14, "max_image_size": 28});
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("tekken.json"), file.to_string()).expect("the folder is writable");
    let seeing = Processor::from_dir(dir.path()).expect("the folder has all it needs");
    let picture = || SourceImage::from_rgb8(vec![0; 12], 2, 2);
    let render = |processor: &Processor, part: Value, supplied: &[SourceImage]| {
        let request = json!([{"role": "user", "content": [part]}]).to_string();
        let request = ChatRequest::from_json(&request).expect("a valid request");
        processor.render(&request, supplied, &RenderOptions::default())
    };
    check(
        "images_of_a_request",
        &lines(vec![
            ("no image settings", render(&blind, json!({"type": "image"}), &[picture()])),
            ("too few", render(&seeing, json!({"type": "image"}), &[])),
            ("too many", render(&seeing, json!({"type": "image"}), &[picture(), picture()])),
            ("missing file", render(&seeing, json!({"type": "image", "path": "no/such.png"}), &[])),
            (
                "web address",
                render(
                    &seeing,
                    json!({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}),
                    &[],
                ),
            ),
            (
                "not base64",
                render(&seeing, json!({"type": "image_url", "image_url": "data:image/png;base64,%%"}), &[]),
            ),
            ("not a picture", render(&seeing, json!({"type": "image", "image": "aGVsbG8="}), &[])),
        ]),
    );
}
