//! A checkpoint folder, opened for reading.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::check::CheckReport;
use super::decode::{self, Element, RawTensor, Scale};
use super::dtype::{DType, StoredDType};
use super::host::{HostData, HostTensor};
use super::names::{self, TensorKind, TensorSpec};
use super::native_names;
use super::packed::{self, Packed};
use super::sources::{Pieces, Place, Slot, Sources};
use crate::config::{Config, ConfigFile, ConfigOptions, MultimodalConfig, Quantization};
use crate::error::{Error, Result};

/// Scales are taken to be for blocks of this size where the configuration does not say.
const DEFAULT_BLOCK: (usize, usize) = (128, 128);

/// A checkpoint folder: a configuration, and tensors that are read from mapped files when asked for.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: ConfigFile,
    sources: Sources,
    /// Canonical keys of this view are those of a text model, though the files hold a multimodal one.
    text_of_multimodal: bool,
    /// Bytes of weights that were decoded so far.
    pub(super) bytes_read: AtomicU64,
}

impl Checkpoint {
    /// Opens a folder in Hugging Face's or Mistral's own form; headers are read, tensors are not.
    ///
    /// # Errors
    /// When the configuration is not usable, a shard is missing or malformed, or a vision tower is configured of which no
    /// tensor is stored.
    pub fn open(folder: &Path, options: &ConfigOptions) -> Result<Checkpoint> {
        if !folder.is_dir() {
            return Err(Error::NotAModel {
                path: folder.to_path_buf(),
                problem: "there is no such folder".into(),
                fix: "give the folder of a checkpoint".into(),
            });
        }
        let config = ConfigFile::read(folder, options)?;
        let sources = Sources::open(folder)?;
        let checkpoint = Checkpoint {
            folder: folder.to_path_buf(),
            text_of_multimodal: config.config.vision.is_none() && sources.multimodal,
            config,
            sources,
            bytes_read: AtomicU64::new(0),
        };
        if checkpoint.config.config.vision.is_some() && !checkpoint.sources.multimodal {
            return Err(Error::NotAModel {
                path: folder.to_path_buf(),
                problem: "the configuration has a vision tower, but only a text model's tensors are stored"
                    .into(),
                fix: "use the configuration of the text model".into(),
            });
        }
        Ok(checkpoint)
    }

    /// The same checkpoint as a text model: the vision tower and projector are left out.
    pub fn text_only(self) -> Checkpoint {
        Checkpoint { text_of_multimodal: self.sources.multimodal, config: self.config.text_only(), ..self }
    }

    /// The vision side's configuration.
    ///
    /// # Errors
    /// When this is a text model.
    pub fn require_vision(&self) -> Result<&MultimodalConfig> {
        self.config.config.vision.as_ref().ok_or_else(|| Error::NotAModel {
            path: self.folder.clone(),
            problem: "this checkpoint is a text model, it has no vision tower".into(),
            fix: "use a multimodal checkpoint for images".into(),
        })
    }

    /// The model.
    pub fn config(&self) -> &Config {
        &self.config.config
    }

    /// The model's configuration with the file it came from.
    pub fn config_file(&self) -> &ConfigFile {
        &self.config
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of weights that were read from the files so far, scales left out.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Whether the weights are in Mistral's own form.
    pub fn is_native(&self) -> bool {
        self.sources.native
    }

    /// Every parameter of the model.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        names::tensors(self.config())
    }

    /// The key under which a parameter is stored; `None` when it is not, or as several tensors.
    pub fn stored_key(&self, canonical: &str) -> Option<&str> {
        let slot = self.sources.whole.get(self.file_key(canonical).as_ref())?;
        Some(&slot.weight.as_ref()?.key)
    }

    /// Whether a parameter is stored.
    pub fn contains(&self, canonical: &str) -> bool {
        self.stored_dtype(canonical).is_some()
    }

    /// Stored format of a parameter.
    pub fn stored_dtype(&self, canonical: &str) -> Option<StoredDType> {
        match self.find(canonical)? {
            Found::Whole(slot) => Some(self.sources.entry(slot.weight.as_ref()?).dtype),
            Found::Pieces(pieces) => Some(self.sources.entry(pieces.values().next()?.weight.as_ref()?).dtype),
        }
    }

