//! A learned vocabulary is a working tokenizer with the chat form of v15.

use std::path::Path;

use mistral4_processor::chat::ChatRequest;
use mistral4_processor::tokenizer::{ImageConfig, TekkenBuilder};
use mistral4_processor::{
    Processor, RenderOptions, SourceImage, SpecialTokens, Tokenizer, TokenizerVersion, ValidationMode,
};

const TEXT: &str =
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not. The end, the end.";

fn image_config() -> ImageConfig {
    ImageConfig { image_patch_size: 4, max_image_size: 32, spatial_merge_size: 2 }
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = TekkenBuilder::new(400).image(image_config()).train([TEXT]).expect("the text is learnable");
    file.write(&dir.path().join("tekken.json")).expect("the folder is writable");
    dir
}

#[test]
fn learned_merges_shorten_the_text_and_decode_back() {
    let dir = folder();
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("the written file loads");
    let ids = tokenizer.encode(TEXT).expect("text encodes");
    assert!(ids.len() * 3 < TEXT.len() * 2, "{} ids for {} bytes", ids.len(), TEXT.len());
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Keep).expect("ids decode"), TEXT);
    assert_eq!(tokenizer.version(), TokenizerVersion::V15);
    assert_eq!(tokenizer.image_config(), Some(image_config()));
}

#[test]
fn training_twice_gives_the_same_file() {
    let builder = TekkenBuilder::new(400).image(image_config());
    assert_eq!(
        builder.train([TEXT]).expect("learnable").to_json(),
        builder.train([TEXT]).expect("learnable").to_json()
    );
}

#[test]
fn a_conversation_with_an_image_renders_with_its_mask() {
    let dir = folder();
    let processor = Processor::from_dir(dir.path()).expect("the folder has all it needs");
    let request = ChatRequest::from_json(
        r#"[{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "image"}]},
            {"role": "assistant", "content": "dog"}]"#,
    )
    .expect("a valid request");
    let picture = SourceImage::from_rgb8(vec![90; 10 * 20 * 3], 10, 20);
    let options = RenderOptions { mode: ValidationMode::Finetuning, ..RenderOptions::default() };
    let rendered = processor.render(&request, &[picture], &options).expect("a valid conversation");
    let settings = r#"[MODEL_SETTINGS]{"reasoning_effort": "none"}[/MODEL_SETTINGS]"#;
    let image = "[IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]";
    assert_eq!(rendered.text, format!("<s>{settings}[INST]{image}the[/INST]dog</s>"));
    let learned: Vec<u32> =
        rendered.ids.iter().zip(&rendered.mask).filter(|(_, learned)| **learned).map(|(id, _)| *id).collect();
    let text = processor.tokenizer().decode(&learned, SpecialTokens::Keep).expect("ids decode");
    assert_eq!(text, "dog</s>");
    assert_eq!((rendered.images[0].height, rendered.images[0].width), (16, 24));
}

#[test]
fn a_folder_without_a_tokenizer_says_what_is_missing() {
    let error = Tokenizer::from_dir(Path::new("does-not-exist")).expect_err("there is no such folder");
    assert!(error.to_string().contains("tekken.json"), "{error}");
}
