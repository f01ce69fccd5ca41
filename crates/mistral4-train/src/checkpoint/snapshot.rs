//! What a checkpoint holds, and its files.
//!
//! ```text
//! epoch_E_step_S/
//!   config.yaml  losses.json  step_scheduler.json  trainer.json
//!   model/consolidated/                  a Hugging Face folder, or, where adapters are trained,
//!   model/adapter_model.safetensors  adapter_config.json
//!   optim/optimizer.json, and a safetensors file for every kind of state that the optimizer keeps: exp_avg,
//!     exp_avg_sq, master, momentum_buffer, and the largest magnitudes exp_avg_absmax, exp_avg_sq_absmax of 8-bit ones
//!   dataloader/dataloader_dp_rank_0.json
//!   rng/rng_global_rank_0.json
//! ```

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use bytemuck::pod_collect_to_vec;
use mistral4::weights::{NamedTensor, adapter_with, host_tensor};
use mistral4_checkpoint::adapter::{ADAPTER_CONFIG, ADAPTER_MODEL, Adapter};
use mistral4_checkpoint::config::{ConfigFile, ConfigForm};
use mistral4_checkpoint::weights::{self, DType, HostData, HostTensor, SaveDType, SaveOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::disk::{Disk, Operation};
use super::ranks::{Ranks, Source, StateLabel};
use super::tensors::{self, StateFile};
use crate::data::LoaderState;
use crate::early_stop::EarlyStopState;
use crate::error::{Error, Result};
use crate::guard::GuardState;
use crate::metrics::number_or_null;
use crate::optim::{OptimizerState, ParameterState, StateTensor};
use crate::parallel::Holdings;
use crate::parallel::sharding::BLOCK;
use crate::schedule::StepState;

const FORMAT_VERSION: u32 = 1;
const LOSSES: &str = "losses.json";
const STEP_SCHEDULER: &str = "step_scheduler.json";
const TRAINER: &str = "trainer.json";
const OPTIMIZER: &str = "optim/optimizer.json";
const DATALOADER: &str = "dataloader/dataloader_dp_rank_0.json";
const RNG: &str = "rng/rng_global_rank_0.json";
const MODEL: &str = "model/consolidated";
const ADAPTER: &str = "model";

/// How the model's folder is written.
#[derive(Debug, Clone)]
pub(crate) struct ModelFiles {
    /// Its configuration.
    pub(crate) config: ConfigFile,
    /// Storage type of the weights.
    pub(crate) dtype: DType,
    /// Folder whose tokenizer and processor files go along.
    pub(crate) carry_from: Option<PathBuf>,
    /// The adapters that are written in place of the weights, with the values they began with.
    pub(crate) adapter: Option<Adapter>,
}

/// A run after a step: everything that the next step depends on.
pub(crate) struct Snapshot {
    /// The next step.
    pub(crate) state: StepState,
    /// The model's parameters.
    pub(crate) parameters: Vec<NamedTensor>,
    /// How they are written.
    pub(crate) model: ModelFiles,
    /// The optimizer.
    pub(crate) optimizer_step: u64,
    /// Every state of the optimizer: key of its parameter, name, values.
    pub(crate) states: Vec<(String, &'static str, StateTensor)>,
    /// The next batch.
    pub(crate) loader: LoaderState,
    /// Seed of the data order and of made-up data; all that is random is a function of it and of the position.
    pub(crate) seed: u64,
    /// What is remembered about earlier losses.
    pub(crate) guard: GuardState,
    /// What is remembered about held-out losses.
    pub(crate) early_stop: EarlyStopState,
    /// Losses of the last step.
    pub(crate) losses: Losses,
    /// The recipe.
    pub(crate) recipe: String,
}

/// `losses.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Losses {
    /// Loss of the step.
    #[serde(with = "number_or_null")]
    pub(crate) train_loss: f64,
    /// Held-out losses by the name of the set; a single one is called `val_loss`.
    #[serde(flatten)]
    pub(crate) held_out: BTreeMap<String, f64>,
}

/// `trainer.json`.
#[derive(Serialize, Deserialize)]
struct TrainerFile {
    format_version: u32,
    dtype: String,
    softmax_scale: String,
    guard: GuardState,
    #[serde(default)]
    early_stop: EarlyStopState,
}

#[derive(Serialize, Deserialize)]
struct OptimizerFile {
    step: u64,
}

#[derive(Serialize, Deserialize)]
struct RngFile {
    seed: u64,
}

impl Losses {
    /// Losses of a step and of the held-out sets that were measured after it.
    pub(crate) fn new(train_loss: f64, held_out: &[(String, f64)]) -> Self {
        let finite = held_out.iter().filter(|(_, loss)| loss.is_finite()).cloned();
        let name = |name| if held_out.len() == 1 { "val_loss".to_owned() } else { name };
        Self { train_loss, held_out: finite.map(|(key, loss)| (name(key), loss)).collect() }
    }

    /// Those of a checkpoint; a checkpoint without them has no held-out loss.
    pub(super) fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(LOSSES);
        if path.exists() { json(&path) } else { Ok(Self::default()) }
    }

    /// The held-out loss that checkpoints are compared by.
    pub(super) fn metric(&self, key: &str) -> Option<f64> {
        let loss = self.held_out.get("val_loss").or_else(|| self.held_out.get(key));
        loss.copied()
    }
}

