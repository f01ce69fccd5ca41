//! Integer codes packed into 32-bit words, as the compressed-tensors library stores them (`pack-quantized`).
//!
//! A weight `X.weight` of `[out, in]` is stored as `X.weight_packed` I32 `[out, ceil(in * bits / 32)]` (codes without a
//! sign, the first in the lowest bits), `X.weight_scale` `[out, groups]`, `X.weight_shape` I64 `[2]` and, if asymmetric,
//! `X.weight_zero_point` I32 `[ceil(out * bits / 32), groups]`, packed along its first axis.

use half::{bf16, f16};
use mistral4_kernels::{Bits, QuantizedMatrix, Scales, Scheme, StackDims};
use rayon::prelude::*;

use super::decode::Element;
use super::dtype::StoredDType;
use super::sources::{Place, Slot, Sources};

/// Group sizes that are read, smallest first.
const GROUP_SIZES: [usize; 4] = [32, 64, 128, 256];

/// End of the key of packed codes.
pub(crate) const PACKED: &str = "_packed";

/// A matrix as it is stored.
#[derive(Debug)]
pub(crate) struct Packed<'a> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    bits: Bits,
    group_size: usize,
    /// `[rows, words]`
    words: &'a [u8],
    scales: Scales,
    /// `[rows, groups]`, if asymmetric.
    zeros: Vec<u8>,
}

/// Whether a slot holds packed codes.
pub(crate) fn is_packed(slot: &Slot) -> bool {
    slot.weight.as_ref().is_some_and(|place| place.key.ends_with(PACKED))
}

