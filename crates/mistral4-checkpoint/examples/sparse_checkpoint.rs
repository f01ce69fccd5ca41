//! Writes a checkpoint folder of Mistral Small 4's size whose weights are holes: correct headers, no data on the disk.
//!
//! ```text
//! cargo run -p mistral4-checkpoint --example sparse_checkpoint -- DIR [PRESET]
//! ```
//!
//! The layout is that of the released FP8 checkpoint: scales of 0 dimensions for linears and `[E, 1, 1]` for experts, activation
//! scales beside them, and bf16 for the rest. Weights read as zeros; scales are 1.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use mistral4_checkpoint::config::{ActivationScheme, ConfigFile, ConfigOptions, Fp8Quantization};
use mistral4_checkpoint::weights::names::{self, TensorSpec};
use serde_json::{Map, Value, json};

/// Size of a shard in bytes.
const SHARD: u64 = 5_000_000_000;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A stored tensor: key, format, shape, bytes of a value.
struct Stored {
    key: String,
    dtype: &'static str,
    shape: Vec<usize>,
    size: u64,
}

impl Stored {
    fn new(key: String, dtype: &'static str, shape: &[usize], size: u64) -> Self {
        Stored { key, dtype, shape: shape.to_vec(), size }
    }

    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.size
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: sparse_checkpoint DIR [PRESET]")?;
    let preset = arguments.next().unwrap_or_else(|| "mistral-small-4-119b".into());
    write(Path::new(&folder), &preset)
}

/// Writes the folder.
pub(crate) fn write(folder: &Path, preset: &str) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let config = ConfigFile::preset(preset, &ConfigOptions::default())?;

    let mut shards: Vec<Vec<Stored>> = vec![Vec::new()];
    let mut filled = 0;
    for spec in names::tensors(&config.config).iter().filter(|spec| !spec.is_optional()) {
        let tensors = stored(spec);
        let bytes: u64 = tensors.iter().map(Stored::bytes).sum();
        if filled > 0 && filled + bytes > SHARD {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.extend(tensors);
        }
    }

    let mut weight_map = Map::new();
    let mut total = 0;
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        total += write_shard(&folder.join(&name), shard)?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.key.clone(), json!(name))));
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    std::fs::write(folder.join("model.safetensors.index.json"), format!("{index:#}\n"))?;

    let quantization = Fp8Quantization {
        activation_scheme: ActivationScheme::Static,
        ..Fp8Quantization::per_tensor(config.config.vision.is_some())
    };
    let mut config = config.to_hf_json();
    config["quantization_config"] = quantization.to_json();
    std::fs::write(folder.join("config.json"), format!("{config:#}\n"))?;
    println!("{}: {} files, {total} bytes of holes", folder.display(), shards.len());
    Ok(())
}

/// The stored tensors of a parameter.
fn stored(spec: &TensorSpec) -> Vec<Stored> {
    if !spec.is_quantisable() {
        return vec![Stored::new(spec.key.clone(), "BF16", &spec.shape, 2)];
    }
    let experts = spec.shape[0];
    let (scale, activation, activation_key): (&[usize], &[usize], String) =
        match spec.key.strip_suffix(".weight") {
            Some(module) => (&[], &[], format!("{module}.activation_scale")),
            None => (&[experts, 1, 1], &[experts], format!("{}_activation_scale", spec.key)),
        };
    vec![
        Stored::new(spec.key.clone(), "F8_E4M3", &spec.shape, 1),
        Stored::new(format!("{}_scale_inv", spec.key), "F32", scale, 4),
        Stored::new(activation_key, "F32", activation, 4),
    ]
}

/// Writes the header and the scales; everything between stays a hole.
fn write_shard(path: &Path, tensors: &[Stored]) -> Result<u64> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    // Wide numbers first, which keeps every tensor aligned.
    let mut order: Vec<&Stored> = tensors.iter().collect();
    order.sort_by_key(|tensor| std::cmp::Reverse(tensor.size));
    let mut end = 0;
    let mut ones = Vec::new();
    for tensor in order {
        let start = end;
        end += tensor.bytes();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.key.clone(), entry);
        if tensor.dtype == "F32" {
            ones.extend(1.0f32.to_le_bytes().repeat(tensor.bytes() as usize / 4));
        }
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = File::create(path)?;
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(&text)?;
    // The scales are the only 4-byte numbers, so they are at the start.
    file.write_all(&ones)?;
    file.seek(SeekFrom::Start(0))?;
    file.set_len(8 + text.len() as u64 + end)?;
    Ok(end)
}