impl Snapshot {
    /// Whether a folder is a complete checkpoint of this form.
    pub(super) fn is_at(folder: &Path) -> bool {
        folder.join(STEP_SCHEDULER).is_file()
    }

    /// The next step of a checkpoint.
    pub(super) fn read_state(folder: &Path) -> Result<StepState> {
        json(&folder.join(STEP_SCHEDULER))
    }

    /// Writes every file under `folder` and brings it to the medium; returns what other readers will see differently.
    ///
    /// Every rank calls it. The first one writes the model, of which the others give it their parts, and all small files;
    /// every rank writes its part of the optimizer's states.
    pub(super) fn write(&self, disk: &Disk, folder: &Path, ranks: &Ranks) -> Result<Vec<String>> {
        let label = |(key, name, values): &(String, &'static str, StateTensor)| StateLabel {
            name: (*name).to_owned(),
            key: key.clone(),
            dtype: values.dtype(),
        };
        let states = ranks.all_states(self.states.iter().map(label).collect());
        let parameters =
            self.parameters.iter().map(|parameter| (parameter.key.as_str(), parameter)).collect();
        let shape = |key: &str| {
            let here: Option<&&NamedTensor> = HashMap::get(&parameters, key);
            ranks.shape(key, here.map(|parameter| &*parameter.shape)).to_vec()
        };
        let files = state_files(folder, &states, shape);
        let local = |key: &str| parameters.get(key).map(|parameter| parameter.values.to_data());
        let written = ranks.write(&local, |source| {
            let warnings =
                self.write_whole(disk, folder, &Whole { parameters: &parameters, ranks, source })?;
            files.iter().try_for_each(|(_, file)| file.create(disk))?;
            Ok(warnings)
        });
        let warnings = ranks.agree(written)?.unwrap_or_default();
        ranks.agree(self.write_states(disk, &files, ranks, shape))?;
        if ranks.is_first() {
            for part in ["model", "optim", "dataloader", "rng", ""] {
                disk.sync_folder(&folder.join(part))?;
            }
        }
        Ok(warnings)
    }

    /// Writes this rank's part of the optimizer's states.
    fn write_states(
        &self,
        disk: &Disk,
        files: &BTreeMap<String, StateFile>,
        ranks: &Ranks,
        shape: impl Fn(&str) -> Vec<usize>,
    ) -> Result<()> {
        files.iter().try_for_each(|(name, file)| {
            let part = |(key, of, values): &(String, &'static str, StateTensor)| {
                let elements = shape(key).iter().product();
                let runs = if of == name { ranks.writes(name, key, elements)? } else { return None };
                Some((key.clone(), runs, values.to_data().as_bytes().to_vec()))
            };
            let mut parts = self.states.iter().filter_map(part).peekable();
            if parts.peek().is_some() { file.write(disk, parts) } else { Ok(()) }
        })
    }

