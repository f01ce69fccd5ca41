//! Adapters in the files of the `peft` library.
//!
//! A linear map's matrices are `base_model.model.<module>.lora_A.weight` and `lora_B.weight`, modules named as in
//! transformers. Stacks of experts are targets of `target_parameters`: peft folds the experts into the rank, as
//! `[E * r, in]` and `[out, r * E]`, and nests the wrappers of one module, so that `down_proj` is `experts.lora_A` and
//! `gate_up_proj` beside it `experts.base_layer.lora_A`. Earlier releases had the two matrices of a stack the other way
//! round; both are read, and told apart by their shapes. What NeMo AutoModel writes of experts is read too
//! ([`super::nemo_experts`]).
//!
//! Source: `LoraLayer` and `ParamWrapper` in peft 0.21 (`tuners/lora/layer.py`).

use std::collections::BTreeMap;
use std::path::Path;

use super::nemo_experts;
use super::peft_config::PeftConfig;
use super::targets::module_in_transformers;
use super::{ADAPTER_CONFIG, ADAPTER_MODEL, Adapter, LoraTensors, Target, targets};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::weights::names::canonical;
use crate::weights::{HostData, HostTensor, Item, PendingFile, Shard, header, sync_folder};

const PREFIX: &str = "base_model.model.";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// What the files of an adapter hold, by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// `adapter_model.safetensors`.
    pub model: Vec<u8>,
    /// `adapter_config.json`.
    pub config: Vec<u8>,
}

/// Matrices of one wrapper, as stored.
#[derive(Default)]
pub(super) struct Stored {
    pub(super) a: Option<HostTensor>,
    pub(super) b: Option<HostTensor>,
    pub(super) magnitude: Option<HostTensor>,
}

impl Adapter {
    /// Reads an adapter's folder; every module must be one of the model's, with its shape.
    ///
    /// # Errors
    /// Files that are missing or malformed, and adapters of another model or another kind.
    pub fn open(folder: &Path, config: &Config) -> Result<Self> {
        let settings = PeftConfig::read(&folder.join(ADAPTER_CONFIG))?;
        let path = folder.join(ADAPTER_MODEL);
        let shard = Shard::open(&path)?;
        let multimodal = config.vision.is_some();
        let wrong =
            |key: &str, problem: String| Error::Adapter { file: path.clone(), key: key.into(), problem };
        let mut stored: BTreeMap<String, Stored> = BTreeMap::new();
        let mut replaced: BTreeMap<String, HostTensor> = BTreeMap::new();
        for (key, entry) in &shard.entries {
            // NeMo AutoModel puts its text model's prefix before peft's.
            let plain =
                key.strip_prefix("language_model.").filter(|key| key.starts_with(PREFIX)).unwrap_or(key);
            let plain = canonical(plain.strip_prefix(PREFIX).unwrap_or(plain), multimodal);
            let tensor =
                shard.float(entry).ok_or_else(|| wrong(key, format!("stored as {}", entry.dtype)))?;
            if let Some(module) = plain.strip_suffix(".base_layer.weight") {
                replaced.insert(format!("{module}.weight"), tensor);
                continue;
            }
            let (module, part, tensor) = match nemo_experts::native(&plain) {
                Some((stack, part)) => {
                    (stack, part, nemo_experts::inputs_last(tensor).map_err(|problem| wrong(key, problem))?)
                }
                None => {
                    let (module, part) = split(&plain).ok_or_else(|| {
                        wrong(key, "it is neither a LoRA matrix nor a DoRA magnitude".into())
                    })?;
                    (module.to_owned(), part, tensor)
                }
            };
            let slot = stored.entry(module).or_default();
            *match part {
                Part::A => &mut slot.a,
                Part::B => &mut slot.b,
                Part::Magnitude => &mut slot.magnitude,
            } = Some(tensor);
        }
        nemo_experts::stack(&mut stored).map_err(|(module, problem)| wrong(&module, problem))?;
        let known: BTreeMap<String, Target> =
            targets(config).into_iter().map(|target| (target.name.clone(), target)).collect();
        let mut modules = BTreeMap::new();
        for (module, Stored { a, b, magnitude }) in stored {
            let (Some(a), Some(b)) = (a, b) else {
                return Err(wrong(&module, "one of lora_A and lora_B is missing".into()));
            };
            if magnitude.is_some() != settings.use_dora {
                return Err(wrong(&module, "use_dora and the magnitudes that are stored disagree".into()));
            }
            let (name, a, b) = match known.get(&module) {
                Some(target) => (target.name.clone(), a, b),
                None => unfold(&module, &known, a, b).map_err(|problem| wrong(&module, problem))?,
            };
            let shape = &known[&name].shape;
            let rank = a.shape.len().checked_sub(2).map_or(0, |axis| a.shape[axis]);
            let (mut want_a, mut want_b) = (shape.clone(), shape.clone());
            want_a[shape.len() - 2] = rank;
            want_b[shape.len() - 1] = rank;
            let is_vector = |tensor: &HostTensor| tensor.shape == shape[..1];
            if rank == 0 || a.shape != want_a || b.shape != want_b || !magnitude.iter().all(is_vector) {
                let is = format!("{:?} and {:?}", a.shape, b.shape);
                return Err(wrong(
                    &module,
                    format!("its matrices are {is}, the model's weight is {shape:?}"),
                ));
            }
            let scale = settings.scale(&module_in_transformers(&name, multimodal), rank);
            modules.insert(name, LoraTensors { a, b, magnitude, scale });
        }
        for (key, tensor) in &replaced {
            let module = key.strip_suffix(".weight").and_then(|module| known.get(module));
            if module.is_none_or(|target| target.shape != tensor.shape) {
                return Err(wrong(key, format!("the model has no such weight of shape {:?}", tensor.shape)));
            }
        }
        if modules.is_empty() {
            return Err(wrong(ADAPTER_MODEL, "it holds no adapter".into()));
        }
        let PeftConfig { rank, alpha, base_model, .. } = settings;
        Ok(Self { modules, replaced, rank, alpha, base_model })
    }

