//! From a recipe to the model, tokenizer and data it names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use mistral4::model::Mistral4;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{CheckpointSource, InitialSource};
use mistral4_checkpoint::config::{ConfigFile, ConfigOptions, SoftmaxScalePolicy, preset_names};
use mistral4_checkpoint::hub::{self, HubOptions};
use mistral4_checkpoint::weights::{Checkpoint, DType};
use mistral4_processor::Processor;
use mistral4_processor::tokenizer::ImageConfig;

use crate::data::{DataContext, learn_tokenizer};
use crate::error::{Error, Result};
use crate::recipe::{
    FreezeConfig, ModelConfig, ModelSource, Recipe, SoftmaxScaleOverride, TokenizerSource,
    TorchDtype,
};

/// Everything of a run that comes from its recipe, before the first step.
pub struct Setup {
    /// The model, frozen parts marked.
    pub model: Mistral4,
    /// Its configuration.
    pub config: ConfigFile,
    /// Storage type of its weights.
    pub dtype: DType,
    /// Tokenizer and image processor, where the data needs them or they are at hand.
    pub processor: Option<Arc<Processor>>,
    /// Folder whose tokenizer and processor files go along with every checkpoint.
    pub carry_from: Option<PathBuf>,
}

impl Setup {
    /// Reads or draws the weights, and reads or learns the tokenizer (which is then written to the run's folder).
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, the configuration or the tokenizer, by file and key.
    pub fn new(recipe: &Recipe, device: &Device) -> Result<Self> {
        let options = ConfigOptions { softmax_scale: recipe.model.softmax_scale.map(policy) };
        let moe = MoeOptions {
            gate_bias_update_factor: recipe.model.gate_bias_update_factor,
            aux_loss_coeff: recipe.model.aux_loss_coeff,
            train_gate: true,
            fake_balanced_gate: recipe.model.fake_balanced_gate,
        };
        let (model, config, dtype, folder) = match &recipe.model.source {
            ModelSource::Pretrained(name) => pretrained(name, &recipe.model, &options, moe, device)?,
            ModelSource::FromConfig(name) => {
                let (config, folder) = read_config(name, &options)?;
                let dtype = storage_dtype(recipe.model.torch_dtype, &config);
                let config = if recipe.model.multimodal { config } else { config.text_only() };
                let source = InitialSource::new(&config.config, recipe.rng.seed, dtype);
                (Mistral4::new(&config.config, moe, &source, device)?, config, dtype, folder)
            }
        };
        let model = model.freeze(frozen(recipe.freeze_config));
        let (processor, carry_from) = processor(recipe, &config, folder)?;
        if let Some(processor) = &processor {
            let (tokens, rows) = (processor.tokenizer().vocab_size(), config.config.text.vocab_size);
            if tokens > rows {
                return Err(Error::Inconsistent {
                    key: "dataset.tokenizer".to_owned(),
                    value: format!("{tokens} tokens"),
                    message: format!("the model's vocab_size is {rows}; take a smaller vocabulary or a larger model"),
                });
            }
        }
        Ok(Self { model, config, dtype, processor, carry_from })
    }

    /// What data sets need to know.
    pub fn data_context(&self, seed: u64) -> DataContext {
        let vocab_size = self.config.config.text.vocab_size;
        DataContext { processor: self.processor.clone(), vocab_size, seed }
    }

    /// Token that fills padded places.
    pub fn pad_id(&self) -> u32 {
        let from_tokenizer = || self.processor.as_ref().and_then(|p| p.tokenizer().pad());
        self.config.config.text.pad_token_id.or_else(from_tokenizer).unwrap_or(0)
    }
}

fn policy(scale: SoftmaxScaleOverride) -> SoftmaxScalePolicy {
    match scale {
        SoftmaxScaleOverride::Standard => SoftmaxScalePolicy::Standard,
        SoftmaxScaleOverride::YarnMscale => SoftmaxScalePolicy::YarnMscale,
    }
}

/// Model, configuration, storage type and folder of a checkpoint.
type Opened = (Mistral4, ConfigFile, DType, Option<PathBuf>);

