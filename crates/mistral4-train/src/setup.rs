//! From a recipe to the model, tokenizer and data it names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use mistral4::model::Mistral4;
use mistral4::model::dropout::DropoutSeed;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{AdaptedSource, CheckpointSource, InitialSource, ParameterSource, QuantizedSource};
use mistral4_checkpoint::adapter::{Adapter, Target};
use mistral4_checkpoint::config::{Config, ConfigFile, ConfigOptions, SoftmaxScalePolicy, preset_names};
use mistral4_checkpoint::hub::{self, HubOptions};
use mistral4_checkpoint::weights::{Checkpoint, DType};
use mistral4_processor::Processor;
use mistral4_processor::image::ImageProcessor;
use mistral4_processor::tokenizer::ImageConfig;
use serde_json::Value;

use crate::checkpoint::Saved;
use crate::data::{DataContext, learn_tokenizer};
use crate::error::{Error, Result};
use crate::parallel::holdings::HeldSource;
use crate::parallel::{Communicator, Holdings, Mesh, ModelLayout};
use crate::recipe::{
    FreezeConfig, ModelConfig, ModelSource, PeftConfig, Recipe, SoftmaxScaleOverride, TokenizerSource,
    TorchDtype,
};

/// Everything of a run that comes from its recipe, before the first step.
pub struct Setup {
    /// The model, frozen parts marked.
    pub model: Mistral4,
    /// Whom this rank computes with.
    pub layout: ModelLayout,
    /// Which values of each parameter every rank keeps.
    pub holdings: Holdings,
    /// Its configuration.
    pub config: ConfigFile,
    /// Storage type of its weights.
    pub dtype: DType,
    /// Tokenizer and image processor, where the data needs them or they are at hand.
    pub processor: Option<Arc<Processor>>,
    /// Folder whose tokenizer and processor files go along with every checkpoint.
    pub carry_from: Option<PathBuf>,
    /// The adapters that are trained, as they began; `None` where the weights themselves are.
    pub adapter: Option<Adapter>,
    /// Switches their dropout.
    pub dropout: DropoutSeed,
}

impl Setup {
    /// Reads or draws the weights, and reads or learns the tokenizer (which is then written to the run's folder).
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, the configuration or the tokenizer, by file and key.
    pub fn new(recipe: &Recipe, device: &Device) -> Result<Self> {
        Self::start(recipe, device, None, &Mesh::single())
    }