    fn write_whole(&self, disk: &Disk, folder: &Path, whole: &Whole<'_>) -> Result<Vec<String>> {
        let model = if self.model.adapter.is_some() { ADAPTER } else { MODEL };
        for part in ["", model, "optim", "dataloader", "rng"] {
            disk.create_folder(&folder.join(part))?;
        }
        let warnings = match &self.model.adapter {
            Some(adapter) => self.write_adapter(adapter, disk, &folder.join(model), whole)?,
            None => self.write_model(disk, &folder.join(model), whole)?,
        };
        disk.write(&folder.join(OPTIMIZER), &pretty(&OptimizerFile { step: self.optimizer_step }))?;
        let trainer = TrainerFile {
            format_version: FORMAT_VERSION,
            dtype: self.model.dtype.torch_name().to_owned(),
            softmax_scale: self.model.config.config.softmax_scale.policy.name().to_owned(),
            guard: self.guard.clone(),
            early_stop: self.early_stop,
        };
        disk.write(&folder.join(TRAINER), &pretty(&trainer))?;
        disk.write(&folder.join(DATALOADER), &pretty(&self.loader))?;
        disk.write(&folder.join(RNG), &pretty(&RngFile { seed: self.seed }))?;
        disk.write(&folder.join(LOSSES), &pretty(&self.losses))?;
        disk.write(&folder.join("config.yaml"), self.recipe.as_bytes())?;
        disk.write(&folder.join(STEP_SCHEDULER), &pretty(&self.state))?;
        Ok(warnings)
    }

    fn write_adapter(
        &self,
        adapter: &Adapter,
        disk: &Disk,
        folder: &Path,
        whole: &Whole<'_>,
    ) -> Result<Vec<String>> {
        let adapter = adapter_with(adapter, |key| whole.parameter(key));
        let files = adapter.to_files(self.model.config.config.vision.is_some());
        disk.write(&folder.join(ADAPTER_MODEL), &files.model)?;
        disk.write(&folder.join(ADAPTER_CONFIG), &files.config)?;
        Ok(Vec::new())
    }

    fn write_model(&self, disk: &Disk, folder: &Path, whole: &Whole<'_>) -> Result<Vec<String>> {
        let options = SaveOptions {
            dtype: SaveDType::Float(self.model.dtype),
            form: ConfigForm::Hf,
            carry_from: self.model.carry_from.as_deref(),
            ..SaveOptions::default()
        };
        let report = weights::save(folder, &self.model.config, &options, |spec| {
            disk.ask(Operation::Write, folder)?;
            Ok::<_, Error>(whole.parameter(&spec.key))
        })?;
        Ok(report.warnings)
    }
}

/// A file for each name of a state, the same on every rank.
fn state_files(
    folder: &Path,
    states: &[StateLabel],
    shape: impl Fn(&str) -> Vec<usize>,
) -> BTreeMap<String, StateFile> {
    let mut files: BTreeMap<&str, Vec<tensors::Named<'_>>> = BTreeMap::new();
    for StateLabel { name, key, dtype } in states {
        let mut shape = shape(key);
        if name.ends_with(ParameterState::OF_BLOCKS) {
            shape = vec![shape.iter().product::<usize>().div_ceil(BLOCK)];
        }
        files.entry(name).or_default().push(tensors::Named { key, shape, dtype: *dtype });
    }
    let file =
        |(name, states): (&str, Vec<_>)| (name.to_owned(), StateFile::new(state_file(folder, name), &states));
    files.into_iter().map(file).collect()
}

/// Whole tensors, from this rank and the others.
struct Whole<'a> {
    /// Those of this rank.
    parameters: &'a HashMap<&'a str, &'a NamedTensor>,
    ranks: &'a Ranks,
    source: &'a Source<'a>,
}

impl Whole<'_> {
    fn shape(&self, key: &str) -> &[usize] {
        self.ranks.shape(key, self.parameters.get(key).map(|parameter| &*parameter.shape))
    }

    fn parameter(&self, key: &str) -> HostTensor {
        let shape = self.shape(key);
        if let Some(parameter) = self.parameters.get(key).filter(|parameter| parameter.shape == shape) {
            return host_tensor((*parameter).clone());
        }
        let bytes = self.source.whole(key);
        let elements: usize = shape.iter().product();
        let data = match bytes.len() / elements {
            2 => HostData::BF16(pod_collect_to_vec(&bytes)),
            4 => HostData::F32(pod_collect_to_vec(&bytes)),
            other => unreachable!("parameters are stored in f32 or bf16, not in {other} bytes"),
        };
        HostTensor { shape: shape.to_vec(), data }
    }
}