    /// Stored shape of a parameter; for experts stored one by one, the shape of their stack.
    pub fn stored_shape(&self, canonical: &str) -> Option<Vec<usize>> {
        match self.find(canonical)? {
            Found::Whole(slot) => self.sources.shape(slot),
            Found::Pieces(pieces) => self.sources.stacked_shape(pieces),
        }
    }

    /// Every stored tensor: file, key, format, shape and bytes, in the files' order.
    pub fn stored(&self) -> impl Iterator<Item = (&Path, &str, StoredDType, &[usize], usize)> {
        self.sources.shards.iter().flat_map(|shard| {
            shard.entries.iter().map(move |(key, entry)| {
                let size = shard.bytes(entry).len();
                (shard.path.as_path(), key.as_str(), entry.dtype, entry.shape.as_slice(), size)
            })
        })
    }

    /// Checks that the checkpoint holds exactly these parameters, readable and of the right shape.
    ///
    /// # Errors
    /// Everything that is missing, unknown or unusable, in one error.
    pub fn check(&self, specs: &[TensorSpec]) -> Result<()> {
        let mut report = CheckReport::default();
        let mut known = std::collections::HashSet::new();
        for spec in specs {
            known.insert(self.file_key(&spec.key).into_owned());
            let Some(found) = self.find(&spec.key).filter(Found::has_weight) else {
                if !spec.is_optional() {
                    report.missing.push(spec.key.clone());
                }
                continue;
            };
            if let Err(problem) = self.check_one(spec, &found) {
                report.unusable.push((spec.key.clone(), problem));
            }
        }
        let pieces =
            self.sources.pieces.iter().flat_map(|(key, pieces)| pieces.values().map(move |slot| (key, slot)));
        for (key, slot) in self.sources.whole.iter().chain(pieces) {
            if known.contains(key) || self.text_of_multimodal && is_vision(key) {
                continue;
            }
            report.extra.extend(slot.places().map(|place| place.key.clone()));
        }
        if report.is_clean() { Ok(()) } else { Err(Error::Mismatch { folder: self.folder.clone(), report }) }
    }

    fn check_one(&self, spec: &TensorSpec, found: &Found<'_>) -> std::result::Result<(), String> {
        let shape = match found {
            Found::Whole(slot) => self.sources.shape(slot),
            Found::Pieces(pieces) => Some(
                self.sources
                    .stacked_shape(pieces)
                    .ok_or("stored as single experts, some of which are missing or differ in shape")?,
            ),
        };
        if let Some(shape) = shape
            && shape != spec.shape
        {
            return Err(format!("shape {shape:?}, the model needs {:?}", spec.shape));
        }
        found.slots().try_for_each(|slot| self.check_slot(spec, slot))
    }

    fn check_slot(&self, spec: &TensorSpec, slot: &Slot) -> std::result::Result<(), String> {
        let Some(place) = &slot.weight else { return Err("a scale but no weight".into()) };
        if packed::is_packed(slot) {
            if !spec.is_quantisable() && spec.kind != TensorKind::LmHead {
                return Err("must not be quantised to integers".into());
            }
            return Packed::open(&self.sources, slot).map(|_| ());
        }
        if slot.zero.is_some() || slot.shape.is_some() {
            return Err("parts of packed codes, but no codes".into());
        }
        let entry = self.sources.entry(place);
        if !decode::is_float(entry.dtype) {
            return Err(format!("stored as {}, which is not read", entry.dtype));
        }
        match (entry.dtype == StoredDType::F8E4M3, &slot.scale) {
            (true, None) => Err("stored as F8_E4M3 without a scale".into()),
            (true, Some(_)) if !spec.is_quantisable() => Err("must not be quantised".into()),
            (true, Some(scale)) => self.scale(&entry.shape, scale).map(|_| ()),
            (false, Some(_)) => Err(format!("stored as {} and has a scale all the same", entry.dtype)),
            (false, None) => Ok(()),
        }
    }