fn pretrained(
    name: &str,
    config: &ModelConfig,
    options: &ConfigOptions,
    moe: MoeOptions,
    device: &Device,
) -> Result<Opened> {
    let folder = hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?;
    let checkpoint = Checkpoint::open(&folder, options)?;
    let checkpoint = if config.multimodal {
        checkpoint.require_vision()?;
        checkpoint
    } else {
        checkpoint.text_only()
    };
    checkpoint.check(&checkpoint.tensors())?;
    let dtype = storage_dtype(config.torch_dtype, checkpoint.config_file());
    let source = CheckpointSource { checkpoint: &checkpoint, dtype };
    let model = Mistral4::new(checkpoint.config(), moe, &source, device)?;
    Ok((model, checkpoint.config_file().clone(), dtype, Some(folder)))
}

/// A configuration by file, folder, preset or hub id, with the folder it lies in.
fn read_config(name: &str, options: &ConfigOptions) -> Result<(ConfigFile, Option<PathBuf>)> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok((ConfigFile::read(path, options)?, path.parent().map(Path::to_path_buf)));
    }
    if !path.exists() && preset_names().any(|preset| preset == name) {
        return Ok((ConfigFile::preset(name, options)?, None));
    }
    let folder = hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?;
    Ok((ConfigFile::read(&folder, options)?, Some(folder)))
}

/// Storage type: the recipe's, else the configuration's `dtype`, else bf16.
fn storage_dtype(asked: TorchDtype, config: &ConfigFile) -> DType {
    let said = || {
        let text = config.raw.get("text_config").unwrap_or(&config.raw);
        let places = [&config.raw, text];
        let value = places.iter().find_map(|v| v.get("dtype").or_else(|| v.get("torch_dtype"))?.as_str())?;
        (value == "float32").then_some(DType::F32)
    };
    match asked {
        TorchDtype::Float32 => DType::F32,
        TorchDtype::Bfloat16 => DType::BF16,
        TorchDtype::Auto => said().unwrap_or(DType::BF16),
    }
}

/// Which keys a `freeze_config` keeps from being trained.
fn frozen(config: FreezeConfig) -> impl Fn(&str) -> bool {
    move |key| {
        let vision = key.starts_with("vision_tower.");
        let projector = key.starts_with("multi_modal_projector.");
        let embeddings = key.ends_with("embed_tokens.weight");
        (vision && config.freeze_vision_tower)
            || (projector && config.freeze_multi_modal_projector)
            || (embeddings && config.freeze_embeddings)
            || (!vision && !projector && config.freeze_language_model)
    }
}

/// The tokenizer that the training data asks for, and the folder with its files.
fn processor(
    recipe: &Recipe,
    config: &ConfigFile,
    folder: Option<PathBuf>,
) -> Result<(Option<Arc<Processor>>, Option<PathBuf>)> {
    let folder = match &recipe.dataset.tokenizer {
        TokenizerSource::Model => folder,
        TokenizerSource::Path(name) => Some(hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?),
        TokenizerSource::Learned { vocab_size } => {
            let image = config.config.vision.as_ref().map(|vision| ImageConfig {
                image_patch_size: vision.vision_config.patch_size,
                max_image_size: vision.vision_config.image_size,
                spatial_merge_size: vision.spatial_merge_size,
            });
            let folder = recipe.checkpoint.checkpoint_dir.join("tokenizer");
            let failed = |source| Error::Write { path: folder.clone(), source };
            std::fs::create_dir_all(&folder).map_err(failed)?;
            learn_tokenizer(&recipe.dataset, *vocab_size, image)?.write(&folder.join("tekken.json"))?;
            Some(folder)
        }
    };
    let has_tokenizer =
        |folder: &PathBuf| ["tekken.json", "tokenizer.json"].iter().any(|name| folder.join(name).is_file());
    let processor = match folder.as_ref().filter(|folder| has_tokenizer(folder)) {
        Some(folder) => Some(Arc::new(Processor::from_dir(folder)?)),
        // Data that needs a tokenizer says so when it is opened.
        None => None,
    };
    Ok((processor, folder))
}
