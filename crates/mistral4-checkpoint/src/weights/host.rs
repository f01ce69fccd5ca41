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
    /// The values `range`, flat.
    #[must_use]
    pub fn part(self, range: std::ops::Range<usize>) -> Self {
        let shape = vec![range.len()];
        let data = match self.data {
            HostData::F32(values) => HostData::F32(values[range].to_vec()),
            HostData::BF16(values) => HostData::BF16(values[range].to_vec()),
            HostData::F16(values) => HostData::F16(values[range].to_vec()),
        };
        Self { shape, data }
    }

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
        self.data.len()
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
}

impl HostData {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            HostData::F32(values) => values.len(),
            HostData::BF16(values) => values.len(),
            HostData::F16(values) => values.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts values behind these; false, and nothing is done, where they have another format.
    pub(crate) fn append(&mut self, more: HostData) -> bool {
        match (self, more) {
            (HostData::F32(values), HostData::F32(more)) => values.extend(more),
            (HostData::BF16(values), HostData::BF16(more)) => values.extend(more),
            (HostData::F16(values), HostData::F16(more)) => values.extend(more),
            _ => return false,
        }
        true
    }

    /// One value as f32.
    pub(crate) fn get(&self, index: usize) -> f32 {
        match self {
            HostData::F32(values) => values[index],
            HostData::BF16(values) => values[index].to_f32(),
            HostData::F16(values) => values[index].to_f32(),
        }
    }

    /// The values in another order of rows.
    pub(crate) fn gather_rows(&self, columns: usize, rows: impl Iterator<Item = usize>) -> HostData {
        fn gather<T: Copy>(values: &[T], columns: usize, rows: impl Iterator<Item = usize>) -> Vec<T> {
            rows.flat_map(|row| values[row * columns..(row + 1) * columns].iter().copied()).collect()
        }
        match self {
            HostData::F32(values) => HostData::F32(gather(values, columns, rows)),
            HostData::BF16(values) => HostData::BF16(gather(values, columns, rows)),
            HostData::F16(values) => HostData::F16(gather(values, columns, rows)),
        }
    }
}