    /// Reads a parameter in the format asked for; FP8 is dequantised as `f32(fp8) * scale`, rounded once.
    ///
    /// A router's selection bias that is not stored reads as zeros.
    ///
    /// # Errors
    /// When it is not stored, or not in a way that can be read.
    pub fn read(&self, canonical: &str, dtype: DType) -> Result<HostTensor> {
        let (shape, data) = match dtype {
            DType::F32 => self.read_as(canonical).map(|(shape, values)| (shape, HostData::F32(values)))?,
            DType::BF16 => self.read_as(canonical).map(|(shape, values)| (shape, HostData::BF16(values)))?,
            DType::F16 => self.read_as(canonical).map(|(shape, values)| (shape, HostData::F16(values)))?,
        };
        Ok(HostTensor { shape, data })
    }

    pub(super) fn read_as<T: Element>(&self, canonical: &str) -> Result<(Vec<usize>, Vec<T>)> {
        let Some(found) = self.find(canonical).filter(Found::has_weight) else {
            if canonical.ends_with(names::GATE_BIAS) {
                let experts = self.config().text.n_routed_experts;
                return Ok((vec![experts], vec![T::default(); experts]));
            }
            return Err(self.tensor_error(canonical, "it is not stored"));
        };
        let shape = match &found {
            Found::Whole(_) => self.stored_shape(canonical),
            Found::Pieces(pieces) => self.sources.stacked_shape(pieces),
        };
        let Some(shape) = shape else {
            return Err(self.tensor_error(canonical, "some of its experts are missing or differ in shape"));
        };
        let mut values = vec![T::default(); shape.iter().product()];
        let stored = found.slots().filter_map(|slot| Some(self.sources.bytes(slot.weight.as_ref()?).len()));
        self.bytes_read.fetch_add(stored.sum::<usize>() as u64, Ordering::Relaxed);
        match found {
            Found::Whole(slot) if packed::is_packed(slot) => {
                self.open_packed(canonical, slot)?.decode(&mut values)
            }
            Found::Whole(slot) => {
                decode::decode(&self.raw(canonical, slot)?, &mut values);
                if self.sources.native && native_names::is_permuted(canonical) {
                    values = self.unpermuted_rows(values, &shape).ok_or_else(|| {
                        self.tensor_error(canonical, &format!("shape {shape:?} is no stack of heads"))
                    })?;
                }
            }
            Found::Pieces(pieces) if pieces.values().all(packed::is_packed) => {
                let size = values.len() / pieces.len();
                for (slot, values) in pieces.values().zip(values.chunks_mut(size)) {
                    self.open_packed(canonical, slot)?.decode(values);
                }
            }
            Found::Pieces(pieces) => {
                // In the order of their rows: expert by expert, gate before up.
                let raws =
                    pieces.values().map(|slot| self.raw(canonical, slot)).collect::<Result<Vec<_>>>()?;
                let mut rest = values.as_mut_slice();
                let mut parts = Vec::with_capacity(raws.len());
                for raw in raws {
                    let (part, after) = rest.split_at_mut(raw.shape.iter().product());
                    parts.push((raw, part));
                    rest = after;
                }
                parts.into_par_iter().for_each(|(raw, part)| decode::decode(&raw, part));
            }
        }
        Ok((shape, values))
    }

    /// Reorders rows of a tower's query or key projection from neighbouring rotary pairs to halves.
    fn unpermuted_rows<T: Element>(&self, values: Vec<T>, shape: &[usize]) -> Option<Vec<T>> {
        let head_dim = self.config().vision.as_ref()?.vision_config.head_dim;
        let &[rows, columns] = shape else { return None };
        if !rows.is_multiple_of(head_dim) {
            return None;
        }
        let starts = (0..rows).map(|row| native_names::native_row(row, head_dim) * columns);
        Some(starts.flat_map(|start| values[start..start + columns].iter().copied()).collect())
    }

