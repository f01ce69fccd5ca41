//! Writing a checkpoint folder, one tensor in memory at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::checkpoint::Checkpoint;
use super::dtype::{DType, StoredDType};
use super::encode::{Payload, write_part};
use super::host::{HostData, HostTensor};
use super::layout::{self, Item, Part, Planned, SaveDType};
use super::names::{TensorKind, TensorSpec};
use super::native_names;
use super::quantize::{WeightFormat, WeightQuantization, quantize};
use super::writer::{PARTIAL, PendingFile, ShardWriter, sync_folder};
use crate::config::{
    Config, ConfigFile, ConfigForm, Fp8Quantization, PackedGroup, SoftmaxScale, SoftmaxScalePolicy,
    packed_json,
};
use crate::error::{Error, Result};

/// How a checkpoint is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions<'a> {
    /// Format of the weights.
    pub dtype: SaveDType,
    /// Hugging Face's form or Mistral's own.
    pub form: ConfigForm,
    /// A file is closed before it passes this size, in bytes.
    pub max_shard_size: u64,
    /// Folder whose tokenizer, processor and generation files are carried along.
    pub carry_from: Option<&'a Path>,
}

impl Default for SaveOptions<'_> {
    fn default() -> Self {
        SaveOptions {
            dtype: SaveDType::Float(DType::BF16),
            form: ConfigForm::Hf,
            max_shard_size: 5_000_000_000,
            carry_from: None,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveReport {
    /// Weight files, in order.
    pub files: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub total_size: u64,
    /// What another reader of the folder will not see as this library does, a sentence each.
    pub warnings: Vec<String>,
}

/// Files beside the weights that belong to a checkpoint.
const CARRIED: &[&str] = &[
    "SYSTEM_PROMPT.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
];

/// Writes a checkpoint, asking for one parameter at a time.
///
/// Everything is written under temporary names first. The folder's old configuration is removed before the first file takes
/// its final name, and the new one is put in place last, so a save that is killed leaves the old checkpoint, or a folder
/// without a configuration, which does not load.
///
/// A router's selection bias that is all zeros is left out, since transformers' Mistral 4 has none; another is written in f32,
/// with a warning.
///
/// # Errors
/// The callback's own, or when the model cannot be written in this form, a shape is not the model's, or the disk fails.
pub fn save<E: From<Error>>(
    folder: &Path,
    config: &ConfigFile,
    options: &SaveOptions<'_>,
    mut tensor: impl FnMut(&TensorSpec) -> Result<HostTensor, E>,
) -> Result<SaveReport, E> {
    write(folder, config, options, |spec| {
        let host = tensor(spec)?;
        if host.shape != spec.shape {
            return Err(E::from(Error::Tensor {
                file: folder.to_path_buf(),
                key: spec.key.clone(),
                problem: format!("it has shape {:?}, the model needs {:?}", host.shape, spec.shape),
            }));
        }
        Ok(Payload::Host(host.data))
    })
}

/// Writes a checkpoint that was opened, in another form or format.
///
/// FP8 weights with one scale each, or one an expert, are copied as they are when FP8 is asked for; others are dequantised.
///
/// # Errors
/// When the checkpoint's tensors are not those of its model, or as [`save`].
pub fn convert(checkpoint: &Checkpoint, folder: &Path, options: &SaveOptions<'_>) -> Result<SaveReport> {
    checkpoint.check(&checkpoint.tensors())?;
    let float = options.dtype.float();
    let options = SaveOptions { carry_from: options.carry_from.or(Some(checkpoint.folder())), ..*options };
    write(folder, checkpoint.config_file(), &options, |spec| {
        if options.dtype == SaveDType::Fp8 && spec.is_quantisable() {
            if let Some(raw) = checkpoint.view(&spec.key)?
                && raw.dtype == StoredDType::F8E4M3
                && let Some(scale) = raw.scale
                && scale.shape[1..] == [1, 1]
            {
                // One scale for a stack serves each of its experts.
                return Ok(Payload::Fp8 { codes: Cow::Borrowed(raw.bytes), scales: scale.values });
            }
            return checkpoint.read(&spec.key, DType::F32).map(|host| Payload::Host(host.data));
        }
        if let SaveDType::Packed(quantization) = options.dtype
            && let Some(format) = quantization.stored(spec)
        {
            let stored = checkpoint.stored_quantized(spec)?;
            return match stored
                .filter(|stored| stored.has_bf16_scales() && stored.scheme() == format.scheme(0))
            {
                Some(stored) => Ok(Payload::Quantized(stored)),
                None => checkpoint.read(&spec.key, DType::F32).map(|host| Payload::Host(host.data)),
            };
        }
        let dtype = if spec.kind == TensorKind::GateBias { DType::F32 } else { float };
        checkpoint.read(&spec.key, dtype).map(|host| Payload::Host(host.data))
    })
}

fn write<'a, E: From<Error>>(
    folder: &Path,
    config: &ConfigFile,
    options: &SaveOptions<'_>,
    mut payload: impl FnMut(&TensorSpec) -> Result<Payload<'a>, E>,
) -> Result<SaveReport, E> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    refuse_other_form(folder, options.form)?;
    remove_partial(folder)?;
    let config_json = config_json(config, options)?;
    let mut warnings = softmax_warning(&config.config, options.form, &config_json);
    if let SaveDType::Packed(quantization) = options.dtype {
        let names = Vec::from_iter(unpacked(&config.config, quantization)?);
        warnings.extend((!names.is_empty()).then(|| {
            format!("groups do not divide the columns of {}; they stay as they are", names.join(", "))
        }));
    }
    // Whether a bias is written depends on its values, and the layout on whether it is written.
    let mut biases = HashMap::new();
    for spec in super::names::tensors(&config.config).iter().filter(|spec| spec.kind == TensorKind::GateBias)
    {
        if let Payload::Host(data) = payload(spec)? {
            biases.insert(spec.key.clone(), data);
        }
    }
    let largest = biases.values().map(largest_magnitude).fold(0.0, f32::max);
    warnings.extend(bias_warning(largest, options.form));
    let skip = |spec: &TensorSpec| {
        spec.kind == TensorKind::GateBias
            && (options.form == ConfigForm::Native
                || biases.get(&spec.key).is_none_or(|data| largest_magnitude(data) == 0.0))
    };
    let plan = layout::plan(&config.config, options.form, options.dtype, options.max_shard_size, skip)?;
    let names = file_names(options.form, plan.len());
    let mut pending = Vec::new();
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for (name, file) in names.iter().zip(&plan) {
        let items: Vec<Item> =
            file.iter().flat_map(|planned| planned.parts.iter().flat_map(Part::items)).collect();
        total_size += items.iter().map(Item::bytes).sum::<u64>();
        let mut shard = ShardWriter::create(&folder.join(name), &items)?;
        for Planned { spec, parts } in file {
            let values = match biases.remove(&spec.key) {
                Some(bias) => Payload::Host(bias),
                None => payload(spec)?,
            };
            let values = in_form(values, spec, &config.config, options.form);
            let values = quantised(values, spec, options.dtype)?;
            for part in parts {
                write_part(&mut shard, part, &values)?;
            }
        }
        pending.push(shard.finish()?);
        weight_map.extend(items.into_iter().map(|item| (item.key, name.clone())));
    }
    let mut side = carried(folder, options.carry_from)?;
    const GENERATION: &str = "generation_config.json";
    let has_generation = folder.join(GENERATION).exists() || side.iter().any(|(name, _)| name == GENERATION);
    if options.form == ConfigForm::Hf && !has_generation {
        side.push((GENERATION.into(), pretty(&generation_config(&config.config))));
    }
    for (name, bytes) in side {
        pending.push(PendingFile::write(&folder.join(name), &bytes)?);
    }
    let (config_name, stem) = form_names(options.form);
    if plan.len() > 1 {
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        pending.push(PendingFile::write(
            &folder.join(format!("{stem}.safetensors.index.json")),
            &pretty(&index),
        )?);
    }
    let config_file = PendingFile::write(&folder.join(config_name), &pretty(&config_json))?;
    remove_old(folder, config_name, stem)?;
    for file in pending {
        file.publish()?;
    }
    sync_folder(folder)?;
    config_file.publish()?;
    sync_folder(folder)?;
    Ok(SaveReport { files: names.iter().map(|name| folder.join(name)).collect(), total_size, warnings })
}

