//! From stored bytes to numbers in memory, dequantising FP8 on the way.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::dtype::StoredDType;
use super::fp8;

/// A tensor as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor<'a> {
    /// Stored format.
    pub dtype: StoredDType,
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// The values, little-endian, row-major.
    pub bytes: &'a [u8],
    /// Scale of FP8 values; `None` for other formats.
    pub scale: Option<Scale>,
}

/// Scales of an FP8 tensor: value = f32(fp8) * scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// Scales, `[experts, row_blocks, column_blocks]`, where a size of 1 is shared along the axis.
    pub values: Vec<f32>,
    /// Sizes of the three axes.
    pub shape: [usize; 3],
    /// Rows and columns of a block.
    pub block: (usize, usize),
}

impl Scale {
    /// Arranges stored scales along a weight's axes.
    ///
    /// # Shapes
    /// `weight`: `[out, in]` or `[E, out, in]`; `scale`: `[]` or `[1]` (one for all), `[E]` or `[E, 1, 1]` (one an expert),
    /// `[out_blocks, in_blocks]` or `[E, out_blocks, in_blocks]`.
    ///
    /// # Errors
    /// When the shapes fit none of these; the text says which would.
    pub(crate) fn arrange(
        values: Vec<f32>,
        shape: &[usize],
        weight: &[usize],
        block: (usize, usize),
    ) -> Result<Scale, String> {
        let (experts, rows, columns) = match *weight {
            [rows, columns] => (1, rows, columns),
            [experts, rows, columns] => (experts, rows, columns),
            _ => return Err(format!("an FP8 weight of shape {weight:?} has neither 2 nor 3 axes")),
        };
        let blocks = [rows.div_ceil(block.0), columns.div_ceil(block.1)];
        let arranged = if values.len() == 1 {
            Some([1, 1, 1])
        } else {
            match *shape {
                [count] | [count, 1, 1] if weight.len() == 3 && count == experts => Some([experts, 1, 1]),
                [a, b] if weight.len() == 2 && [a, b] == blocks => Some([1, a, b]),
                [e, a, b] if e == experts && [a, b] == blocks => Some([e, a, b]),
                _ => None,
            }
        };
        let Some(shape) = arranged else {
            return Err(format!(
                "its scale has shape {shape:?}; a weight of {weight:?} takes one value, one an expert, \
                 or {blocks:?} blocks of {}x{}",
                block.0, block.1
            ));
        };
        if let Some(bad) = values.iter().find(|scale| !scale.is_finite()) {
            return Err(format!("its scale holds {bad}"));
        }
        // One scale for everything needs no block size; a block as large as the weight says the same.
        let block = if shape[1] == 1 && shape[2] == 1 { (rows.max(1), columns.max(1)) } else { block };
        Ok(Scale { values, shape, block })
    }

    /// The scales of a row: one for each block of columns.
    pub(crate) fn row(&self, expert: usize, row: usize) -> &[f32] {
        let [experts, row_blocks, column_blocks] = self.shape;
        let expert = if experts == 1 { 0 } else { expert };
        let row_block = if row_blocks == 1 { 0 } else { row / self.block.0 };
        let start = (expert * row_blocks + row_block) * column_blocks;
        &self.values[start..start + column_blocks]
    }
}

/// A number format in memory.
pub(crate) trait Element: Copy + Default + Send + Sync {
    /// The same format in a file.
    const STORED: StoredDType;

    /// Rounds once to nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// The value of its own bytes.
    fn from_stored(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($type:ty, $stored:expr, $from_f32:expr) => {
        impl Element for $type {
            const STORED: StoredDType = $stored;

            fn from_f32(value: f32) -> Self {
                $from_f32(value)
            }

            fn from_stored(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$type>()];
                own.copy_from_slice(bytes);
                <$type>::from_le_bytes(own)
            }
        }
    };
}

element!(f32, StoredDType::F32, |value| value);
element!(bf16, StoredDType::BF16, bf16::from_f32);
element!(f16, StoredDType::F16, f16::from_f32);