/// The shape of the weight that a slot's codes stand for.
///
/// # Errors
/// When it is not stored as two whole numbers.
pub(crate) fn shape(sources: &Sources, slot: &Slot) -> Result<[usize; 2], String> {
    let place = slot.shape.as_ref().ok_or("packed codes without a weight_shape")?;
    let entry = sources.entry(place);
    let bytes = sources.bytes(place);
    let number = |bytes: &[u8]| match *bytes {
        [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
        _ => bytes.try_into().map_or(-1, i64::from_le_bytes),
    };
    let sizes: Vec<i64> = match entry.dtype {
        StoredDType::I64 | StoredDType::I32 => bytes.chunks(entry.dtype.size()).map(number).collect(),
        other => return Err(format!("its weight_shape is stored as {other}")),
    };
    match sizes.as_slice() {
        &[rows, columns] if rows >= 0 && columns > 0 => Ok([rows as usize, columns as usize]),
        sizes => Err(format!("its weight_shape is {sizes:?}, a matrix has two sizes")),
    }
}

impl<'a> Packed<'a> {
    /// Checks a slot's parts; scales and zero points are read, codes are not.
    ///
    /// # Errors
    /// Parts that are missing or do not fit together, as a text that follows the tensor's name.
    pub(crate) fn open(sources: &'a Sources, slot: &Slot) -> Result<Packed<'a>, String> {
        let place = slot.weight.as_ref().ok_or("scales without codes")?;
        let [rows, columns] = shape(sources, slot)?;
        let codes = expect(sources, place, &[StoredDType::I32])?;
        let scale = slot.scale.as_ref().ok_or("packed codes without a weight_scale")?;
        let floats = [StoredDType::BF16, StoredDType::F16, StoredDType::F32];
        let groups = match *expect(sources, scale, &floats)? {
            [scale_rows, groups] if scale_rows == rows => groups,
            ref other => return Err(format!("its weight_scale has shape {other:?}, not [{rows}, groups]")),
        };
        let words = |bits: Bits| (columns * bits.count()).div_ceil(32);
        let bits = [Bits::Four, Bits::Eight].into_iter().find(|bits| codes == [rows, words(*bits)]);
        let Some(bits) = bits else {
            return Err(format!("codes of shape {codes:?} are neither 4 nor 8 bits of [{rows}, {columns}]"));
        };
        let group_size = GROUP_SIZES.into_iter().find(|size| columns.div_ceil(*size) == groups);
        let Some(group_size) = group_size else {
            return Err(format!(
                "{groups} scales for {columns} columns are no groups of 32, 64, 128 or 256 columns"
            ));
        };
        let zeros = match &slot.zero {
            None => Vec::new(),
            Some(place) => zero_points(sources, place, [rows, groups], bits)?,
        };
        let bytes = sources.bytes(scale);
        let scales = match sources.entry(scale).dtype {
            StoredDType::BF16 => Scales::Bf16(bytes.chunks(2).map(bf16::from_stored).collect()),
            StoredDType::F16 => Scales::F32(bytes.chunks(2).map(|b| f16::from_stored(b).to_f32()).collect()),
            _ => Scales::F32(bytes.chunks(4).map(f32::from_stored).collect()),
        };
        let is_bad = |i: &usize| match &scales {
            Scales::Bf16(scales) => !scales[*i].is_finite(),
            Scales::F32(scales) => !scales[*i].is_finite(),
        };
        if (0..scales.len()).any(|i| is_bad(&i)) {
            return Err("its weight_scale holds a value that is not finite".into());
        }
        Ok(Packed { rows, columns, bits, group_size, words: sources.bytes(place), scales, zeros })
    }

    /// How the codes are to be read.
    pub(crate) fn scheme(&self) -> Scheme {
        Scheme::Int { bits: self.bits, group_size: self.group_size, symmetric: self.zeros.is_empty() }
    }

    /// The codes of all rows, one a byte.
    fn codes(&self) -> Vec<u8> {
        let mut codes = vec![0; self.rows * self.columns];
        let width = (self.columns * self.bits.count()).div_ceil(32) * 4;
        codes.par_chunks_mut(self.columns).zip(self.words.par_chunks(width)).for_each(|(codes, words)| {
            match self.bits {
                Bits::Eight => codes.copy_from_slice(&words[..codes.len()]),
                Bits::Four => {
                    for (pair, byte) in codes.chunks_mut(2).zip(words) {
                        pair[0] = byte & 15;
                        if let Some(second) = pair.get_mut(1) {
                            *second = byte >> 4;
                        }
                    }
                }
            }
        });
        codes
    }

    /// The values, rounded once.
    pub(crate) fn decode<T: Element>(&self, values: &mut [T]) {
        let groups = self.columns.div_ceil(self.group_size);
        let codes = self.codes();
        let rows = values.par_chunks_mut(self.columns).zip(codes.par_chunks(self.columns));
        rows.enumerate().for_each(|(row, (values, codes))| {
            let parts = values.chunks_mut(self.group_size).zip(codes.chunks(self.group_size));
            for (group, (values, codes)) in parts.enumerate() {
                let at = row * groups + group;
                let zero = self.zeros.get(at).copied().unwrap_or(self.bits.middle());
                let scale = match &self.scales {
                    Scales::Bf16(scales) => scales[at].to_f32(),
                    Scales::F32(scales) => scales[at],
                };
                for (value, code) in values.iter_mut().zip(codes) {
                    *value = T::from_f32(scale * (i32::from(*code) - i32::from(zero)) as f32);
                }
            }
        });
    }
}

/// Puts matrices of one shape together.
///
/// # Errors
/// When they differ in how they are coded.
pub(crate) fn stack(parts: Vec<Packed<'_>>) -> Result<QuantizedMatrix, String> {
    let Some(first) = parts.first() else { return Err("there is no matrix".into()) };
    let (scheme, rows, columns) = (first.scheme(), first.rows, first.columns);
    let dims = StackDims { matrices: parts.len(), rows, columns };
    if parts.iter().any(|part| (part.scheme(), part.rows, part.columns) != (scheme, rows, columns)) {
        return Err("its experts differ in shape, bits, group size or symmetry".into());
    }
    let (mut codes, mut zeros) = (Vec::with_capacity(dims.elements()), Vec::new());
    let mut scales = match &first.scales {
        Scales::Bf16(_) => Scales::Bf16(Vec::new()),
        Scales::F32(_) => Scales::F32(Vec::new()),
    };
    for part in parts {
        codes.extend(part.codes());
        zeros.extend(part.zeros);
        match (&mut scales, part.scales) {
            (Scales::Bf16(all), Scales::Bf16(own)) => all.extend(own),
            (Scales::F32(all), Scales::F32(own)) => all.extend(own),
            _ => return Err("its experts differ in the format of their scales".into()),
        }
    }
    QuantizedMatrix::from_codes(dims, scheme, &codes, scales, zeros).map_err(|error| error.to_string())
}

/// The shape of a tensor that must have one of these formats.
fn expect<'a>(sources: &'a Sources, place: &Place, accepted: &[StoredDType]) -> Result<&'a [usize], String> {
    let entry = sources.entry(place);
    if accepted.contains(&entry.dtype) {
        Ok(&entry.shape)
    } else {
        Err(format!("`{}` is stored as {}, which is not read", place.key, entry.dtype))
    }
}

