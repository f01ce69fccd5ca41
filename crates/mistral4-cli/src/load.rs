//! From `--model` to a model on a device.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use mistral4::Mistral4;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{AdaptedSource, CheckpointSource, ParameterSource, QuantizedSource, SourceAdapter};
use mistral4_checkpoint::adapter::Adapter;
use mistral4_checkpoint::config::ConfigOptions;
use mistral4_checkpoint::hub::{self, HubOptions};
use mistral4_checkpoint::weights::{
    Checkpoint, DType, HostTensor, QuantizedMatrix, StoredDType, WeightQuantization,
};

use crate::error::Result;
use crate::format;
use crate::progress::Progress;

/// How linears and experts are held in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights {
    /// Dense, whatever they are stored as.
    Dense,
    /// Packed integers as they are stored, everything else dense.
    AsStored,
    /// Quantised.
    Quantized(WeightQuantization),
}

impl From<Option<WeightQuantization>> for Weights {
    fn from(quantization: Option<WeightQuantization>) -> Self {
        quantization.map_or(Weights::AsStored, Weights::Quantized)
    }
}

/// A model with the checkpoint that it came from.
#[derive(Debug)]
pub struct Loaded {
    /// The model, on its device.
    pub model: Mistral4,
    /// The opened checkpoint.
    pub checkpoint: Checkpoint,
    /// Format of the weights in memory.
    pub dtype: DType,
}

/// The folder of a model, downloaded first if it is an id of the hub.
///
/// # Errors
/// When there is neither such a folder nor such a model.
pub(crate) fn model_folder(model: &str) -> Result<PathBuf> {
    let mut last = String::new();
    let folder = hub::resolve(model, &HubOptions::from_env(), &mut |event| match event {
        hub::Progress::File { name, place: (place, files), bytes: (_, total) } => {
            if last != name {
                eprintln!("downloading {name} ({} of {files}, {})", place + 1, format::bytes(total));
                last = name.to_owned();
            }
        }
        hub::Progress::Cached { problem } => {
            eprintln!("warning: the hub cannot be reached ({problem}); using the copy in the cache");
        }
    })?;
    Ok(folder)
}

/// Opens a checkpoint and checks that it holds exactly the tensors of its model.
///
/// # Errors
/// An unusable configuration, or everything that is missing, unknown or mis-shaped, in one error.
pub(crate) fn open_checkpoint(folder: &Path, options: &ConfigOptions) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(folder, options)?;
    for warning in &checkpoint.config_file().warnings {
        eprintln!("warning: {warning}");
    }
    checkpoint.check(&checkpoint.tensors())?;
    Ok(checkpoint)
}

/// Loads a model; without a `dtype`, in the format in which it is stored (FP8 becomes bf16).
///
/// # Errors
/// When there is no such folder or model, its configuration is unusable, its tensors are not those of the model (all of them
/// in one error), or a tensor cannot be read.
pub fn load_model(
    model: &str,
    dtype: Option<DType>,
    options: &ConfigOptions,
    device: &Device,
) -> Result<Loaded> {
    let base = Base { folder: &model_folder(model)?, adapter: None };
    load_folder(base, dtype, Weights::AsStored, options, device)
}

/// Where a model lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Base<'a> {
    /// Its checkpoint.
    pub(crate) folder: &'a Path,
    /// The folder of an adapter to use with it.
    pub(crate) adapter: Option<&'a Path>,
}

/// As [`load_model`], for a folder, with the adapter of another one.
///
/// # Errors
/// As [`open_checkpoint`] and [`Adapter::open`], or when a tensor cannot be read.
pub(crate) fn load_folder(
    base: Base<'_>,
    dtype: Option<DType>,
    weights: Weights,
    options: &ConfigOptions,
    device: &Device,
) -> Result<Loaded> {
    let checkpoint = open_checkpoint(base.folder, options)?;
    let adapter = base.adapter.map(|folder| Adapter::open(folder, checkpoint.config())).transpose()?;
    let dtype = dtype.unwrap_or_else(|| stored_dtype(&checkpoint));
    let model = build(&checkpoint, adapter.as_ref(), dtype, weights, device)?;
    Ok(Loaded { model, checkpoint, dtype })
}

/// Builds the model of a checkpoint that has been checked; with an adapter, that alone may be trained.
///
/// # Errors
/// When a tensor cannot be read.
pub(crate) fn build(
    checkpoint: &Checkpoint,
    adapter: Option<&Adapter>,
    dtype: DType,
    weights: Weights,
    device: &Device,
) -> Result<Mistral4> {
    let dense = CheckpointSource { checkpoint, dtype };
    let quantized = match weights {
        Weights::Dense => None,
        Weights::AsStored => Some(QuantizedSource::of_checkpoint(&dense, checkpoint, None)),
        Weights::Quantized(how) => Some(QuantizedSource::of_checkpoint(&dense, checkpoint, Some(how))),
    };
    let source = Counting {
        source: quantized.as_ref().map_or(&dense as &dyn ParameterSource, |source| source),
        progress: Progress::new("loading weights", checkpoint.tensors().len() as u64),
    };
    let model = |source: &dyn ParameterSource| {
        Mistral4::new(checkpoint.config(), MoeOptions::default(), source, device)
    };
    Ok(match adapter {
        None => model(&source)?,
        Some(adapter) => model(&AdaptedSource::new(&source, adapter))?.freeze_base(),
    })
}

/// The format in which to hold weights that are stored so: f32 if the embeddings are, else bf16.
pub(crate) fn stored_dtype(checkpoint: &Checkpoint) -> DType {
    let embeddings = checkpoint.tensors().into_iter().find(|spec| spec.key.ends_with("embed_tokens.weight"));
    match embeddings.and_then(|spec| checkpoint.stored_dtype(&spec.key)) {
        Some(StoredDType::F32 | StoredDType::F64) => DType::F32,
        _ => DType::BF16,
    }
}

struct Counting<'a> {
    source: &'a dyn ParameterSource,
    progress: Progress,
}

impl ParameterSource for Counting<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> mistral4::Result<HostTensor> {
        let tensor = self.source.tensor(key, shape, f32)?;
        self.progress.advance(1);
        Ok(tensor)
    }

    fn quantized(&self, key: &str, shape: &[usize]) -> mistral4::Result<Option<QuantizedMatrix>> {
        let weight = self.source.quantized(key, shape)?;
        self.progress.advance(u64::from(weight.is_some()));
        Ok(weight)
    }

    fn dtype(&self) -> DType {
        self.source.dtype()
    }

    fn adapter(&self, module: &str, shape: &[usize]) -> mistral4::Result<Option<SourceAdapter>> {
        self.source.adapter(module, shape)
    }
}
