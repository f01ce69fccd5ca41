//! Which files a checkpoint folder holds, and which stored keys make up each parameter.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::names;
use super::native_names::{self, NativeName};
use super::packed;
use super::shard::{Entry, Shard};
use crate::error::{Error, Result};
use crate::json;

/// A stored tensor: file and key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) shard: usize,
    pub(crate) key: String,
}

/// A weight with what belongs to it, each if stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) weight: Option<Place>,
    pub(crate) scale: Option<Place>,
    /// Zero points of packed codes.
    pub(crate) zero: Option<Place>,
    /// Shape of the weight that packed codes stand for.
    pub(crate) shape: Option<Place>,
}

/// What a stored tensor is of a weight.
#[derive(Clone, Copy)]
enum Field {
    Weight,
    Scale,
    Zero,
    Shape,
}

impl Slot {
    fn place(&mut self, field: Field) -> &mut Option<Place> {
        match field {
            Field::Weight => &mut self.weight,
            Field::Scale => &mut self.scale,
            Field::Zero => &mut self.zero,
            Field::Shape => &mut self.shape,
        }
    }

    /// Everything that is stored of it.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        [&self.weight, &self.scale, &self.zero, &self.shape].into_iter().flatten()
    }
}

/// Parts of stacked experts by expert and part; gate is part 0 and up part 1 of `gate_up_proj`.
pub(crate) type Pieces = BTreeMap<(usize, usize), Slot>;

/// All tensors of a folder, by canonical key.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) shards: Vec<Shard>,
    /// Parameters stored as one tensor.
    pub(crate) whole: BTreeMap<String, Slot>,
    /// Expert stacks stored as one tensor an expert and part.
    pub(crate) pieces: BTreeMap<String, Pieces>,
    /// Whether the files are Mistral's own form.
    pub(crate) native: bool,
    /// Whether there are tensors of a vision tower.
    pub(crate) multimodal: bool,
}

enum Role {
    Whole(String),
    Piece(String, usize, usize),
    Ignored,
}

impl Sources {
    /// Opens every file of a folder and reads the headers.
    pub(crate) fn open(folder: &Path) -> Result<Sources> {
        let WeightFiles { paths, native, listed } = weight_files(folder)?;
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>>>()?;
        for (shard, keys) in shards.iter().zip(&listed) {
            if let Some(key) = keys.iter().find(|key| !shard.entries.contains_key(*key)) {
                return Err(Error::Tensor {
                    file: shard.path.clone(),
                    key: key.clone(),
                    problem: "it is not there, though the folder's index says so".into(),
                });
            }
        }
        let keys = || shards.iter().flat_map(|shard| shard.entries.keys().map(String::as_str));
        let multimodal = if native {
            keys().any(|key| key.starts_with("vision_encoder."))
        } else {
            names::are_multimodal(keys())
        };
        let mut whole: BTreeMap<String, Slot> = BTreeMap::new();
        let mut pieces: BTreeMap<String, Pieces> = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for key in shard.entries.keys() {
                let (role, field) =
                    if native { native_role(key, multimodal) } else { hf_role(key, multimodal) };
                let slot = match role {
                    Role::Ignored => continue,
                    Role::Whole(canonical) => whole.entry(canonical).or_default(),
                    Role::Piece(canonical, expert, part) => {
                        pieces.entry(canonical).or_default().entry((expert, part)).or_default()
                    }
                };
                if let Some(other) = slot.place(field).replace(Place { shard: index, key: key.clone() }) {
                    return Err(Error::Tensor {
                        file: shard.path.clone(),
                        key: key.clone(),
                        problem: format!(
                            "the same parameter is stored as `{}` in {}",
                            other.key,
                            shards[other.shard].path.display()
                        ),
                    });
                }
            }
        }
        Ok(Sources { shards, whole, pieces, native, multimodal })
    }

    pub(crate) fn entry(&self, place: &Place) -> &Entry {
        &self.shards[place.shard].entries[&place.key]
    }

    pub(crate) fn path(&self, place: &Place) -> &Path {
        &self.shards[place.shard].path
    }

    pub(crate) fn bytes(&self, place: &Place) -> &[u8] {
        self.shards[place.shard].bytes(self.entry(place))
    }

    /// The shape of a weight; `None` when it is not stored, or does not say.
    pub(crate) fn shape(&self, slot: &Slot) -> Option<Vec<usize>> {
        if packed::is_packed(slot) {
            return packed::shape(self, slot).ok().map(Vec::from);
        }
        Some(self.entry(slot.weight.as_ref()?).shape.clone())
    }

    /// The shape a stack of experts has when its parts are put together; `None` when they do not fit.
    pub(crate) fn stacked_shape(&self, pieces: &Pieces) -> Option<Vec<usize>> {
        let shape = |slot: &Slot| match self.shape(slot)?.as_slice() {
            &[rows, columns] => Some((rows, columns)),
            _ => None,
        };
        let experts = pieces.keys().map(|(expert, _)| *expert).max()?.checked_add(1)?;
        let parts = pieces.keys().map(|(_, part)| part + 1).max()?;
        if pieces.len() != experts.checked_mul(parts)? {
            return None;
        }
        let first: Vec<_> = (0..parts).map(|part| shape(pieces.get(&(0, part))?)).collect::<Option<_>>()?;
        let columns = first[0].1;
        let same = pieces.iter().all(|(&(_, part), slot)| shape(slot) == Some(first[part]));
        let rows = first.iter().map(|(rows, _)| rows).sum();
        (same && first.iter().all(|part| part.1 == columns)).then(|| vec![experts, rows, columns])
    }
}

