//! Adapters added to the weights that they change.

use std::path::Path;

use rayon::prelude::*;

use super::initial::row_norms;
use super::{Adapter, LoraTensors};
use crate::error::Result;
use crate::weights::names::TensorKind;
use crate::weights::{self, Checkpoint, DType, HostTensor, SaveDType, SaveOptions, SaveReport};

/// Writes a checkpoint with an adapter merged into it, one tensor in memory at a time.
///
/// # Errors
/// When the checkpoint's tensors are not those of its model, or as [`weights::save`].
pub fn merge(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    options: &SaveOptions<'_>,
) -> Result<SaveReport> {
    checkpoint.check(&checkpoint.tensors())?;
    let options = SaveOptions { carry_from: options.carry_from.or(Some(checkpoint.folder())), ..*options };
    let float = match options.dtype {
        SaveDType::Float(dtype) => dtype,
        // Quantised from full precision.
        SaveDType::Fp8 | SaveDType::Packed(_) => DType::F32,
    };
    weights::save(folder, checkpoint.config_file(), &options, |spec| {
        let module = spec.key.strip_suffix(".weight").unwrap_or(&spec.key);
        let base = |dtype| match adapter.replaced.get(&spec.key) {
            Some(replaced) => Ok(replaced.clone().cast(dtype)),
            None => checkpoint.read(&spec.key, dtype),
        };
        match adapter.modules.get(module) {
            Some(lora) => Ok(merged_tensor(base(DType::F32)?, lora).cast(float)),
            None if spec.kind == TensorKind::GateBias => base(DType::F32),
            None => base(float),
        }
    })
}

/// A weight with its adapter, in f32: `W + scale * B A`, with DoRA each row brought to its magnitude.
pub fn merged_tensor(weight: HostTensor, lora: &LoraTensors) -> HostTensor {
    let shape = weight.shape.clone();
    let (outputs, inputs, rank) = (shape[shape.len() - 2], shape[shape.len() - 1], lora.rank());
    let (a, b) = (lora.a.clone().into_f32(), lora.b.clone().into_f32());
    let mut values = weight.into_f32();
    values.par_chunks_mut(inputs.max(1)).enumerate().for_each(|(row, values)| {
        let expert = row / outputs;
        for (r, factor) in b[row * rank..(row + 1) * rank].iter().enumerate() {
            let factor = (f64::from(*factor) * lora.scale) as f32;
            let a = &a[(expert * rank + r) * inputs..][..inputs];
            values.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
        }
    });
    let merged = HostTensor::f32(shape.clone(), values);
    let Some(magnitude) = &lora.magnitude else { return merged };
    let norms = row_norms(merged.clone()).into_f32();
    let mut values = merged.into_f32();
    let magnitudes = magnitude.clone().into_f32();
    for ((row, norm), magnitude) in values.chunks_mut(inputs.max(1)).zip(norms).zip(magnitudes) {
        row.iter_mut().for_each(|value| *value *= magnitude / norm);
    }
    HostTensor::f32(shape, values)
}
