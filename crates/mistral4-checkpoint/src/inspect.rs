//! What a checkpoint or a configuration is, from headers alone.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::config::{Config, ConfigFile, ConfigOptions};
use crate::error::{Error, Result};
use crate::weights::names::{self, TensorKind, TensorSpec};
use crate::weights::{Checkpoint, StoredDType};

/// A summary of a model; serialised, it has the keys of `inspect --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// `mistral3` for the multimodal wrapper, `mistral4` for a text model.
    pub model_type: &'static str,
    /// Values of all parameters, vision tower and projector included; the router's selection bias is not one, since no
    /// gradient reaches it.
    pub total_parameters: u64,
    /// Parameters that a token is multiplied with: all of them, but of each layer's routed experts only
    /// `num_experts_per_tok`, and not the embedding table, of which a token takes one row. The vision tower and projector
    /// count, as for a token of an image.
    pub active_parameters: u64,
    /// The softmax scale and why.
    pub softmax_scale: SoftmaxScaleReport,
    /// Stored tensors, scales included; for a configuration alone, the tensors its checkpoint would have in bf16.
    pub tensors: usize,
    /// Stored bytes by format; empty for a configuration alone.
    pub dtypes: BTreeMap<&'static str, u64>,
    /// Decoder layers.
    pub layers: usize,
    /// Routed experts of a layer.
    pub experts: usize,
    /// Ignored keys, tensors that do not fit the model, and other remarks.
    pub warnings: Vec<String>,
    /// The tensors, in the files' order or the model's.
    #[serde(skip)]
    pub table: Vec<TensorRow>,
    /// Memory needed.
    #[serde(skip)]
    pub memory: MemoryEstimate,
}

/// The softmax scale in an [`Inspection`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SoftmaxScaleReport {
    /// Factor on `q . k`.
    pub value: f64,
    /// `standard` or `yarn-mscale`.
    pub policy: &'static str,
    /// Why that one.
    pub reason: String,
}

/// A row of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorRow {
    /// Stored key.
    pub key: String,
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// Stored format; `None` for a configuration alone.
    pub dtype: Option<StoredDType>,
    /// Name of the file that holds it.
    pub file: Option<String>,
}

/// Bytes of memory for weights, gradients and optimiser state; activations come on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Weights as they are stored; in bf16 for a configuration alone.
    pub inference_as_stored: u64,
    /// Weights in bf16.
    pub inference_bf16: u64,
    /// Latent cache of one token in bf16: `kv_lora_rank + qk_rope_head_dim` values a layer.
    pub cache_per_token: u64,
    /// Weights in bf16, and adapters of rank 16 on every linear of the decoder (not the experts) with f32 weight, gradient and
    /// two moments.
    pub lora: u64,
    /// Weights in bf16; f32 master weights, gradients and two moments: 18 bytes a parameter.
    pub full_training: u64,
}

/// Rank of the adapters in [`MemoryEstimate::lora`].
const LORA_RANK: usize = 16;

/// Inspects a checkpoint folder, a `config.json` or a `params.json`; no weights are read.
///
/// # Errors
/// When the configuration is not usable or a header is malformed. Tensors that do not fit are warnings.
pub fn inspect(path: &Path, options: &ConfigOptions) -> Result<Inspection> {
    if !path.is_dir() {
        return Ok(of_config(&ConfigFile::read(path, options)?));
    }
    let has_weights = std::fs::read_dir(path)
        .map_err(Error::io(path, "list"))?
        .flatten()
        .any(|item| item.file_name().to_string_lossy().contains(".safetensors"));
    if !has_weights {
        let mut inspection = of_config(&ConfigFile::read(path, options)?);
        inspection.warnings.push(format!("{}: the folder has no weights", path.display()));
        return Ok(inspection);
    }
    Ok(of_checkpoint(&Checkpoint::open(path, options)?))
}

/// Inspects a configuration.
pub fn of_config(file: &ConfigFile) -> Inspection {
    let specs = names::tensors(&file.config);
    let rows = specs.iter().filter(|spec| !spec.is_optional()).map(|spec| TensorRow {
        key: spec.key.clone(),
        shape: spec.shape.clone(),
        dtype: None,
        file: None,
    });
    let table: Vec<TensorRow> = rows.collect();
    summary(file, &specs, table, BTreeMap::new())
}

/// Inspects an open checkpoint.
pub fn of_checkpoint(checkpoint: &Checkpoint) -> Inspection {
    let mut dtypes = BTreeMap::new();
    let mut table = Vec::new();
    for (path, key, dtype, shape, bytes) in checkpoint.stored() {
        *dtypes.entry(dtype.name()).or_insert(0) += bytes as u64;
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned());
        table.push(TensorRow { key: key.to_owned(), shape: shape.to_vec(), dtype: Some(dtype), file });
    }
    let specs = checkpoint.tensors();
    let mut inspection = summary(checkpoint.config_file(), &specs, table, dtypes);
    if let Err(mismatch) = checkpoint.check(&specs) {
        inspection.warnings.push(mismatch.to_string());
    }
    inspection
}

fn summary(
    file: &ConfigFile,
    specs: &[TensorSpec],
    table: Vec<TensorRow>,
    dtypes: BTreeMap<&'static str, u64>,
) -> Inspection {
    let config = &file.config;
    let total_parameters = sum(specs, |spec| if spec.is_optional() { 0 } else { spec.elements() });
    let stored: u64 = dtypes.values().sum();
    let scale = &config.softmax_scale;
    Inspection {
        model_type: if config.vision.is_some() { "mistral3" } else { "mistral4" },
        total_parameters,
        active_parameters: sum(specs, |spec| active(spec, config)),
        softmax_scale: SoftmaxScaleReport {
            value: scale.value,
            policy: scale.policy.name(),
            reason: scale.reason.clone(),
        },
        tensors: table.len(),
        layers: config.text.num_hidden_layers,
        experts: config.text.n_routed_experts,
        warnings: file.warnings.clone(),
        memory: memory(config, specs, total_parameters, stored),
        dtypes,
        table,
    }
}

fn sum(specs: &[TensorSpec], count: impl Fn(&TensorSpec) -> usize) -> u64 {
    specs.iter().map(|spec| count(spec) as u64).sum()
}

fn active(spec: &TensorSpec, config: &Config) -> usize {
    match spec.kind {
        TensorKind::GateBias | TensorKind::Embedding => 0,
        TensorKind::ExpertsGateUp | TensorKind::ExpertsDown => {
            spec.elements() / config.text.n_routed_experts * config.text.num_experts_per_tok
        }
        _ => spec.elements(),
    }
}

fn memory(config: &Config, specs: &[TensorSpec], parameters: u64, stored: u64) -> MemoryEstimate {
    let bf16 = 2 * parameters;
    let cached = config.text.kv_lora_rank + config.text.qk_rope_head_dim;
    let adapters = sum(specs, |spec| match spec.kind {
        TensorKind::Linear => LORA_RANK * spec.shape.iter().sum::<usize>(),
        _ => 0,
    });
    MemoryEstimate {
        inference_as_stored: if stored == 0 { bf16 } else { stored },
        inference_bf16: bf16,
        cache_per_token: (2 * cached * config.text.num_hidden_layers) as u64,
        lora: bf16 + 16 * adapters,
        full_training: 18 * parameters,
    }
}
