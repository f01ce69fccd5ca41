//! From numbers in memory to stored bytes, quantising to FP8 on the way.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use mistral4_kernels::QuantizedMatrix;
use rayon::prelude::*;

use super::dtype::DType;
use super::fp8;
use super::host::HostData;
use super::layout::{Encoding, Part};
use super::packed::{pack_codes, pack_zeros};
use super::writer::ShardWriter;
use crate::error::{Error, Result};

/// Values converted before they are written, so that no second copy of a tensor is held.
const CHUNK: usize = 1 << 22;

/// A parameter's values on their way to a file.
#[derive(Debug)]
pub(crate) enum Payload<'a> {
    /// Numbers.
    Host(HostData),
    /// FP8 codes with one scale for each equal run of them, copied as they are.
    Fp8 { codes: Cow<'a, [u8]>, scales: Vec<f32> },
    /// Codes for packed parts.
    Quantized(QuantizedMatrix),
}

/// Writes one part of a parameter.
pub(crate) fn write_part(shard: &mut ShardWriter, part: &Part, payload: &Payload<'_>) -> Result<()> {
    match (&part.encoding, payload) {
        (Encoding::Float(dtype), Payload::Host(data)) => {
            let mut writer = shard.tensor(&part.key)?;
            for range in chunks(part.values.clone()) {
                writer.write(&float_bytes(data, range, *dtype))?;
            }
            Ok(())
        }
        (Encoding::Fp8 { scale_key, scale_shape }, payload) => {
            let groups = scale_shape.iter().product::<usize>().max(1);
            let scales = match payload {
                Payload::Host(data) => write_quantised(shard, part, data, groups)?,
                Payload::Fp8 { codes, scales } => {
                    shard.tensor(&part.key)?.write(&codes[part.values.clone()])?;
                    let per_scale = codes.len() / scales.len();
                    let step = part.values.len() / groups;
                    (0..groups).map(|group| scales[(part.values.start + group * step) / per_scale]).collect()
                }
                Payload::Quantized(_) => unreachable!("integer codes are only made for packed parts"),
            };
            let bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
            shard.tensor(scale_key)?.write(&bytes)
        }
        (Encoding::Packed { matrix, bits, symmetric, .. }, Payload::Quantized(stack)) => {
            let key = &part.key;
            shard.tensor(&format!("{key}_packed"))?.write(&pack_codes(stack, *matrix, *bits))?;
            let groups = stack.groups();
            let scales = (0..part.shape[0] * groups)
                .flat_map(|i| bf16::from_f32(stack.scale(*matrix, i / groups, i % groups)).to_le_bytes());
            shard.tensor(&format!("{key}_scale"))?.write(&scales.collect::<Vec<u8>>())?;
            let shape: Vec<u8> = part.shape.iter().flat_map(|size| (*size as i64).to_le_bytes()).collect();
            shard.tensor(&format!("{key}_shape"))?.write(&shape)?;
            if !symmetric {
                let zeros = pack_zeros(stack, *matrix, *bits);
                shard.tensor(&format!("{key}_zero_point"))?.write(&zeros)?;
            }
            Ok(())
        }
        (Encoding::Float(_) | Encoding::Packed { .. }, _) => {
            unreachable!("codes are only passed on to parts of their form")
        }
    }
}

fn write_quantised(shard: &mut ShardWriter, part: &Part, data: &HostData, groups: usize) -> Result<Vec<f32>> {
    let step = part.values.len() / groups;
    let mut scales = Vec::with_capacity(groups);
    for group in 0..groups {
        let start = part.values.start + group * step;
        let values = start..start + step;
        let scale = scale_of(data, values.clone()).ok_or_else(|| Error::Unrepresentable {
            key: part.key.clone(),
            format: "FP8",
            problem: "it holds values that are not finite".into(),
        })?;
        let mut writer = shard.tensor(&part.key)?;
        writer.skip((group * step) as u64)?;
        for range in chunks(values) {
            writer.write(&fp8_bytes(data, range, scale))?;
        }
        scales.push(scale);
    }
    Ok(scales)
}

/// The scale that maps the largest magnitude to FP8's; `None` when a value is not finite.
fn scale_of(data: &HostData, values: Range<usize>) -> Option<f32> {
    let largest = values
        .into_par_iter()
        .with_min_len(1 << 14)
        .map(|index| data.get(index).abs())
        // `max` would drop a NaN.
        .reduce(|| 0.0, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) });
    match largest {
        0.0 => Some(1.0),
        // The smallest magnitudes would give a scale that is zero or loses precision as a subnormal number.
        largest if largest.is_finite() => Some((largest / fp8::MAX).max(f32::MIN_POSITIVE)),
        _ => None,
    }
}

fn chunks(values: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = values.end;
    values.step_by(CHUNK).map(move |start| start..(start + CHUNK).min(end))
}

fn fp8_bytes(data: &HostData, values: Range<usize>, scale: f32) -> Vec<u8> {
    values.into_par_iter().with_min_len(1 << 14).map(|index| fp8::encode(data.get(index) / scale)).collect()
}

fn float_bytes(data: &HostData, values: Range<usize>, dtype: DType) -> Vec<u8> {
    let start = values.start;
    match dtype {
        DType::F32 => bytes(values.len(), |i| data.get(start + i).to_le_bytes()),
        DType::BF16 => match data {
            // No detour over f32, which would quieten a NaN.
            HostData::BF16(own) => bytes(values.len(), |i| own[start + i].to_le_bytes()),
            _ => bytes(values.len(), |i| bf16::from_f32(data.get(start + i)).to_le_bytes()),
        },
        DType::F16 => match data {
            HostData::F16(own) => bytes(values.len(), |i| own[start + i].to_le_bytes()),
            _ => bytes(values.len(), |i| f16::from_f32(data.get(start + i)).to_le_bytes()),
        },
    }
}

fn bytes<const N: usize>(count: usize, value: impl Fn(usize) -> [u8; N] + Sync) -> Vec<u8> {
    const VALUES: usize = 1 << 14;
    let mut bytes = vec![0; count * N];
    bytes.par_chunks_mut(VALUES * N).enumerate().for_each(|(chunk, bytes)| {
        for (index, slot) in bytes.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            *slot = value(chunk * VALUES + index);
        }
    });
    bytes
}
