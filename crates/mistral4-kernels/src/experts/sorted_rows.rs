//! Rows of floats in the order of experts.
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::convert;

/// One row for each sorted row; rows lie an odd number of cache lines apart, so that columns of neighbouring
/// rows do not compete for the same part of the cache.
pub(crate) struct SortedRows {
    pub(crate) data: Scratch<f32>,
    columns: usize,
    pub(crate) stride: usize,
}

impl SortedRows {
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        let stride = 16 * (columns.div_ceil(16) | 1);
        Self { data: scratch::take(rows * stride), columns, stride }
    }

    /// The rows of `[rows, columns]` values.
    pub(crate) fn widened<X: Element>(isa: Isa, values: &[X], columns: usize) -> Self {
        let mut out = Self::new(values.len().checked_div(columns).unwrap_or(0), columns);
        let (stride, shared) = (out.stride, Shared::new(&mut out.data));
        parallel::for_each_chunk(values.len() / columns.max(1), 16, |rows| {
            for row in rows {
                // SAFETY: each task owns its rows.
                let to = unsafe { shared.slice(row * stride..row * stride + columns) };
                convert(isa, &values[row * columns..][..columns], to);
            }
        });
        out
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..][..self.columns]
    }
}