/// The role of a key in Hugging Face's form, and what it is of the weight.
fn hf_role(key: &str, multimodal: bool) -> (Role, Field) {
    const FIELDS: [(&str, Field); 5] = [
        ("_scale_inv", Field::Scale),
        (".weight_packed", Field::Weight),
        (".weight_scale", Field::Scale),
        (".weight_zero_point", Field::Zero),
        (".weight_shape", Field::Shape),
    ];
    if key.ends_with("activation_scale") {
        return (Role::Ignored, Field::Scale);
    }
    let suffixed =
        FIELDS.iter().find_map(|(suffix, field)| Some((key.strip_suffix(suffix)?, *suffix, *field)));
    let (key, field) = match suffixed {
        Some((key, "_scale_inv", field)) => (Cow::Borrowed(key), field),
        Some((module, _, field)) => (Cow::Owned(format!("{module}.weight")), field),
        None => (Cow::Borrowed(key), Field::Weight),
    };
    let canonical = names::canonical(&key, multimodal);
    let role = match expert_part(&canonical) {
        Some((stack, expert, part)) => Role::Piece(stack, expert, part),
        None => Role::Whole(canonical.into_owned()),
    };
    (role, field)
}

/// Takes `...mlp.experts.3.gate_proj.weight` apart, the form that related models are stored in.
fn expert_part(key: &str) -> Option<(String, usize, usize)> {
    let (prefix, rest) = key.split_once(".mlp.experts.")?;
    let (expert, module) = rest.split_once('.')?;
    let number: usize = expert.parse().ok().filter(|number: &usize| number.to_string() == expert)?;
    let (stack, part) = match module {
        "gate_proj.weight" => ("gate_up_proj", 0),
        "up_proj.weight" => ("gate_up_proj", 1),
        "down_proj.weight" => ("down_proj", 0),
        _ => return None,
    };
    Some((format!("{prefix}.mlp.experts.{stack}"), number, part))
}

/// The role of a key in Mistral's own form, and what it is of the weight.
fn native_role(key: &str, multimodal: bool) -> (Role, Field) {
    if key.ends_with(".qscale_act") {
        return (Role::Ignored, Field::Scale);
    }
    let (name, field) = match key.strip_suffix(".qscale_weight") {
        Some(module) => (format!("{module}.weight"), Field::Scale),
        None => (key.to_owned(), Field::Weight),
    };
    let role = match native_names::to_canonical(&name, multimodal) {
        Some(NativeName::Tensor(canonical)) => Role::Whole(canonical),
        Some(NativeName::Expert { key, expert, part }) => Role::Piece(key, expert, part),
        // Kept under its own name, it is reported as extra.
        None => Role::Whole(key.to_owned()),
    };
    (role, field)
}