/// Whether [`decode`] reads this format.
pub(crate) fn is_float(dtype: StoredDType) -> bool {
    matches!(
        dtype,
        StoredDType::F32 | StoredDType::BF16 | StoredDType::F16 | StoredDType::F64 | StoredDType::F8E4M3
    )
}

/// Fills `values` with a tensor's numbers, in parallel.
///
/// # Panics
/// When the format is not a float, or the lengths differ: the caller has checked both.
pub(crate) fn decode<T: Element>(raw: &RawTensor<'_>, values: &mut [T]) {
    assert_eq!(values.len() * raw.dtype.size(), raw.bytes.len());
    match raw.dtype {
        dtype if dtype == T::STORED => convert(raw, values, T::from_stored),
        StoredDType::F32 => convert(raw, values, |bytes| T::from_f32(f32::from_stored(bytes))),
        StoredDType::BF16 => convert(raw, values, |bytes| T::from_f32(bf16::from_stored(bytes).to_f32())),
        StoredDType::F16 => convert(raw, values, |bytes| T::from_f32(f16::from_stored(bytes).to_f32())),
        StoredDType::F64 => convert(raw, values, |bytes| {
            let mut own = [0; 8];
            own.copy_from_slice(bytes);
            T::from_f32(f64::from_le_bytes(own) as f32)
        }),
        StoredDType::F8E4M3 => match &raw.scale {
            None => convert(raw, values, |bytes| T::from_f32(fp8::DECODE[bytes[0] as usize])),
            Some(scale) => dequantise(raw, scale, values),
        },
        other => unreachable!("{other} is not a float"),
    }
}

/// Fills `values` with the numbers `range` of a tensor, in the order of its elements.
///
/// # Panics
/// As [`decode`].
pub(crate) fn decode_part<T: Element>(raw: &RawTensor<'_>, range: Range<usize>, values: &mut [T]) {
    let size = raw.dtype.size();
    let bytes = &raw.bytes[range.start * size..range.end * size];
    let Some(scale) = &raw.scale else {
        let part = RawTensor { dtype: raw.dtype, shape: vec![range.len()], bytes, scale: None };
        return decode(&part, values);
    };
    assert_eq!(values.len(), bytes.len());
    let columns = raw.shape[raw.shape.len() - 1];
    let rows = raw.shape[raw.shape.len() - 2];
    let one = |(offset, (value, &code)): (usize, (&mut T, &u8))| {
        let at = range.start + offset;
        let (row, column) = (at / columns, at % columns);
        let scale = scale.row(row / rows, row % rows)[column / scale.block.1];
        *value = T::from_f32(fp8::DECODE[code as usize] * scale);
    };
    values.par_iter_mut().zip(bytes).enumerate().with_min_len(1 << 12).for_each(one);
}

fn convert<T: Element>(raw: &RawTensor<'_>, values: &mut [T], one: impl Fn(&[u8]) -> T + Sync) {
    const VALUES: usize = 1 << 16;
    let size = raw.dtype.size();
    values.par_chunks_mut(VALUES).zip(raw.bytes.par_chunks(VALUES * size)).for_each(|(values, bytes)| {
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(size)) {
            *value = one(bytes);
        }
    });
}

fn dequantise<T: Element>(raw: &RawTensor<'_>, scale: &Scale, values: &mut [T]) {
    if values.is_empty() {
        return;
    }
    if scale.shape[1..] == [1, 1] {
        // Few scales for many values: a table of the 256 products is faster than computing each.
        const VALUES: usize = 1 << 16;
        let run = values.len() / scale.values.len();
        for ((values, codes), &scale) in values.chunks_mut(run).zip(raw.bytes.chunks(run)).zip(&scale.values)
        {
            let table = fp8::DECODE.map(|value| T::from_f32(value * scale));
            values.par_chunks_mut(VALUES).zip(codes.par_chunks(VALUES)).for_each(|(values, codes)| {
                for (value, &code) in values.iter_mut().zip(codes) {
                    *value = table[code as usize];
                }
            });
        }
        return;
    }
    let columns = raw.shape[raw.shape.len() - 1];
    let rows = raw.shape[raw.shape.len() - 2];
    values.par_chunks_mut(columns).zip(raw.bytes.par_chunks(columns)).with_min_len(16).enumerate().for_each(
        |(index, (values, codes))| {
            let scales = scale.row(index / rows, index % rows);
            let blocks = values.chunks_mut(scale.block.1).zip(codes.chunks(scale.block.1));
            for ((values, codes), &scale) in blocks.zip(scales) {
                for (value, &code) in values.iter_mut().zip(codes) {
                    *value = T::from_f32(fp8::DECODE[code as usize] * scale);
                }
            }
        },
    );
}