fn form_names(form: ConfigForm) -> (&'static str, &'static str) {
    match form {
        ConfigForm::Hf => ("config.json", "model"),
        ConfigForm::Native => ("params.json", "consolidated"),
    }
}

fn file_names(form: ConfigForm, count: usize) -> Vec<String> {
    let (_, stem) = form_names(form);
    match count {
        1 => vec![format!("{stem}.safetensors")],
        _ => (1..=count).map(|number| format!("{stem}-{number:05}-of-{count:05}.safetensors")).collect(),
    }
}

/// A folder with both forms would read as one while the other is being replaced.
fn refuse_other_form(folder: &Path, form: ConfigForm) -> Result<()> {
    let other = match form {
        ConfigForm::Hf => "params.json",
        ConfigForm::Native => "config.json",
    };
    if folder.join(other).exists() {
        return Err(Error::NotAModel {
            path: folder.to_path_buf(),
            problem: format!("the folder holds a checkpoint in another form ({other})"),
            fix: "save to an empty folder".into(),
        });
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, "remove")(error)),
        _ => Ok(()),
    }
}

/// Removes what a killed save left behind.
fn remove_partial(folder: &Path) -> Result<()> {
    for name in file_names_of(folder)?.iter().filter(|name| name.starts_with('.') && name.ends_with(PARTIAL))
    {
        remove(&folder.join(name))?;
    }
    Ok(())
}

