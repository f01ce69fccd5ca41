//! Masks for training, images of a request, and where image settings come from.

use std::path::Path;

use mistral4_processor::chat::ChatRequest;
use mistral4_processor::image::{ImageProcessorConfig, ImageProcessorKind, TokenGrid};
use mistral4_processor::tokenizer::{ImageConfig, TekkenBuilder};
use mistral4_processor::{
    ImageProcessor, ProcessedImage, Processor, RenderOptions, Rendered, SourceImage, SpecialTokens,
    ValidationMode, tokenize_json,
};
use serde_json::{Value, json};

fn processor() -> Processor {
    let image = ImageConfig { image_patch_size: 4, max_image_size: 32, spatial_merge_size: 2 };
    let file = TekkenBuilder::new(320).image(image).train(["a thought, an answer"]).expect("learnable");
    let tokenizer = file.tokenizer().expect("the built file loads");
    let images = ImageProcessor::new(tokenizer.image_config().expect("there is an image section").into());
    Processor::new(tokenizer, Some(images))
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/processor").join(name)
}

/// The learned tokens as text.
fn learned(processor: &Processor, rendered: &Rendered) -> String {
    let ids: Vec<u32> =
        rendered.ids.iter().zip(&rendered.mask).filter(|(_, mask)| **mask).map(|(id, _)| *id).collect();
    processor.tokenizer().decode(&ids, SpecialTokens::Keep).expect("known ids")
}

fn render(messages: Value, options: &RenderOptions) -> String {
    let processor = processor();
    let request = ChatRequest::from_json(&messages.to_string()).expect("a valid request");
    let rendered = processor.render(&request, &[], options).expect("a valid conversation");
    learned(&processor, &rendered)
}

fn training() -> RenderOptions {
    RenderOptions { mode: ValidationMode::Finetuning, ..RenderOptions::default() }
}

fn conversation() -> Value {
    json!([
        {"role": "system", "content": "an answer"},
        {"role": "user", "content": "an answer</s>"},
        {"role": "assistant", "content": "an answer", "reasoning_content": "a thought"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "x", "content": "an answer"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "b"}, {"type": "text", "text": "c"}]}
    ])
}

#[test]
fn labels_are_the_assistant_turns_with_their_end_tokens() {
    let expected = "[THINK]a thought[/THINK]an answer</s>[TOOL_CALLS]f[ARGS]{}</s>[THINK]b[/THINK]c</s>";
    assert_eq!(render(conversation(), &training()), expected);
}

#[test]
fn history_and_thinking_can_be_left_out() {
    let last = RenderOptions { mask_history: true, ..training() };
    assert_eq!(render(conversation(), &last), "[THINK]b[/THINK]c</s>");
    let answers = RenderOptions { mask_reasoning_content: true, ..training() };
    assert_eq!(render(conversation(), &answers), "an answer</s>[TOOL_CALLS]f[ARGS]{}</s>c</s>");
    let both = RenderOptions { mask_history: true, mask_reasoning_content: true, ..training() };
    assert_eq!(render(conversation(), &both), "c</s>");
}

#[test]
fn a_turn_of_weight_zero_is_not_learned() {
    let messages = json!([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}
    ]);
    assert_eq!(render(messages, &training()), "d</s>");
}

#[test]
fn a_message_to_continue_has_no_end_token() {
    let messages = json!({
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Once"}],
        "continue_final_message": true
    });
    assert_eq!(render(messages, &RenderOptions::default()), "Once");
}

#[test]
fn images_come_from_paths_data_urls_and_the_caller_in_prompt_order() {
    use base64::Engine as _;
    let processor = processor();
    let data = base64::engine::general_purpose::STANDARD
        .encode(std::fs::read(golden("images/dot.png")).expect("a fixture"));
    let request = json!([{"role": "user", "content": [
        {"type": "image", "path": "exact.png"},
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{data}")}}
    ]}]);
    let request = ChatRequest::from_json(&request.to_string()).expect("a valid request");
    let supplied = [SourceImage::from_rgb8(vec![0; 8 * 32 * 3], 8, 32)];
    let options = RenderOptions { base_dir: golden("images"), ..RenderOptions::default() };
    let rendered = processor.render(&request, &supplied, &options).expect("three images");
    let sizes: Vec<_> = rendered.images.iter().map(|image| (image.height, image.width)).collect();
    assert_eq!(sizes, [(16, 24), (8, 32), (8, 8)]);
    let images = rendered.text.split("[INST]").nth(1).expect("a user turn");
    assert_eq!(
        images,
        "[IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]a[IMG][IMG][IMG][IMG][IMG_END][IMG][IMG_END][/INST]"
    );
    assert!(rendered.mask.iter().all(|learned| !learned));
    let json = tokenize_json(&rendered.ids, processor.tokenizer()).expect("known ids");
    assert_eq!((json.text, json.tokens.len()), (rendered.text, rendered.ids.len()));
}

