//! Tensors in memory.

use half::{bf16, f16};
use rayon::prelude::*;

use super::dtype::DType;

/// A tensor in memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// The values.
    pub data: HostData,
}

/// Values of a tensor in memory.
#[derive(Debug, Clone, PartialEq)]
pub enum HostData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// bfloat16.
    BF16(Vec<bf16>),
    /// 16-bit floats.
    F16(Vec<f16>),
}

impl HostTensor {
    /// A tensor of f32 values.
    ///
    /// # Panics
    /// When the number of values is not that of the shape.
    pub fn f32(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            values.len(),
            "shape {shape:?} holds another number of values"
        );
        HostTensor { shape, data: HostData::F32(values) }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match &self.data {
            HostData::F32(values) => values.len(),
            HostData::BF16(values) => values.len(),
            HostData::F16(values) => values.len(),
        }
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Format of the values.
    pub fn dtype(&self) -> DType {
        match &self.data {
            HostData::F32(_) => DType::F32,
            HostData::BF16(_) => DType::BF16,
            HostData::F16(_) => DType::F16,
        }
    }

    /// The values as f32.
    pub fn into_f32(self) -> Vec<f32> {
        match self.data {
            HostData::F32(values) => values,
            HostData::BF16(values) => values.par_iter().map(|value| value.to_f32()).collect(),
            HostData::F16(values) => values.par_iter().map(|value| value.to_f32()).collect(),
        }
    }

    /// The same values in another format, rounded once to nearest, ties to even.
    pub fn cast(self, dtype: DType) -> HostTensor {
        if self.dtype() == dtype {
            return self;
        }
        let shape = self.shape.clone();
        let values = self.into_f32();
        let data = match dtype {
            DType::F32 => HostData::F32(values),
            DType::BF16 => HostData::BF16(values.par_iter().map(|&value| bf16::from_f32(value)).collect()),
            DType::F16 => HostData::F16(values.par_iter().map(|&value| f16::from_f32(value)).collect()),
        };
        HostTensor { shape, data }
    }

    /// The values as a file holds them.
    pub(crate) fn to_le_bytes(&self) -> Vec<u8> {
        fn bytes<T: Copy + Sync, const N: usize>(values: &[T], to: impl Fn(T) -> [u8; N] + Sync) -> Vec<u8> {
            const VALUES: usize = 1 << 16;
            let mut bytes = vec![0; values.len() * N];
            bytes.par_chunks_mut(VALUES * N).zip(values.par_chunks(VALUES)).for_each(|(bytes, values)| {
                for (slot, &value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
                    *slot = to(value);
                }
            });
            bytes
        }
        match &self.data {
            HostData::F32(values) => bytes(values, f32::to_le_bytes),
            HostData::BF16(values) => bytes(values, bf16::to_le_bytes),
            HostData::F16(values) => bytes(values, f16::to_le_bytes),
        }
    }
}