    /// The files of this adapter.
    pub fn to_files(&self, multimodal: bool) -> AdapterFiles {
        let mut tensors = self.matrices(multimodal);
        for (key, tensor) in &self.replaced {
            let module = module_in_transformers(key.strip_suffix(".weight").unwrap_or(key), multimodal);
            tensors.insert(format!("{PREFIX}{module}.base_layer.weight"), tensor.clone());
        }
        let item = |(key, tensor): (&String, &HostTensor)| Item {
            key: key.clone(),
            dtype: tensor.dtype().stored(),
            shape: tensor.shape.clone(),
        };
        let (mut model, spans, length) = header(&tensors.iter().map(item).collect::<Vec<_>>());
        model.reserve(length as usize);
        for (key, _) in spans {
            match &tensors[&key].data {
                HostData::F32(values) => model.extend(values.iter().flat_map(|v| v.to_le_bytes())),
                HostData::BF16(values) => model.extend(values.iter().flat_map(|v| v.to_le_bytes())),
                HostData::F16(values) => model.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            }
        }
        AdapterFiles { model, config: self.peft_config(multimodal) }
    }

    /// Writes the adapter's folder; a write that is killed leaves the files of before, or a folder that does not load.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save(&self, folder: &Path, multimodal: bool) -> Result<()> {
        let AdapterFiles { model, config } = self.to_files(multimodal);
        std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        let model = PendingFile::write(&folder.join(ADAPTER_MODEL), &model)?;
        let config = PendingFile::write(&folder.join(ADAPTER_CONFIG), &config)?;
        let old = folder.join(ADAPTER_CONFIG);
        if old.exists() {
            std::fs::remove_file(&old).map_err(Error::io(&old, "remove"))?;
        }
        sync_folder(folder)?;
        model.publish()?;
        sync_folder(folder)?;
        config.publish()?;
        sync_folder(folder)
    }

    /// The matrices by their keys in the file, in their shapes there.
    pub fn matrices(&self, multimodal: bool) -> BTreeMap<String, HostTensor> {
        let mut stored = BTreeMap::new();
        for (name, lora) in &self.modules {
            let (module, a, b) = match lora.a.shape.len() {
                3 => (self.wrapper(name), fold_a(&lora.a), fold_b(&lora.b)),
                _ => (name.clone(), lora.a.clone(), lora.b.clone()),
            };
            let module = format!("{PREFIX}{}", module_in_transformers(&module, multimodal));
            stored.insert(format!("{module}.lora_A.weight"), a);
            stored.insert(format!("{module}.lora_B.weight"), b);
            if let Some(magnitude) = &lora.magnitude {
                stored.insert(format!("{module}.{MAGNITUDE}"), magnitude.clone());
            }
        }
        stored
    }

    /// The wrapper of a stack: peft wraps `gate_up_proj` first, then `down_proj` around it.
    fn wrapper(&self, name: &str) -> String {
        let (experts, parameter) = name.rsplit_once('.').expect("a stack is a parameter of its experts");
        let is_inner =
            parameter == "gate_up_proj" && self.modules.contains_key(&format!("{experts}.down_proj"));
        if is_inner { format!("{experts}.base_layer") } else { experts.to_owned() }
    }
}