fn file_names_of(folder: &Path) -> Result<Vec<String>> {
    let items = std::fs::read_dir(folder).map_err(Error::io(folder, "list"))?;
    let names = items.map(|item| Ok(item.map_err(Error::io(folder, "list"))?.file_name().into_string().ok()));
    names.filter_map(Result::transpose).collect()
}

/// Removes the old configuration first, then the old weights.
fn remove_old(folder: &Path, config_name: &str, stem: &str) -> Result<()> {
    remove(&folder.join(config_name))?;
    sync_folder(folder)?;
    for name in file_names_of(folder)? {
        let is_shard = name.strip_prefix(stem).is_some_and(|rest| {
            rest == ".safetensors" || rest == ".safetensors.index.json" || is_numbered(rest)
        });
        if is_shard {
            remove(&folder.join(&name))?;
        }
    }
    Ok(())
}

/// `-00001-of-00002.safetensors`.
fn is_numbered(rest: &str) -> bool {
    let numbers = rest.strip_prefix('-').and_then(|rest| rest.strip_suffix(".safetensors"));
    numbers
        .and_then(|rest| rest.split_once("-of-"))
        .is_some_and(|(number, total)| number.parse::<usize>().is_ok() && total.parse::<usize>().is_ok())
}

fn config_json(config: &ConfigFile, options: &SaveOptions<'_>) -> Result<Value> {
    let multimodal = config.config.vision.is_some();
    match options.form {
        ConfigForm::Hf => {
            let mut json = config.to_hf_json();
            json["dtype"] = json!(options.dtype.float().torch_name());
            for part in ["text_config", "vision_config"] {
                if json.pointer(&format!("/{part}/dtype")).is_some() {
                    json[part]["dtype"] = json!(options.dtype.float().torch_name());
                }
            }
            if let SaveDType::Packed(quantization) = options.dtype {
                let unpacked = unpacked(&config.config, quantization)?;
                json["quantization_config"] = packed_config(quantization, multimodal, &unpacked);
            }
            if options.dtype == SaveDType::Fp8 {
                json["quantization_config"] = Fp8Quantization::per_tensor(multimodal).to_json();
            }
            Ok(json)
        }
        ConfigForm::Native => {
            let mut json = config.config.to_params_json()?;
            if options.dtype == SaveDType::Fp8 {
                json["quantization"] = json!({"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"});
            }
            Ok(json)
        }
    }
}

fn generation_config(config: &Config) -> Value {
    let text = &config.text;
    let eos = match text.eos_token_id.as_slice() {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    };
    json!({"bos_token_id": text.bos_token_id, "eos_token_id": eos, "pad_token_id": text.pad_token_id})
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// The files to carry along, by name; none when they are in the folder already.
fn carried(folder: &Path, from: Option<&Path>) -> Result<Vec<(String, Vec<u8>)>> {
    let Some(from) = from else { return Ok(Vec::new()) };
    if std::fs::canonicalize(from).ok() == std::fs::canonicalize(folder).ok() {
        return Ok(Vec::new());
    }
    let found = CARRIED.iter().map(|name| (name, from.join(name))).filter(|(_, path)| path.is_file());
    found
        .map(|(name, path)| Ok(((*name).to_owned(), std::fs::read(&path).map_err(Error::io(&path, "read"))?)))
        .collect()
}

/// Puts the rows of a tower's query and key projections in the order of the form.
fn in_form<'a>(payload: Payload<'a>, spec: &TensorSpec, config: &Config, form: ConfigForm) -> Payload<'a> {
    match (&config.vision, payload) {
        (Some(vision), Payload::Host(data))
            if form == ConfigForm::Native && native_names::is_permuted(&spec.key) =>
        {
            let head_dim = vision.vision_config.head_dim;
            let rows = (0..spec.shape[0]).map(|row| native_names::canonical_row(row, head_dim));
            Payload::Host(data.gather_rows(spec.shape[1], rows))
        }
        (_, payload) => payload,
    }
}

