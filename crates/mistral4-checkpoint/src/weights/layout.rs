//! How the parameters of a model are laid out over keys and files when they are written.

use std::ops::Range;

use mistral4_kernels::{Bits, StackDims};

use super::dtype::{DType, StoredDType};
use super::names::{self, TensorKind, TensorSpec};
use super::native_names;
use super::quantize::{WeightFormat, WeightQuantization, stack_dims};
use crate::config::{Config, ConfigForm};
use crate::error::{Error, Result};

/// Format in which weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SaveDType {
    /// Every tensor in one float format; a router's selection bias stays f32.
    Float(DType),
    /// The decoder's linears and experts as FP8 with one scale a weight or expert, everything else as bf16.
    Fp8,
    /// Integer codes, packed as the compressed-tensors library does; everything else as bf16.
    Packed(WeightQuantization),
}

impl SaveDType {
    /// The format of a name on the command line: `f32`, `bf16`, `f16` or `fp8`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "f32" => Some(SaveDType::Float(DType::F32)),
            "bf16" => Some(SaveDType::Float(DType::BF16)),
            "f16" => Some(SaveDType::Float(DType::F16)),
            "fp8" => Some(SaveDType::Fp8),
            _ => None,
        }
    }

    /// The format of tensors that are not quantised.
    pub(crate) fn float(self) -> DType {
        match self {
            SaveDType::Float(dtype) => dtype,
            SaveDType::Fp8 | SaveDType::Packed(_) => DType::BF16,
        }
    }
}

/// A stored tensor: a run of a parameter's values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) key: String,
    pub(crate) shape: Vec<usize>,
    /// Which of the parameter's values.
    pub(crate) values: Range<usize>,
    pub(crate) encoding: Encoding,
}

/// How a part's values are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Encoding {
    Float(DType),
    /// FP8 with scales of the given shape under their own key, each for an equal run of values.
    Fp8 {
        scale_key: String,
        scale_shape: Vec<usize>,
    },
    /// Integer codes of one matrix of the parameter's stack, under `.weight_packed` and its like.
    Packed {
        matrix: usize,
        bits: Bits,
        group_size: usize,
        symmetric: bool,
    },
}

/// An entry of a file's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) key: String,
    pub(crate) dtype: StoredDType,
    pub(crate) shape: Vec<usize>,
}

impl Item {
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.size() as u64
    }
}

impl Part {
    /// The header entries of this part.
    pub(crate) fn items(&self) -> Vec<Item> {
        let item =
            |key: &str, dtype, shape: &[usize]| Item { key: key.to_owned(), dtype, shape: shape.to_vec() };
        match &self.encoding {
            Encoding::Float(dtype) => vec![item(&self.key, dtype.stored(), &self.shape)],
            Encoding::Fp8 { scale_key, scale_shape } => vec![
                item(&self.key, StoredDType::F8E4M3, &self.shape),
                item(scale_key, StoredDType::F32, scale_shape),
            ],
            Encoding::Packed { bits, group_size, symmetric, .. } => {
                let (rows, columns) = (self.shape[0], self.shape[1]);
                let groups = columns.div_ceil(*group_size);
                let words = |count: usize| (count * bits.count()).div_ceil(32);
                let mut items = vec![
                    item(&format!("{}_packed", self.key), StoredDType::I32, &[rows, words(columns)]),
                    item(&format!("{}_scale", self.key), StoredDType::BF16, &[rows, groups]),
                    item(&format!("{}_shape", self.key), StoredDType::I64, &[2]),
                ];
                if !symmetric {
                    let zeros = format!("{}_zero_point", self.key);
                    items.push(item(&zeros, StoredDType::I32, &[words(rows), groups]));
                }
                items
            }
        }
    }
}