/// The weight files of a folder.
struct WeightFiles {
    paths: Vec<PathBuf>,
    /// Whether they are Mistral's own form.
    native: bool,
    /// For each file the keys that an index says it holds; empty without an index.
    listed: Vec<Vec<String>>,
}

/// Finds the weight files of a folder; Hugging Face's form is taken first.
fn weight_files(folder: &Path) -> Result<WeightFiles> {
    for (stem, native) in [("model", false), ("consolidated", true)] {
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            let (paths, listed) = indexed(folder, &index)?.into_iter().unzip();
            return Ok(WeightFiles { paths, native, listed });
        }
        let single = folder.join(format!("{stem}.safetensors"));
        if single.is_file() {
            return Ok(WeightFiles { paths: vec![single], native, listed: Vec::new() });
        }
        if native {
            let paths = numbered(folder, stem)?;
            if !paths.is_empty() {
                return Ok(WeightFiles { paths, native, listed: Vec::new() });
            }
        }
    }
    Err(Error::NotAModel {
        path: folder.to_path_buf(),
        problem:
            "the folder has no model.safetensors, model.safetensors.index.json or consolidated*.safetensors"
                .into(),
        fix: "give the folder of a checkpoint; pickled .bin weights must be converted first".into(),
    })
}

/// The shards an index names, with the keys it says they hold.
fn indexed(folder: &Path, index: &Path) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let error = |problem: String| Error::Index { file: index.to_path_buf(), problem };
    let value = json::read(index)?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| error("there is no object `weight_map`".into()))?;
    let mut by_file: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (key, file) in map {
        let file = file.as_str().ok_or_else(|| error(format!("`{key}` names no file")))?;
        if Path::new(file).file_name().and_then(|name| name.to_str()) != Some(file) {
            return Err(error(format!("`{key}` is said to be in `{file}`, which is not a file name")));
        }
        by_file.entry(file).or_default().push(key.clone());
    }
    let missing: Vec<String> =
        by_file.keys().filter(|file| !folder.join(file).is_file()).map(|&file| file.to_owned()).collect();
    if !missing.is_empty() {
        return Err(Error::MissingShards { index: index.to_path_buf(), missing, total: by_file.len() });
    }
    Ok(by_file.into_iter().map(|(file, keys)| (folder.join(file), keys)).collect())
}

/// The shards `stem-0000i-of-0000n.safetensors`, all of which must be there.
fn numbered(folder: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut total = None;
    for item in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let item = item.map_err(Error::io(folder, "list"))?;
        let name = item.file_name();
        let Some(name) = name.to_str() else { continue };
        let Some(numbers) = name.strip_prefix(stem).and_then(|rest| rest.strip_suffix(".safetensors")) else {
            continue;
        };
        let parsed = numbers.strip_prefix('-').and_then(|rest| rest.split_once("-of-"));
        if let Some((number, of)) = parsed
            && let (Ok(number), Ok(of)) = (number.parse::<usize>(), of.parse::<usize>())
        {
            found.insert((number, name.to_owned()));
            total = Some(of);
            continue;
        }
        found.insert((found.len(), name.to_owned()));
    }
    if let Some(total) = total
        && found.len() != total
    {
        let present: BTreeSet<usize> = found.iter().map(|(number, _)| *number).collect();
        let missing: Vec<String> = (1..=total.min(10_000))
            .filter(|number| !present.contains(number))
            .map(|number| format!("{stem}-{number:05}-of-{total:05}.safetensors"))
            .collect();
        return Err(Error::MissingShards {
            index: folder.join(format!("{stem}*.safetensors")),
            missing,
            total,
        });
    }
    Ok(found.into_iter().map(|(_, name)| folder.join(name)).collect())
}