pub(super) enum Part {
    A,
    B,
    Magnitude,
}

/// Module and part of a key.
fn split(key: &str) -> Option<(&str, Part)> {
    let ends = [
        (".lora_A.weight", Part::A),
        (".lora_B.weight", Part::B),
        (".lora_magnitude_vector.weight", Part::Magnitude),
        (".lora_magnitude_vector", Part::Magnitude),
    ];
    ends.into_iter().find_map(|(end, part)| Some((key.strip_suffix(end)?, part)))
}

/// The stack that a wrapper is for, and its matrices.
fn unfold(
    wrapper: &str,
    known: &BTreeMap<String, Target>,
    a: HostTensor,
    b: HostTensor,
) -> Result<(String, HostTensor, HostTensor), String> {
    let experts = wrapper.strip_suffix(".base_layer").unwrap_or(wrapper);
    let stacks: Vec<&Target> = ["gate_up_proj", "down_proj"]
        .iter()
        .filter_map(|parameter| known.get(&format!("{experts}.{parameter}")))
        .collect();
    if stacks.is_empty() {
        return Err("the model has no such module".into());
    }
    let (&[rows, narrow], &[wide, columns]) = (&a.shape[..], &b.shape[..]) else {
        return Err(format!("its matrices have shapes {:?} and {:?}", a.shape, b.shape));
    };
    for target in stacks {
        let [experts, outputs, inputs] = target.shape[..] else { continue };
        if rows != columns || rows % experts != 0 {
            continue;
        }
        if (narrow, wide) == (inputs, outputs) {
            return Ok((target.name.clone(), unfold_first(a, experts), unfold_last(b, experts)));
        }
        if (narrow, wide) == (outputs, inputs) {
            let (first, last) = (unfold_first(a, experts), unfold_last(b, experts));
            return Ok((target.name.clone(), transposed(last), transposed(first)));
        }
    }
    Err(format!("its matrices {:?} and {:?} fit no stack of the experts there", a.shape, b.shape))
}

/// `[E * r, n]` to `[E, r, n]`.
fn unfold_first(tensor: HostTensor, experts: usize) -> HostTensor {
    let shape = vec![experts, tensor.shape[0] / experts, tensor.shape[1]];
    HostTensor { shape, ..tensor }
}

/// `[n, r * E]`, experts running fastest, to `[E, n, r]`.
fn unfold_last(tensor: HostTensor, experts: usize) -> HostTensor {
    let (n, rank) = (tensor.shape[0], tensor.shape[1] / experts);
    let order = (0..experts).flat_map(|e| (0..n * rank).map(move |i| i * experts + e));
    HostTensor { data: tensor.data.gather_rows(1, order), shape: vec![experts, n, rank] }
}

/// `[E, r, n]` to `[E * r, n]`.
fn fold_a(a: &HostTensor) -> HostTensor {
    HostTensor { shape: vec![a.shape[0] * a.shape[1], a.shape[2]], data: a.data.clone() }
}

/// `[E, n, r]` to `[n, r * E]`, experts running fastest.
fn fold_b(b: &HostTensor) -> HostTensor {
    let [experts, n, rank] = b.shape[..] else { unreachable!("stacks have three axes") };
    let order = (0..n * rank).flat_map(|i| (0..experts).map(move |e| e * n * rank + i));
    HostTensor { data: b.data.gather_rows(1, order), shape: vec![n, rank * experts] }
}

/// `[E, m, n]` to `[E, n, m]`.
pub(super) fn transposed(tensor: HostTensor) -> HostTensor {
    let [experts, m, n] = tensor.shape[..] else { unreachable!("stacks have three axes") };
    let order = (0..experts).flat_map(|e| (0..n).flat_map(move |j| (0..m).map(move |i| (e * m + i) * n + j)));
    HostTensor { data: tensor.data.gather_rows(1, order), shape: vec![experts, n, m] }
}
