//! Reading some of a parameter's values without touching the files' other bytes.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::checkpoint::{Checkpoint, Found};
use super::decode::{self, Element};
use super::dtype::DType;
use super::host::{HostData, HostTensor};
use super::native_names;
use crate::error::Result;

impl Checkpoint {
    /// Reads the values `range` of a parameter, counted in the order of its elements, as [`Checkpoint::read`] gives them.
    ///
    /// # Shapes
    /// - output: `[range.len()]`
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    ///
    /// # Panics
    /// When the range goes beyond the parameter.
    pub fn read_part(&self, canonical: &str, range: Range<usize>, dtype: DType) -> Result<HostTensor> {
        let shape = vec![range.len()];
        let data = match dtype {
            DType::F32 => HostData::F32(self.part_as(canonical, range)?),
            DType::BF16 => HostData::BF16(self.part_as(canonical, range)?),
            DType::F16 => HostData::F16(self.part_as(canonical, range)?),
        };
        Ok(HostTensor { shape, data })
    }

    fn part_as<T: Element>(&self, canonical: &str, range: Range<usize>) -> Result<Vec<T>> {
        let found = self.find(canonical).filter(Found::has_weight);
        let is_permuted = self.is_native() && native_names::is_permuted(canonical);
        let Some(found) = found.filter(|_| !is_permuted) else {
            // Rows of the tower are few, and lie elsewhere than they are stored.
            return Ok(self.read_as(canonical)?.1[range].to_vec());
        };
        let mut values = vec![T::default(); range.len()];
        let mut start = 0;
        for slot in found.slots() {
            let raw = self.raw(canonical, slot)?;
            let end = start + raw.shape.iter().product::<usize>();
            let (from, to) = (range.start.clamp(start, end), range.end.clamp(start, end));
            if from < to {
                let part = &mut values[from - range.start..to - range.start];
                decode::decode_part(&raw, from - start..to - start, part);
                let bytes = part.len() * raw.dtype.size();
                self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            start = end;
        }
        assert!(range.end <= start, "{canonical} has {start} values, {range:?} were asked for");
        Ok(values)
    }
}