    /// A parameter as it is stored, so that FP8 experts can be used without dequantising; `None` when it is not stored, or
    /// not as one tensor in canonical order.
    ///
    /// # Errors
    /// When its format or scale cannot be used.
    pub fn view(&self, canonical: &str) -> Result<Option<RawTensor<'_>>> {
        match self.find(canonical) {
            Some(Found::Whole(slot)) if slot.weight.is_some() && !packed::is_packed(slot) => {
                if self.sources.native && native_names::is_permuted(canonical) {
                    return Ok(None);
                }
                self.raw(canonical, slot).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn open_packed(&self, canonical: &str, slot: &Slot) -> Result<Packed<'_>> {
        Packed::open(&self.sources, slot).map_err(|problem| self.tensor_error(canonical, &problem))
    }

    pub(super) fn sources(&self) -> &Sources {
        &self.sources
    }

    pub(super) fn raw(&self, canonical: &str, slot: &Slot) -> Result<RawTensor<'_>> {
        let Some(place) = &slot.weight else {
            return Err(self.tensor_error(canonical, "it has a scale but no weight"));
        };
        let error = |problem: String| Error::Tensor {
            file: self.sources.path(place).to_path_buf(),
            key: place.key.clone(),
            problem,
        };
        let entry = self.sources.entry(place);
        if !decode::is_float(entry.dtype) {
            return Err(error(format!("it is stored as {}, which is not read", entry.dtype)));
        }
        let scale = match (entry.dtype == StoredDType::F8E4M3, &slot.scale) {
            (false, None) => None,
            (false, Some(_)) => {
                return Err(error(format!("it is stored as {} and has a scale all the same", entry.dtype)));
            }
            (true, None) => return Err(error("it is stored as F8_E4M3 without a scale".into())),
            (true, Some(scale)) => Some(self.scale(&entry.shape, scale).map_err(error)?),
        };
        Ok(RawTensor {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            bytes: self.sources.bytes(place),
            scale,
        })
    }

    fn scale(&self, weight: &[usize], place: &Place) -> std::result::Result<Scale, String> {
        let entry = self.sources.entry(place);
        let values = decode::scale_values(entry.dtype, &entry.shape, self.sources.bytes(place))
            .ok_or_else(|| format!("its scale is stored as {}", entry.dtype))?;
        let block = match &self.config.quantization {
            Some(Quantization::Fp8(fp8)) => fp8.weight_block_size,
            _ => None,
        };
        Scale::arrange(values, &entry.shape, weight, block.unwrap_or(DEFAULT_BLOCK))
    }

    pub(super) fn tensor_error(&self, canonical: &str, problem: &str) -> Error {
        Error::Tensor { file: self.folder.clone(), key: canonical.to_owned(), problem: problem.to_owned() }
    }

    /// The canonical key in the files' own kind of model.
    fn file_key<'a>(&self, canonical: &'a str) -> std::borrow::Cow<'a, str> {
        if self.text_of_multimodal {
            std::borrow::Cow::Owned(names::in_wrapper(canonical))
        } else {
            std::borrow::Cow::Borrowed(canonical)
        }
    }

    pub(super) fn find(&self, canonical: &str) -> Option<Found<'_>> {
        let key = self.file_key(canonical);
        let whole = self.sources.whole.get(key.as_ref()).map(Found::Whole);
        whole.or_else(|| self.sources.pieces.get(key.as_ref()).map(Found::Pieces))
    }
}

fn is_vision(canonical: &str) -> bool {
    canonical.starts_with("vision_tower.") || canonical.starts_with("multi_modal_projector.")
}

/// Where a parameter is stored.
pub(super) enum Found<'a> {
    Whole(&'a Slot),
    Pieces(&'a Pieces),
}

impl<'a> Found<'a> {
    pub(super) fn has_weight(&self) -> bool {
        self.slots().any(|slot| slot.weight.is_some())
    }

    /// What it is stored as, in the order of its values.
    pub(super) fn slots(&self) -> Box<dyn Iterator<Item = &'a Slot> + 'a> {
        match *self {
            Found::Whole(slot) => Box::new(std::iter::once(slot)),
            Found::Pieces(pieces) => Box::new(pieces.values()),
        }
    }
}
