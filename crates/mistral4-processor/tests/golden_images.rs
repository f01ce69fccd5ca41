//! Pixel values equal to transformers' and `mistral_common`'s, on the fixtures of `tools/golden/processor_images.py`.
//!
//! With `MISTRAL4_IMAGE_GOLDENS=DIR` the same check runs over a folder that the script wrote with `--out DIR --seed N`.

use std::path::{Path, PathBuf};

use mistral4_processor::image::{ImageProcessorConfig, ImageProcessorKind, Resample};
use mistral4_processor::{ImageProcessor, SourceImage};
use safetensors::SafeTensors;
use serde::Deserialize;

fn golden_dir() -> PathBuf {
    match std::env::var_os("MISTRAL4_IMAGE_GOLDENS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/processor"),
    }
}

#[derive(Deserialize)]
struct Goldens {
    format_version: u32,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    file: String,
    kind: String,
    longest: usize,
    patch: usize,
    merge: usize,
    #[serde(default)]
    resample: Option<u32>,
}

impl Case {
    fn processor(&self) -> ImageProcessor {
        ImageProcessor::new(ImageProcessorConfig {
            kind: match self.kind.as_str() {
                "hf" => ImageProcessorKind::HuggingFace,
                "mistral_common" => ImageProcessorKind::MistralCommon,
                other => panic!("unknown kind {other}"),
            },
            patch_size: self.patch,
            spatial_merge_size: self.merge,
            max_height: self.longest,
            max_width: self.longest,
            resample: match self.resample {
                None | Some(3) => Resample::Bicubic,
                Some(2) => Resample::Bilinear,
                Some(1) => Resample::Lanczos,
                Some(other) => panic!("unknown filter {other}"),
            },
            ..ImageProcessorConfig::default()
        })
    }

    /// The most that a value may differ, in steps of one in 255.
    ///
    /// Lossless pictures have to give Pillow's bytes. OpenCV sums in another order. Our JPEG decoder rounds its transform
    /// and its chroma otherwise than the one in Pillow.
    fn tolerance(&self) -> f32 {
        match (self.file.ends_with(".jpg"), self.kind.as_str()) {
            (true, "hf") => 2.01,
            (true, _) => 3.0,
            (false, "hf") => 0.0,
            (false, _) => 1e-3,
        }
    }
}

#[test]
fn pixels_are_those_of_transformers_and_mistral_common() {
    let text = std::fs::read_to_string(golden_dir().join("images.json")).expect("the fixture is there");
    let goldens: Goldens = serde_json::from_str(&text).expect("the fixture parses");
    assert_eq!(goldens.format_version, 1);
    let bytes = std::fs::read(golden_dir().join("images.safetensors")).expect("the fixture is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("the fixture parses");
    let mut failures = Vec::new();
    for case in &goldens.cases {
        let processor = case.processor();
        let picture =
            SourceImage::from_path(&golden_dir().join("images").join(&case.file)).expect("a picture");
        let image = processor.process(&picture).expect("a picture of any size");
        let tensor = tensors.tensor(&case.name).expect("a tensor for each case");
        let grid = processor.token_grid(picture.height(), picture.width());
        let size = processor.token_size();
        assert_eq!([image.height, image.width], [grid.rows * size, grid.columns * size], "{}", case.name);
        assert_eq!(tensor.shape(), [3, image.height, image.width], "{}", case.name);
        let expected = tensor
            .data()
            .chunks_exact(4)
            .map(|value| f32::from_le_bytes(value.try_into().expect("four bytes")));
        let plane = image.height * image.width;
        let std = processor.config().image_std;
        let steps = image.pixels.iter().zip(expected).enumerate();
        let steps = steps.map(|(at, (ours, theirs))| (ours - theirs).abs() * std[at / plane] as f32 * 255.0);
        let (mut largest, mut count) = (0.0_f32, 0);
        for step in steps {
            largest = largest.max(step);
            count += usize::from(step > case.tolerance());
        }
        if count > 0 {
            failures.push(format!(
                "{}: {count} of {} values differ, at most by {largest}",
                case.name,
                3 * plane
            ));
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), goldens.cases.len(), failures.join("\n"));
}
