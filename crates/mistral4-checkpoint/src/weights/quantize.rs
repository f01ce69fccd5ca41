//! Which weights are quantised, and how.

use mistral4_kernels::{Bits, QuantizedMatrix, Scales, Scheme, StackDims};
use rayon::prelude::*;

use super::checkpoint::{Checkpoint, Found};
use super::decode::RawTensor;
use super::dtype::{DType, StoredDType};
use super::host::HostData;
use super::names::{TensorKind, TensorSpec};
use super::packed;
use crate::error::{Error, Result};

/// Formats of weights that stay quantised in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Integer codes with a scale (and a zero point) for each row and group of columns.
    Int {
        /// Width of a code.
        bits: Bits,
        /// Neighbouring columns that share a scale: 32, 64, 128 or 256.
        group_size: usize,
        /// Whether there are no zero points.
        symmetric: bool,
    },
    /// FP8 (e4m3), one scale a weight or expert where the checkpoint has none of its own.
    Fp8,
}

/// How a model's weights are quantised: the decoder's linears and experts, and the output projection by choice.
///
/// Embeddings, norms, the router, the vision side and `kv_b_proj` stay as they are: decoding multiplies with
/// `kv_b_proj` from both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightQuantization {
    /// Of linears and experts.
    pub weights: WeightFormat,
    /// Of `lm_head`; `None` keeps it as it is.
    pub lm_head: Option<WeightFormat>,
}

impl WeightFormat {
    /// How kernels code a matrix of so many columns.
    pub fn scheme(self, columns: usize) -> Scheme {
        match self {
            WeightFormat::Int { bits, group_size, symmetric } => Scheme::Int { bits, group_size, symmetric },
            WeightFormat::Fp8 => Scheme::Fp8 { block: columns.max(1) },
        }
    }
}

impl WeightQuantization {
    /// The format of a parameter; `None` when it is not quantised.
    pub fn of(&self, spec: &TensorSpec) -> Option<WeightFormat> {
        match spec.kind {
            TensorKind::LmHead => self.lm_head,
            _ if is_packable(spec) => Some(self.weights),
            _ => None,
        }
    }

    /// The format in which a parameter is written; groups that do not divide its columns leave it as it is, since other
    /// readers refuse a shorter last group.
    pub(crate) fn stored(&self, spec: &TensorSpec) -> Option<WeightFormat> {
        self.of(spec).filter(|format| match format {
            WeightFormat::Int { group_size, .. } => stack_dims(spec).columns.is_multiple_of(*group_size),
            WeightFormat::Fp8 => true,
        })
    }
}

/// Whether a parameter is quantised to integers, if any is.
fn is_packable(spec: &TensorSpec) -> bool {
    spec.is_quantisable() && !spec.key.ends_with(".kv_b_proj.weight")
}

/// The matrices that a parameter's values are: gate and up of an expert are two.
pub fn stack_dims(spec: &TensorSpec) -> StackDims {
    match *spec.shape.as_slice() {
        [matrices, rows, columns] if spec.kind == TensorKind::ExpertsGateUp => {
            StackDims { matrices: 2 * matrices, rows: rows / 2, columns }
        }
        [matrices, rows, columns] => StackDims { matrices, rows, columns },
        [rows, columns] => StackDims { matrices: 1, rows, columns },
        _ => StackDims { matrices: 0, rows: 0, columns: 0 },
    }
}

/// Quantises a parameter's values.
///
/// # Errors
/// Values that are not finite, or a group size that no kernel takes.
pub fn quantize(spec: &TensorSpec, format: WeightFormat, data: &HostData) -> Result<QuantizedMatrix> {
    let dims = stack_dims(spec);
    let scheme = format.scheme(dims.columns);
    let result = match data {
        HostData::F32(values) => QuantizedMatrix::quantize(dims, scheme, values),
        HostData::BF16(values) => QuantizedMatrix::quantize(dims, scheme, values),
        HostData::F16(values) => {
            let wide: Vec<f32> = values.par_iter().map(|value| value.to_f32()).collect();
            QuantizedMatrix::quantize(dims, scheme, &wide)
        }
    };
    result.map_err(|error| Error::Unrepresentable {
        key: spec.key.clone(),
        format: "quantised",
        problem: error.to_string(),
    })
}