/// Quantises a parameter that is written as packed integers.
fn quantised<'a>(payload: Payload<'a>, spec: &TensorSpec, dtype: SaveDType) -> Result<Payload<'a>> {
    match (dtype, payload) {
        (SaveDType::Packed(quantization), Payload::Host(data)) => match quantization.stored(spec) {
            Some(format) => quantize(spec, format, &data).map(Payload::Quantized),
            None => Ok(Payload::Host(data)),
        },
        (_, payload) => Ok(payload),
    }
}

/// The modules that are to be quantised and are not, since groups do not divide their columns.
///
/// # Errors
/// When no weight is left to be quantised.
fn unpacked(config: &Config, quantization: WeightQuantization) -> Result<BTreeSet<String>> {
    let specs = super::names::tensors(config);
    if !specs.iter().any(|spec| spec.kind != TensorKind::LmHead && quantization.stored(spec).is_some()) {
        return Err(Error::Unrepresentable {
            key: "quantization_config".into(),
            format: "packed",
            problem: "the groups divide the columns of no weight; use a smaller group size".into(),
        });
    }
    let left =
        specs.iter().filter(|spec| quantization.of(spec).is_some() && quantization.stored(spec).is_none());
    Ok(left
        .map(|spec| {
            let module = spec.key.strip_suffix(".weight").unwrap_or(&spec.key);
            let name = module.rsplit('.').next().unwrap_or(module);
            match spec.kind {
                TensorKind::ExpertsGateUp => "experts.*(gate|up)_proj".to_owned(),
                TensorKind::ExpertsDown => "experts.*down_proj".to_owned(),
                _ => name.to_owned(),
            }
        })
        .collect())
}

/// The `quantization_config` of packed integer weights.
fn packed_config(quantization: WeightQuantization, multimodal: bool, unpacked: &BTreeSet<String>) -> Value {
    let group = |format: WeightFormat| match format {
        WeightFormat::Int { bits, group_size, symmetric } => {
            Some(PackedGroup { bits: bits.count(), group_size: Some(group_size), symmetric })
        }
        WeightFormat::Fp8 => None,
    };
    let mut groups: Vec<(&str, PackedGroup)> =
        group(quantization.weights).map(|group| ("Linear", group)).into_iter().collect();
    let mut ignore = vec!["re:.*kv_b_proj$", "re:.*mlp\\.gate$"];
    match quantization.lm_head.and_then(group) {
        Some(own) => groups.insert(0, ("re:.*lm_head$", own)),
        None => ignore.push("re:.*lm_head$"),
    }
    if multimodal {
        ignore.extend(["re:.*vision_tower.*", "re:.*multi_modal_projector.*"]);
    }
    let unpacked: Vec<String> = unpacked.iter().map(|name| format!("re:.*{name}$")).collect();
    ignore.extend(unpacked.iter().map(String::as_str));
    packed_json(&groups, &ignore)
}

fn largest_magnitude(data: &HostData) -> f32 {
    let magnitudes = (0..data.len()).map(|index| data.get(index).abs());
    magnitudes.fold(0.0, |a, b| if b.is_nan() { f32::INFINITY } else { a.max(b) })
}

fn bias_warning(largest: f32, form: ConfigForm) -> Option<String> {
    (largest > 0.0).then(|| match form {
        ConfigForm::Hf => format!(
            "the router's e_score_correction_bias is not zero (max |bias| = {largest}); transformers' mistral4 drops it on load, \
             so its routing will differ"
        ),
        ConfigForm::Native => format!(
            "the router's e_score_correction_bias is not zero (max |bias| = {largest}); the native form has no place for it, \
             it is left out and routing will differ"
        ),
    })
}

/// transformers scales by mscale_all_dim's factor whenever it is there, whatever the configuration says besides.
fn softmax_warning(config: &Config, form: ConfigForm, written: &Value) -> Vec<String> {
    let rope =
        ["/text_config/rope_parameters", "/rope_parameters"].iter().find_map(|key| written.pointer(key));
    let has_factor = rope.and_then(|rope| rope.get("mscale_all_dim")).is_some_and(|factor| !factor.is_null());
    let ours = config.softmax_scale.value;
    let policy = if has_factor { SoftmaxScalePolicy::YarnMscale } else { SoftmaxScalePolicy::Standard };
    let theirs = SoftmaxScale::new(policy, &config.text, "").value;
    if form == ConfigForm::Native || theirs == ours {
        return Vec::new();
    }
    vec![format!(
        "this model's softmax scale is {ours} ({}), but transformers 5.24 reads this config.json as {theirs}",
        config.softmax_scale.policy.name()
    )]
}