/// A checkpoint that was read, apart from the model's weights.
pub(crate) struct Saved {
    /// The checkpoint.
    pub(crate) folder: PathBuf,
    /// The next step.
    pub(crate) state: StepState,
    /// The next batch.
    pub(crate) loader: LoaderState,
    /// What is remembered about earlier losses.
    pub(crate) guard: GuardState,
    /// What is remembered about held-out losses.
    pub(crate) early_stop: EarlyStopState,
    seed: u64,
    dtype: String,
    softmax_scale: String,
}

impl Saved {
    /// Reads a checkpoint's small files.
    ///
    /// # Errors
    /// Files that are missing or damaged, and a later form of checkpoints.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(TRAINER);
        let trainer: TrainerFile = json(&path)?;
        if trainer.format_version != FORMAT_VERSION {
            let message = format!(
                "format_version is {}, this release reads {FORMAT_VERSION}; use the release that wrote it",
                trainer.format_version
            );
            return Err(Error::Damaged { path, message });
        }
        Ok(Self {
            folder: folder.to_owned(),
            state: Snapshot::read_state(folder)?,
            loader: json(&folder.join(DATALOADER))?,
            guard: trainer.guard,
            early_stop: trainer.early_stop,
            seed: json::<RngFile>(&folder.join(RNG))?.seed,
            dtype: trainer.dtype,
            softmax_scale: trainer.softmax_scale,
        })
    }

    /// The model's folder.
    pub(crate) fn model_folder(&self) -> PathBuf {
        self.folder.join(if self.is_adapter() { ADAPTER } else { MODEL })
    }

    /// Whether it holds adapters in place of the weights.
    pub(crate) fn is_adapter(&self) -> bool {
        self.folder.join(ADAPTER).join(ADAPTER_CONFIG).exists()
    }

    /// Refuses a run of another seed, storage type or softmax scale.
    ///
    /// # Errors
    /// [`Error::Incompatible`] with what differs.
    pub(crate) fn check(&self, seed: u64, dtype: DType, softmax_scale: &str) -> Result<()> {
        for (key, saved, current) in [
            ("rng.seed", self.seed.to_string(), seed.to_string()),
            ("model.torch_dtype", self.dtype.clone(), dtype.torch_name().to_owned()),
            ("the softmax scale's policy", self.softmax_scale.clone(), softmax_scale.to_owned()),
        ] {
            if saved != current {
                return Err(self.incompatible(key, saved, current));
            }
        }
        Ok(())
    }

    /// An error about something that is not as it was.
    pub(crate) fn incompatible(&self, key: &str, saved: String, current: String) -> Error {
        Error::Incompatible { checkpoint: self.folder.clone(), key: key.to_owned(), saved, current }
    }

    /// Reads the optimizer's states, as far as this rank keeps them.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub(crate) fn optimizer(&self, device: &Device, holdings: &Holdings) -> Result<OptimizerState> {
        let OptimizerFile { step } = json(&self.folder.join(OPTIMIZER))?;
        let mut found: BTreeMap<String, BTreeMap<&'static str, StateTensor>> = BTreeMap::new();
        for name in ParameterState::NAMES {
            let path = state_file(&self.folder, name);
            let runs = |key: &str, count| match name.ends_with(ParameterState::OF_BLOCKS) {
                true => holdings.block_runs(key, count),
                false => holdings.runs(key, count),
            };
            if path.is_file() {
                for (key, values) in tensors::read(&path, device, &runs)? {
                    found.entry(key).or_default().insert(name, values);
                }
            }
        }
        let mut parameters = BTreeMap::new();
        for (key, tensors) in found {
            let names = tensors.keys().copied().collect::<Vec<_>>().join(", ");
            let state = ParameterState::from_tensors(tensors).ok_or_else(|| Error::Damaged {
                path: self.folder.join("optim"),
                message: format!("the states of `{key}` do not belong together; there are {names}"),
            })?;
            parameters.insert(key, state);
        }
        Ok(OptimizerState { step, parameters })
    }
}

fn state_file(folder: &Path, name: &str) -> PathBuf {
    folder.join("optim").join(format!("{name}.safetensors"))
}

fn pretty(value: &impl Serialize) -> Vec<u8> {
    let text = serde_json::to_string_pretty(value).expect("plain data is JSON");
    format!("{text}\n").into_bytes()
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::Damaged { path: path.to_owned(), message: error.to_string() })
}