impl Checkpoint {
    /// A parameter that is stored as FP8 or packed integers, in the form that kernels take; `None` when it is not.
    ///
    /// # Errors
    /// When its parts cannot be used.
    pub fn stored_quantized(&self, spec: &TensorSpec) -> Result<Option<QuantizedMatrix>> {
        let Some(found) = self.find(&spec.key).filter(|found| found.has_weight()) else { return Ok(None) };
        let error = |problem: String| self.tensor_error(&spec.key, &problem);
        if found.slots().all(packed::is_packed) {
            let parts = found.slots().map(|slot| packed::Packed::open(self.sources(), slot));
            let stack = parts.collect::<Result<Vec<_>, _>>().and_then(packed::stack).map_err(error)?;
            return if stack.dims() == stack_dims(spec) {
                Ok(Some(stack))
            } else {
                Err(error(format!("{:?} are stored, the model needs {:?}", stack.dims(), stack_dims(spec))))
            };
        }
        if self.stored_dtype(&spec.key) != Some(StoredDType::F8E4M3) {
            return Ok(None);
        }
        let raws = match found {
            Found::Whole(slot) => vec![self.raw(&spec.key, slot)?],
            Found::Pieces(pieces) => {
                pieces.values().map(|slot| self.raw(&spec.key, slot)).collect::<Result<_>>()?
            }
        };
        if raws.iter().any(|raw| raw.dtype != StoredDType::F8E4M3) {
            return Ok(None);
        }
        fp8_stack(spec, &raws).map(Some).map_err(error)
    }

    /// A parameter that is stored as packed integers and used as such; `None` when it is not.
    ///
    /// # Errors
    /// As [`Checkpoint::stored_quantized`].
    pub fn packed(&self, spec: &TensorSpec) -> Result<Option<QuantizedMatrix>> {
        let is_packed = self.stored_dtype(&spec.key) == Some(StoredDType::I32);
        if is_packed && (is_packable(spec) || spec.kind == TensorKind::LmHead) {
            self.stored_quantized(spec)
        } else {
            Ok(None)
        }
    }

    /// A parameter in a quantised format: as it is stored if it is stored so, else quantised from its values.
    ///
    /// # Errors
    /// When it is not stored or cannot be read, or its values cannot be quantised.
    pub fn quantized(&self, spec: &TensorSpec, format: WeightFormat) -> Result<QuantizedMatrix> {
        if let Some(stored) = self.stored_quantized(spec)?
            && is_coded_as(stored.scheme(), format)
        {
            return Ok(stored);
        }
        // Wider formats gain nothing: values come from 16 bits at most, or the result has 8.
        quantize(spec, format, &self.read(&spec.key, DType::BF16)?.data)
    }
}

/// Whether a stored stack is what a format asks for; FP8 may have scales of any shape.
fn is_coded_as(scheme: Scheme, format: WeightFormat) -> bool {
    match (scheme, format) {
        (Scheme::Fp8 { .. }, WeightFormat::Fp8) => true,
        (scheme, format) => scheme == format.scheme(0),
    }
}

/// FP8 tensors, one after the other, with their scales spread over rows.
fn fp8_stack(spec: &TensorSpec, raws: &[RawTensor<'_>]) -> Result<QuantizedMatrix, String> {
    let dims = stack_dims(spec);
    let column_blocks = |raw: &RawTensor<'_>| match &raw.scale {
        Some(scale) if scale.shape[2] > 1 => scale.block.1,
        _ => dims.columns.max(1),
    };
    let block = raws.first().map_or(1, column_blocks);
    if raws.iter().any(|raw| column_blocks(raw) != block) {
        return Err("its experts differ in the blocks of their scales".into());
    }
    let mut codes = Vec::with_capacity(dims.elements());
    let mut scales = Vec::new();
    for raw in raws {
        codes.extend_from_slice(raw.bytes);
        let scale = raw.scale.as_ref().ok_or("stored as F8_E4M3 without a scale")?;
        let rows = raw.shape[raw.shape.len() - 2];
        let matrices = if raw.shape.len() == 3 { raw.shape[0] } else { 1 };
        for matrix in 0..matrices {
            for row in 0..rows {
                scales.extend_from_slice(scale.row(matrix, row));
            }
        }
    }
    QuantizedMatrix::from_codes(dims, Scheme::Fp8 { block }, &codes, Scales::F32(scales), Vec::new())
        .map_err(|error| error.to_string())
}