    /// As [`Setup::new`], with weights and learned tokenizer of a checkpoint of the run, where there is one, on every
    /// rank of a mesh; the first one writes what is learned.
    ///
    /// # Errors
    /// As [`Setup::new`], and a checkpoint of another model.
    pub(crate) fn start(
        recipe: &Recipe,
        device: &Device,
        saved: Option<&Saved>,
        mesh: &Mesh,
    ) -> Result<Self> {
        let options = ConfigOptions { softmax_scale: recipe.model.softmax_scale.map(policy) };
        let moe = MoeOptions {
            gate_bias_update_factor: recipe.model.gate_bias_update_factor,
            aux_loss_coeff: recipe.model.aux_loss_coeff,
            router_z_loss_coeff: recipe.model.router_z_loss_coeff,
            train_gate: true,
            fake_balanced_gate: recipe.model.fake_balanced_gate,
        };
        let Base { config, dtype, folder, checkpoint } = Base::open(&recipe.model, &options)?;
        if let Some(saved) = saved.filter(|saved| saved.is_adapter() != recipe.peft.is_some()) {
            let say = |adapter| if adapter { "adapters" } else { "the weights themselves" }.to_owned();
            let key = "what is trained (`peft`)";
            return Err(saved.incompatible(key, say(saved.is_adapter()), say(recipe.peft.is_some())));
        }
        let checkpoint = match (saved, &recipe.peft) {
            (Some(saved), None) => Some(saved_weights(saved, recipe.rng.seed, &config, dtype, &options)?),
            _ => checkpoint,
        };
        let dropout = DropoutSeed::default();
        let layout = ModelLayout::new(mesh, &config.config, recipe.distributed.pipeline)?;
        let build = |source: &dyn ParameterSource| {
            let source = HeldSource::new(source, &layout.division, mesh.world.rank());
            let model = Mistral4::new(&config.config, moe.clone(), &source, device)?;
            let holdings = source.into_holdings();
            Ok::<_, Error>((model, holdings))
        };
        let (mut model, holdings, adapter) = {
            let source: Box<dyn ParameterSource> = match &checkpoint {
                Some(checkpoint) => {
                    checkpoint.check(&checkpoint.tensors())?;
                    Box::new(CheckpointSource { checkpoint, dtype })
                }
                None => Box::new(InitialSource::new(&config.config, recipe.rng.seed, dtype)),
            };
            match &recipe.peft {
                None => {
                    let (model, holdings) = build(source.as_ref())?;
                    (model.freeze(frozen(recipe.freeze_config)), holdings, None)
                }
                Some(peft) => {
                    let quantized = match (&checkpoint, recipe.quantization) {
                        (Some(checkpoint), how) => {
                            Some(QuantizedSource::of_checkpoint(source.as_ref(), checkpoint, how))
                        }
                        (None, Some(how)) => Some(QuantizedSource::new(source.as_ref(), &config.config, how)),
                        (None, None) => None,
                    };
                    let source = quantized.as_ref().map_or(source.as_ref(), |source| source);
                    let adapter = adapters(recipe, peft, (&config.config, dtype), source, saved)?;
                    let adapted = AdaptedSource::new(source, &adapter);
                    let adapted = adapted.with_dropout(peft.dropout, peft.dropout_position, dropout.clone());
                    let (model, holdings) = build(&adapted)?;
                    (model.freeze_base(), holdings, Some(adapter))
                }
            }
        };
        model.set_groups(&layout.groups);
        let (processor, carry_from) = processor(recipe, &config, folder, saved, &mesh.world)?;
        if let Some(processor) = &processor {
            let (tokens, rows) = (processor.tokenizer().vocab_size(), config.config.text.vocab_size);
            if tokens > rows {
                return Err(Error::Inconsistent {
                    key: "dataset.tokenizer".to_owned(),
                    value: format!("{tokens} tokens"),
                    message: format!(
                        "the model's vocab_size is {rows}; take a smaller vocabulary or a larger model"
                    ),
                });
            }
        }
        Ok(Self { model, layout, holdings, config, dtype, processor, carry_from, adapter, dropout })
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

/// What a recipe's `model` names.
pub(crate) struct Base {
    pub(crate) config: ConfigFile,
    pub(crate) dtype: DType,
    folder: Option<PathBuf>,
    /// Weights to start from; `None` for fresh ones.
    checkpoint: Option<Checkpoint>,
}

/// Models of the hub whose configuration is also a preset.
const PRESETS: [(&str, &str); 1] = [("mistralai/Mistral-Small-4-119B-2603", "mistral-small-4-119b")];

impl Base {
    /// Configuration and storage type of what is on this machine or known without it; `None` for anything else.
    pub(crate) fn describe(model: &ModelConfig) -> Result<Option<(ConfigFile, DType)>> {
        let (ModelSource::Pretrained(name) | ModelSource::FromConfig(name)) = &model.source;
        let options = ConfigOptions::default();
        if Path::new(name).exists() || preset_names().any(|preset| preset == name) {
            let Self { config, dtype, .. } = Self::open(model, &options)?;
            return Ok(Some((config, dtype)));
        }
        let Some((_, preset)) = PRESETS.iter().find(|(id, _)| id == name) else { return Ok(None) };
        let config = ConfigFile::preset(preset, &options)?;
        let dtype = storage_dtype(model.torch_dtype, &config);
        Ok(Some((if model.multimodal { config } else { config.text_only() }, dtype)))
    }

    pub(crate) fn open(model: &ModelConfig, options: &ConfigOptions) -> Result<Self> {
        match &model.source {
            ModelSource::Pretrained(name) => {
                let folder = hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?;
                let checkpoint = Checkpoint::open(&folder, options)?;
                let checkpoint = if model.multimodal {
                    checkpoint.require_vision()?;
                    checkpoint
                } else {
                    checkpoint.text_only()
                };
                let config = checkpoint.config_file().clone();
                let dtype = storage_dtype(model.torch_dtype, &config);
                Ok(Self { config, dtype, folder: Some(folder), checkpoint: Some(checkpoint) })
            }
            ModelSource::FromConfig(name) => {
                let (config, folder) = read_config(name, options)?;
                let dtype = storage_dtype(model.torch_dtype, &config);
                let config = if model.multimodal { config } else { config.text_only() };
                Ok(Self { config, dtype, folder, checkpoint: None })
            }
        }
    }
}

/// New adapters, or those of a checkpoint of the run, which must be the recipe's over the same base.
fn adapters(
    recipe: &Recipe,
    peft: &PeftConfig,
    (config, dtype): (&Config, DType),
    source: &dyn ParameterSource,
    saved: Option<&Saved>,
) -> Result<Adapter> {
    let base_model = match &recipe.model.source {
        ModelSource::Pretrained(name) | ModelSource::FromConfig(name) => name.clone(),
    };
    let Some(saved) = saved else {
        let weight = |target: &Target| source.tensor(&target.weight_key(), &target.shape, true);
        let lora_dtype = peft.lora_dtype.unwrap_or(dtype);
        let adapter = peft.lora.adapter::<mistral4::Error>(config, recipe.rng.seed, lora_dtype, weight)?;
        return Ok(Adapter { base_model: Some(base_model), ..adapter });
    };
    saved.check(recipe.rng.seed, dtype, config.softmax_scale.policy.name())?;
    let adapter = Adapter::open(&saved.model_folder(), config)?;
    let was = adapter.base_model.clone().unwrap_or_default();
    if was != base_model {
        return Err(saved.incompatible("the base model of the adapter", was, base_model));
    }
    let plan: BTreeMap<String, usize> =
        peft.lora.plan(config)?.into_iter().map(|(target, rank)| (target.name, rank)).collect();
    let ranks: BTreeMap<String, usize> =
        adapter.modules.iter().map(|(name, lora)| (name.clone(), lora.rank())).collect();
    let differs = |name: &&String| plan.get(*name) != ranks.get(*name);
    if let Some(name) = plan.keys().chain(ranks.keys()).find(differs) {
        let say = |rank: Option<&usize>| rank.map_or("none".to_owned(), usize::to_string);
        let key = format!("the rank of the adapter of `{name}`");
        return Err(saved.incompatible(&key, say(ranks.get(name)), say(plan.get(name))));
    }
    for (name, lora) in &adapter.modules {
        let scale = peft.lora.alpha / lora.rank() as f64;
        if lora.scale != scale || lora.magnitude.is_some() != peft.lora.use_dora {
            let say = |scale, dora| format!("scale {scale}, DoRA {dora}");
            let key = format!("the adapter of `{name}`");
            let was = say(lora.scale, lora.magnitude.is_some());
            return Err(saved.incompatible(&key, was, say(scale, peft.lora.use_dora)));
        }
    }
    Ok(adapter)
}

/// The weights of a checkpoint of the run, which must be of the recipe's model.
fn saved_weights(
    saved: &Saved,
    seed: u64,
    config: &ConfigFile,
    dtype: DType,
    options: &ConfigOptions,
) -> Result<Checkpoint> {
    saved.check(seed, dtype, config.config.softmax_scale.policy.name())?;
    let checkpoint = Checkpoint::open(&saved.model_folder(), options)?;
    // The checkpoint's configuration went through a file; so does this one.
    let current = ConfigFile::from_value(config.to_hf_json(), &config.path, options)?.config;
    if checkpoint.config() != &current {
        let (was, is) = (checkpoint.config().to_hf_json(), current.to_hf_json());
        let (key, was, is) = difference("", &was, &is).unwrap_or_default();
        return Err(saved.incompatible(&format!("the model's {key}"), was, is));
    }
    Ok(checkpoint)
}

/// The first key whose value differs, with both values.
fn difference(key: &str, a: &Value, b: &Value) -> Option<(String, String, String)> {
    let (Some(left), Some(right)) = (a.as_object(), b.as_object()) else {
        return (a != b).then(|| (key.to_owned(), a.to_string(), b.to_string()));
    };
    let only_right = right.keys().filter(|name| !left.contains_key(*name));
    left.keys().chain(only_right).find_map(|name| {
        let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        difference(&path, a.get(name).unwrap_or(&Value::Null), b.get(name).unwrap_or(&Value::Null))
    })
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
pub(crate) fn frozen(config: FreezeConfig) -> impl Fn(&str) -> bool {
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

/// What the data sets of a recipe need to know, without reading or drawing weights or writing anything.
///
/// # Errors
/// Whatever is wrong with the configuration or the tokenizer.
pub fn data_context(recipe: &Recipe) -> Result<DataContext> {
    let options = ConfigOptions { softmax_scale: recipe.model.softmax_scale.map(policy) };
    let (config, folder) = match &recipe.model.source {
        ModelSource::FromConfig(name) => read_config(name, &options)?,
        ModelSource::Pretrained(name) => {
            let folder = hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?;
            (ConfigFile::read(&folder, &options)?, Some(folder))
        }
    };
    let processor = match &recipe.dataset.tokenizer {
        TokenizerSource::Model => read_processor(folder.as_deref())?,
        TokenizerSource::Path(name) => {
            read_processor(Some(&hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?))?
        }
        TokenizerSource::Learned { vocab_size } => {
            let tokenizer =
                learn_tokenizer(&recipe.dataset, *vocab_size, image_config(&config))?.tokenizer()?;
            let images = tokenizer.image_config().map(|config| ImageProcessor::new(config.into()));
            Some(Arc::new(Processor::new(tokenizer, images)))
        }
    };
    let vocab_size = config.config.text.vocab_size;
    Ok(DataContext { processor, vocab_size, seed: recipe.rng.seed })
}

/// The image settings that a learned tokenizer gets.
fn image_config(config: &ConfigFile) -> Option<ImageConfig> {
    config.config.vision.as_ref().map(|vision| ImageConfig {
        image_patch_size: vision.vision_config.patch_size,
        max_image_size: vision.vision_config.image_size,
        spatial_merge_size: vision.spatial_merge_size,
    })
}

/// Tokenizer and image processor of a folder; `None` where it has none, which data that needs one says when it is opened.
fn read_processor(folder: Option<&Path>) -> Result<Option<Arc<Processor>>> {
    let has_tokenizer =
        |folder: &&Path| ["tekken.json", "tokenizer.json"].iter().any(|name| folder.join(name).is_file());
    folder.filter(has_tokenizer).map(|folder| Ok(Arc::new(Processor::from_dir(folder)?))).transpose()
}

/// The tokenizer that the training data asks for, and the folder with its files.
fn processor(
    recipe: &Recipe,
    config: &ConfigFile,
    folder: Option<PathBuf>,
    saved: Option<&Saved>,
    world: &Communicator,
) -> Result<(Option<Arc<Processor>>, Option<PathBuf>)> {
    let folder = match &recipe.dataset.tokenizer {
        TokenizerSource::Model => folder,
        TokenizerSource::Path(name) => Some(hub::resolve(name, &HubOptions::from_env(), &mut |_| {})?),
        TokenizerSource::Learned { vocab_size } => {
            let folder = recipe.checkpoint.checkpoint_dir.join("tokenizer");
            let failed = |source| Error::Write { path: folder.clone(), source };
            std::fs::create_dir_all(&folder).map_err(failed)?;
            let file = folder.join("tekken.json");
            if world.is_first() {
                write_vocabulary(recipe, config, *vocab_size, &file, saved)?;
            }
            world.barrier();
            Some(folder)
        }
    };
    Ok((read_processor(folder.as_deref())?, folder))
}

/// Writes the vocabulary of a run: learned, or kept by the checkpoint that it goes on from.
fn write_vocabulary(
    recipe: &Recipe,
    config: &ConfigFile,
    vocab_size: usize,
    file: &Path,
    saved: Option<&Saved>,
) -> Result<()> {
    if let Some(saved) = saved {
        // A resumed run keeps the vocabulary that its weights were trained with.
        let kept = saved.model_folder().join("tekken.json");
        let bytes = std::fs::read(&kept).map_err(|source| Error::Read { path: kept, source })?;
        return std::fs::write(file, bytes).map_err(|source| Error::Write { path: file.to_owned(), source });
    }
    Ok(learn_tokenizer(&recipe.dataset, vocab_size, image_config(config))?.write(file)?)
}
