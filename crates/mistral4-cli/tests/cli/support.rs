//! A folder with a small model, and the program run in it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mistral4_processor::tokenizer::{ImageConfig, TekkenBuilder};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

/// How a run ended.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A temporary folder in which the program runs.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Place(TempDir::new().unwrap())
    }

    /// A place with `model`: the preset `tiny` with random weights and a tokenizer learned from a sentence.
    pub(crate) fn with_model() -> Self {
        let place = Self::new();
        let outcome = place.run(&["init", "--preset", "tiny", "--out", "model", "--dtype", "f32"]);
        assert_eq!(outcome.code, 0, "{}", outcome.stderr);
        let image = ImageConfig { image_patch_size: 14, max_image_size: 112, spatial_merge_size: 2 };
        TekkenBuilder::new(400)
            .image(image)
            .train(["the quick brown fox jumps over the lazy dog, and the dog does not mind"])
            .unwrap()
            .write(&place.path("model/tekken.json"))
            .unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// A grey picture of a given size, in the plainest of formats.
    pub(crate) fn write_bmp(&self, name: &str, width: u32, height: u32) {
        let row = (width * 3).next_multiple_of(4);
        let mut file = b"BM".to_vec();
        let size = 54 + row * height;
        for value in [size, 0, 54, 40, width, height, 1 | 24 << 16, 0, row * height, 2835, 2835, 0, 0] {
            file.extend(value.to_le_bytes());
        }
        file.resize(size as usize, 128);
        self.write(name, file);
    }

    /// A file of i64 tensors.
    pub(crate) fn write_i64(&self, name: &str, tensors: &[(&str, &[usize], &[i64])]) {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(.., values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((key, shape, _), bytes)| {
            (*key, TensorView::new(Dtype::I64, shape.to_vec(), bytes).unwrap())
        });
        self.write(name, safetensors::serialize(views, None).unwrap());
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome {
        self.run_with_input(arguments, "")
    }

    pub(crate) fn run_with_input(&self, arguments: &[&str], input: &str) -> Outcome {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mistral4"))
            .args(arguments)
            .current_dir(self.0.path())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path("hub"))
            .env("RAYON_NUM_THREADS", "2")
            .env_remove("MISTRAL4_ISA")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| {
            let place = self.0.path().to_string_lossy();
            String::from_utf8_lossy(bytes).replace(place.as_ref(), "[DIR]")
        };
        Outcome {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

/// Values of an i64 tensor of a file.
pub(crate) fn read_i64(path: &Path, key: &str) -> (Vec<usize>, Vec<i64>) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(key).unwrap();
    assert_eq!(view.dtype(), Dtype::I64);
    let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}

/// Shape and values of an f32 tensor of a file.
pub(crate) fn read_f32(path: &Path, key: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(key).unwrap();
    assert_eq!(view.dtype(), Dtype::F32);
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}