/// Stored scales as f32; `None` when they are no floats.
pub(crate) fn scale_values(dtype: StoredDType, shape: &[usize], bytes: &[u8]) -> Option<Vec<f32>> {
    if !is_float(dtype) || dtype == StoredDType::F8E4M3 {
        return None;
    }
    let mut values = vec![0.0; shape.iter().product()];
    decode(&RawTensor { dtype, shape: shape.to_vec(), bytes, scale: None }, &mut values);
    Some(values)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;

    fn numbers<T: Element>(tensors: &SafeTensors<'_>, key: &str) -> Vec<T> {
        tensors.tensor(key).unwrap().data().chunks(size_of::<T>()).map(T::from_stored).collect()
    }

    fn dequantised<T: Element>(raw: &RawTensor<'_>) -> Vec<T> {
        let mut values = vec![T::default(); raw.bytes.len()];
        decode(raw, &mut values);
        values
    }

    #[test]
    fn fp8_is_that_of_pytorch() {
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/checkpoint/fp8.safetensors");
        let bytes = std::fs::read(file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for (code, &value) in numbers::<f32>(&tensors, "codes.decoded").iter().enumerate() {
            assert!(
                fp8::DECODE[code] == value || value.is_nan() && fp8::DECODE[code].is_nan(),
                "code {code}"
            );
        }
        let codes = tensors.tensor("values.encoded").unwrap().data();
        for (&value, &code) in numbers::<f32>(&tensors, "values").iter().zip(codes) {
            assert_eq!(fp8::encode(value), code, "{value}");
        }
        let weight = tensors.tensor("weight").unwrap();
        let scale = tensors.tensor("weight_scale_inv").unwrap();
        let values = scale_values(StoredDType::F32, scale.shape(), scale.data()).unwrap();
        let scale = Scale::arrange(values, scale.shape(), weight.shape(), (128, 128)).unwrap();
        let raw = RawTensor {
            dtype: StoredDType::F8E4M3,
            shape: weight.shape().to_vec(),
            bytes: weight.data(),
            scale: Some(scale),
        };
        assert_eq!(dequantised::<f32>(&raw), numbers::<f32>(&tensors, "weight.f32"));
        assert_eq!(dequantised::<bf16>(&raw), numbers::<bf16>(&tensors, "weight.bf16"));
        assert_eq!(dequantised::<f16>(&raw), numbers::<f16>(&tensors, "weight.f16"));
    }

    #[test]
    fn scales_of_every_shape_are_arranged() {
        let arrange = |count: usize, shape: &[usize], weight: &[usize]| {
            Scale::arrange(vec![1.0; count], shape, weight, (128, 128)).map(|scale| scale.shape)
        };
        assert_eq!(arrange(1, &[], &[300, 200]), Ok([1, 1, 1]));
        assert_eq!(arrange(1, &[1], &[4, 300, 200]), Ok([1, 1, 1]));
        assert_eq!(arrange(4, &[4], &[4, 300, 200]), Ok([4, 1, 1]));
        assert_eq!(arrange(4, &[4, 1, 1], &[4, 300, 200]), Ok([4, 1, 1]));
        assert_eq!(arrange(6, &[3, 2], &[300, 200]), Ok([1, 3, 2]));
        assert_eq!(arrange(24, &[4, 3, 2], &[4, 300, 200]), Ok([4, 3, 2]));
        assert!(arrange(6, &[2, 3], &[300, 200]).is_err());
        assert!(arrange(300, &[300], &[300, 200]).is_err());
        assert!(arrange(2, &[2], &[300]).is_err());
        assert!(Scale::arrange(vec![f32::NAN], &[], &[2, 2], (1, 1)).is_err());
    }
}