/// Zero points, `[rows, groups]`.
fn zero_points(
    sources: &Sources,
    place: &Place,
    [rows, groups]: [usize; 2],
    bits: Bits,
) -> Result<Vec<u8>, String> {
    let shape = expect(sources, place, &[StoredDType::I32])?;
    let per_word = 32 / bits.count();
    if shape != [rows.div_ceil(per_word), groups] {
        return Err(format!("its weight_zero_point has shape {shape:?}, not [rows / {per_word}, {groups}]"));
    }
    let bytes = sources.bytes(place);
    let zero = |i: usize| {
        let (row, group) = (i / groups, i % groups);
        let word = &bytes[(row / per_word * groups + group) * 4..][..4];
        let bit = row % per_word * bits.count();
        (word[bit / 8] >> (bit % 8)) & bits.largest()
    };
    Ok((0..rows * groups).map(zero).collect())
}

/// Codes of a matrix of a stack, packed along rows: `[rows, words]`.
pub(crate) fn pack_codes(stack: &QuantizedMatrix, matrix: usize, bits: Bits) -> Vec<u8> {
    let StackDims { rows, columns, .. } = stack.dims();
    let width = (columns * bits.count()).div_ceil(32) * 4;
    let mut bytes = vec![0; rows * width];
    bytes.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, bytes)| {
        for column in 0..columns {
            let bit = column * bits.count();
            bytes[bit / 8] |= stack.code(matrix, row, column) << (bit % 8);
        }
    });
    bytes
}

/// Zero points of a matrix of a stack, packed along its rows: `[words, groups]`.
pub(crate) fn pack_zeros(stack: &QuantizedMatrix, matrix: usize, bits: Bits) -> Vec<u8> {
    let (rows, groups) = (stack.dims().rows, stack.groups());
    let per_word = 32 / bits.count();
    let mut bytes = vec![0; rows.div_ceil(per_word) * groups * 4];
    for row in 0..rows {
        for group in 0..groups {
            let bit = row % per_word * bits.count();
            let at = (row / per_word * groups + group) * 4 + bit / 8;
            bytes[at] |= stack.zero(matrix, row, group) << (bit % 8);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the compressed-tensors library packs is read as it reads it, and packed again to the same bytes.
    #[test]
    fn packed_weights_are_those_of_compressed_tensors() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/golden/checkpoint/packed.safetensors");
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(file, folder.path().join("model.safetensors")).unwrap();
        let sources = Sources::open(folder.path()).unwrap();
        let weights: Vec<_> = sources.whole.iter().filter(|(_, slot)| is_packed(slot)).collect();
        assert_eq!(weights.len(), 8);
        for (key, slot) in weights {
            let packed = Packed::open(&sources, slot).unwrap();
            let mut values = vec![bf16::ZERO; packed.rows * packed.columns];
            packed.decode(&mut values);
            let expected = &sources.whole[&key.replace(".weight", ".expected")];
            let expected = sources.bytes(expected.weight.as_ref().unwrap());
            // The library multiplies in bf16, where this one rounds the exact product: the same.
            assert_eq!(values, expected.chunks(2).map(bf16::from_stored).collect::<Vec<_>>(), "{key}");

            let (bits, asymmetric) = (packed.bits, !packed.zeros.is_empty());
            assert_eq!(asymmetric, key.contains("asymmetric"));
            let stack = stack(vec![packed]).unwrap();
            assert_eq!(pack_codes(&stack, 0, bits), sources.bytes(slot.weight.as_ref().unwrap()), "{key}");
            if let Some(zero) = &slot.zero {
                assert_eq!(pack_zeros(&stack, 0, bits), sources.bytes(zero), "{key}");
            }
            let mut dense = vec![bf16::ZERO; values.len()];
            stack.dequantize(0, &mut dense);
            assert_eq!(dense, values, "{key}");
        }
    }
}