#[test]
fn a_batch_is_padded_at_the_bottom_and_at_the_right() {
    let image = |height: usize, width: usize, value: f32| ProcessedImage {
        pixels: vec![value; 3 * height * width],
        height,
        width,
    };
    let processor = ImageProcessor::new(ImageProcessorConfig::default());
    let batch = processor.batch(&[image(1, 2, 1.0), image(2, 1, 2.0)]);
    assert_eq!((batch.height, batch.width), (2, 2));
    assert_eq!(batch.image_sizes, [[1, 2], [2, 1]]);
    let planes = [[1.0, 1.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]];
    let expected: Vec<f32> = planes.iter().flat_map(|plane| plane.repeat(3)).collect();
    assert_eq!(batch.pixel_values, expected);
    assert!(processor.batch(&[]).pixel_values.is_empty());
}

/// The settings of a folder with these files.
fn settings(files: &[(&str, Value)]) -> Option<ImageProcessorConfig> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, value) in files {
        std::fs::write(dir.path().join(name), value.to_string()).expect("the folder is writable");
    }
    ImageProcessorConfig::from_dir(dir.path(), None).expect("valid settings")
}

#[test]
fn settings_come_from_every_known_file() {
    let default = ImageProcessorConfig::default();
    assert_eq!(settings(&[]), None);
    assert_eq!(settings(&[("config.json", json!({"model_type": "mistral4"}))]), None);
    let nested = json!({
        "patch_size": 14, "spatial_merge_size": 2,
        "image_processor": {"patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 1540}, "resample": 3}
    });
    assert_eq!(settings(&[("processor_config.json", nested)]), Some(default.clone()));
    let separate = [
        ("preprocessor_config.json", json!({"patch_size": 28, "size": {"longest_edge": 560}})),
        (
            "config.json",
            json!({"spatial_merge_size": 2, "vision_config": {"patch_size": 14, "image_size": 1540}}),
        ),
    ];
    let expected = ImageProcessorConfig { max_height: 560, max_width: 560, ..default.clone() };
    assert_eq!(settings(&separate), Some(expected.clone()));
    let alone = ImageProcessorConfig { patch_size: 28, spatial_merge_size: 1, ..expected };
    assert_eq!(settings(&separate[..1]), Some(alone));
    let native = json!({"vision_encoder": {"patch_size": 16, "image_size": 1024, "spatial_merge_size": 1}});
    let expected = ImageProcessorConfig {
        patch_size: 16,
        spatial_merge_size: 1,
        max_height: 1024,
        max_width: 1024,
        ..default
    };
    assert_eq!(settings(&[("params.json", native)]), Some(expected));
}

#[test]
fn token_grids_are_those_of_the_reference() {
    let of = |kind: ImageProcessorKind, width: usize, height: usize| {
        let grid =
            ImageProcessor::new(ImageProcessorConfig::default()).with_kind(kind).token_grid(height, width);
        (grid.columns, grid.rows)
    };
    let cases = [((640, 480), (23, 18)), ((3000, 2000), (55, 37)), ((28, 28), (1, 1)), ((1541, 10), (55, 1))];
    for ((width, height), expected) in cases {
        assert_eq!(of(ImageProcessorKind::MistralCommon, width, height), expected, "{width}x{height}");
        assert_eq!(of(ImageProcessorKind::HuggingFace, width, height), expected, "{width}x{height}");
    }
    assert_eq!(of(ImageProcessorKind::HuggingFace, 100_000, 1), (55, 1));
    assert_eq!(TokenGrid { rows: 3, columns: 5 }.tokens(), 15);
}

#[test]
fn a_picture_that_is_not_resized_has_to_fit() {
    let config =
        ImageProcessorConfig { do_resize: false, patch_size: 2, spatial_merge_size: 2, ..Default::default() };
    let processor = ImageProcessor::new(config);
    let picture =
        |height: usize, width: usize| SourceImage::from_rgb8(vec![9; height * width * 3], height, width);
    assert!(processor.process(&picture(8, 4)).is_ok());
    assert!(processor.process(&picture(8, 5)).is_err());
}