/// The parts under which a parameter is stored.
///
/// # Errors
/// When the parameter has no name in the native form.
pub(crate) fn parts(spec: &TensorSpec, form: ConfigForm, dtype: SaveDType) -> Result<Vec<Part>> {
    let float = if spec.kind == TensorKind::GateBias { DType::F32 } else { dtype.float() };
    let quantised = dtype == SaveDType::Fp8 && spec.is_quantisable();
    let is_stack = matches!(spec.kind, TensorKind::ExpertsGateUp | TensorKind::ExpertsDown);
    if let SaveDType::Packed(quantization) = dtype
        && let Some(format) = quantization.stored(spec)
    {
        return packed_parts(spec, form, format);
    }
    if form == ConfigForm::Native && is_stack {
        return expert_parts(spec, quantised, float);
    }
    let key = match form {
        ConfigForm::Hf => spec.key.clone(),
        ConfigForm::Native => native_names::to_native(&spec.key).ok_or_else(|| unnamed(spec))?,
    };
    let encoding = if quantised {
        let scale_key = match form {
            ConfigForm::Hf => format!("{key}_scale_inv"),
            ConfigForm::Native => native_scale(&key),
        };
        Encoding::Fp8 { scale_key, scale_shape: if is_stack { vec![spec.shape[0], 1, 1] } else { vec![] } }
    } else {
        Encoding::Float(float)
    };
    Ok(vec![Part { key, shape: spec.shape.clone(), values: 0..spec.elements(), encoding }])
}

/// One part for each expert's `w1`, `w2` or `w3`.
fn expert_parts(spec: &TensorSpec, quantised: bool, float: DType) -> Result<Vec<Part>> {
    let &[experts, rows, columns] = spec.shape.as_slice() else { return Err(unnamed(spec)) };
    let mut parts = Vec::new();
    for expert in 0..experts {
        let keys = native_names::to_native_expert(&spec.key, expert).ok_or_else(|| unnamed(spec))?;
        let part_rows = rows / keys.len();
        for (index, key) in keys.into_iter().enumerate() {
            let start = (expert * rows + index * part_rows) * columns;
            let encoding = if quantised {
                Encoding::Fp8 { scale_key: native_scale(&key), scale_shape: vec![] }
            } else {
                Encoding::Float(float)
            };
            let values = start..start + part_rows * columns;
            parts.push(Part { key, shape: vec![part_rows, columns], values, encoding });
        }
    }
    Ok(parts)
}

/// One part for each matrix: a linear's own, or each expert's gate, up and down.
fn packed_parts(spec: &TensorSpec, form: ConfigForm, format: WeightFormat) -> Result<Vec<Part>> {
    let refuse = |format, problem: String| Error::Unrepresentable { key: spec.key.clone(), format, problem };
    if form == ConfigForm::Native {
        return Err(refuse("native", "it has no packed integers; write Hugging Face's form".into()));
    }
    let WeightFormat::Int { bits, group_size, symmetric } = format else {
        return Err(refuse("packed", "only integer codes are packed".into()));
    };
    let StackDims { matrices, rows, columns } = stack_dims(spec);
    let part = |matrix: usize| {
        let key = match (spec.kind, spec.key.rsplit_once('.')) {
            (TensorKind::ExpertsGateUp, Some((experts, _))) => {
                let name = if matrix.is_multiple_of(2) { "gate_proj" } else { "up_proj" };
                format!("{experts}.{}.{name}.weight", matrix / 2)
            }
            (TensorKind::ExpertsDown, Some((experts, _))) => format!("{experts}.{matrix}.down_proj.weight"),
            _ => spec.key.clone(),
        };
        let values = matrix * rows * columns..(matrix + 1) * rows * columns;
        let encoding = Encoding::Packed { matrix, bits, group_size, symmetric };
        Part { key, shape: vec![rows, columns], values, encoding }
    };
    Ok((0..matrices).map(part).collect())
}

fn native_scale(key: &str) -> String {
    format!("{}.qscale_weight", key.strip_suffix(".weight").unwrap_or(key))
}

fn unnamed(spec: &TensorSpec) -> Error {
    Error::Unrepresentable { key: spec.key.clone(), format: "native", problem: "it has no name there".into() }
}

/// A parameter with the parts it is stored as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) spec: TensorSpec,
    pub(crate) parts: Vec<Part>,
}

/// The parameters of each file, in the model's order; a file is closed before it passes `max_bytes`.
pub(crate) fn plan(
    config: &Config,
    form: ConfigForm,
    dtype: SaveDType,
    max_bytes: u64,
    skip: impl Fn(&TensorSpec) -> bool,
) -> Result<Vec<Vec<Planned>>> {
    let mut files: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut filled = 0;
    for spec in names::tensors(config).into_iter().filter(|spec| !skip(spec)) {
        let parts = parts(&spec, form, dtype)?;
        let size: u64 = parts.iter().flat_map(Part::items).map(|item| item.bytes()).sum();
        if filled > 0 && filled + size > max_bytes {
            files.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(file) = files.last_mut() {
            file.push(Planned { spec, parts });
        }
    }
    Ok(files)
}
