//! Matrix products with `f32` sums.
//!
//! Both operands are packed (see [`panel`]), the left one once, the right one panel by panel by the task that
//! uses it. Every output element is one sum along the inner axis in a fixed order, so results depend neither
//! on how rows and columns are cut nor on threads.
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod linear;
mod pack;
mod panel;
mod portable;

pub use linear::{LinearDims, linear, linear_backward_input, linear_backward_weight};
pub(crate) use pack::{pack_lanes, pack_rows};
pub(crate) use panel::{Bf16Pair, MR, NR, Panel, TileOut};

use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use std::ops::Range;

/// Sizes of `c[m, n] = a[m, k] b[k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmDims {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
}

/// A matrix view: element `(i, j)` is `data[i * row_stride + j * col_stride]`, and one stride is 1.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    /// The elements.
    pub data: &'a [T],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

/// A writable matrix view whose rows are contiguous: element `(i, j)` is `data[i * row_stride + j]`.
#[derive(Debug)]
pub struct MatrixMut<'a, T> {
    /// The elements.
    pub data: &'a mut [T],
    /// Distance between rows.
    pub row_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A row-major matrix of `cols` columns.
    pub fn rows(data: &'a [T], cols: usize) -> Self {
        Self { data, row_stride: cols, col_stride: 1 }
    }

    /// The transpose of a row-major matrix of `cols` columns.
    pub fn transposed(data: &'a [T], cols: usize) -> Self {
        Self { data, row_stride: 1, col_stride: cols }
    }

    fn check(&self, rows: usize, cols: usize) {
        assert!(self.row_stride == 1 || self.col_stride == 1, "one stride of a matrix must be 1");
        let last = rows.saturating_sub(1) * self.row_stride + cols.saturating_sub(1) * self.col_stride;
        assert!(
            rows * cols == 0 || last < self.data.len(),
            "a [{rows}, {cols}] matrix lies outside its slice"
        );
    }
}

impl<T: Element> Matrix<'_, T> {
    /// Packs a range of lanes, which lie `lane_stride` apart, along an axis of stride `depth_stride`.
    fn pack<P: Panel>(&self, lanes: Range<usize>, depth: usize, width: usize, by_row: bool, out: &mut [P]) {
        let (lane_stride, depth_stride) =
            if by_row { (self.row_stride, self.col_stride) } else { (self.col_stride, self.row_stride) };
        let base = &self.data[lanes.start * lane_stride..];
        if depth_stride == 1 {
            pack_lanes(depth, lanes.len(), width, |i| &base[i * lane_stride..], out);
        } else {
            pack_rows(depth, lanes.len(), width, |k| &base[k * depth_stride..], out);
        }
    }
}

/// Matrix product `c = a b`, or `c += a b` with `accumulate`.
///
/// Sums are `f32`; two bf16 operands are multiplied as bf16 pairs where the processor can, anything else in
/// `f32`.
///
/// # Shapes
/// `a`: `[m, k]`, `b`: `[k, n]`, `c`: `[m, n]`.
///
/// # Panics
/// When a view lies outside its slice.
pub fn gemm<A: Element, B: Element, C: Element>(
    dims: GemmDims,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: MatrixMut<'_, C>,
    accumulate: bool,
) {
    let isa = Isa::active();
    let GemmDims { m, n, k } = dims;
    a.check(m, k);
    b.check(k, n);
    assert!(
        m * n == 0 || (m - 1) * c.row_stride + n <= c.data.len(),
        "the [{m}, {n}] output lies outside its slice"
    );
    assert!(m <= 1 || c.row_stride >= n, "output rows overlap");
    if pairs::<A, B>(isa) {
        gemm_as::<Bf16Pair, A, B, C>(isa, dims, a, b, c, accumulate);
    } else {
        gemm_as::<f32, A, B, C>(isa, dims, a, b, c, accumulate);
    }
}

/// Whether a product of these types runs on bf16 pairs.
pub(crate) fn pairs<A: Element, B: Element>(isa: Isa) -> bool {
    A::IS_BF16 && B::IS_BF16 && isa == Isa::Avx512Bf16
}

fn gemm_as<P: Panel, A: Element, B: Element, C: Element>(
    isa: Isa,
    dims: GemmDims,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: MatrixMut<'_, C>,
    accumulate: bool,
) {
    let k = dims.k;
    let stride = c.row_stride;
    let c = Shared::new(c.data);
    product::<P>(
        isa,
        dims,
        |rows, out| a.pack(rows.clone(), k, rows.len(), true, out),
        |cols, out| b.pack(cols, k, NR, false, out),
        |rows, cols, tile| {
            for (row, sums) in rows.zip(tile.chunks_exact(NR)) {
                let start = row * stride + cols.start;
                // SAFETY: tasks own disjoint rectangles of `c`.
                let target = unsafe { c.slice(start..start + cols.len()) };
                for (c, sum) in target.iter_mut().zip(sums) {
                    *c = C::from_f32(if accumulate { c.to_f32() + sum } else { *sum });
                }
            }
        },
    );
}

/// The rows of tile `i` when `rows` rows are cut into tiles of nearly equal height.
pub(crate) fn tile_rows(rows: usize, i: usize) -> Range<usize> {
    let count = rows.div_ceil(MR);
    rows * i / count..rows * (i + 1) / count
}

/// Runs a packed product: `pack_left(rows)` and `pack_right(cols)` fill operands, `finish(rows, cols, tile)`
/// receives sums in rows of [`NR`].
fn product<P: Panel>(
    isa: Isa,
    dims: GemmDims,
    pack_left: impl Fn(Range<usize>, &mut [P]) + Sync + Send,
    pack_right: impl Fn(Range<usize>, &mut [P]) + Sync + Send,
    finish: impl Fn(Range<usize>, Range<usize>, &[f32]) + Sync + Send,
) {
    const ENOUGH_TASKS: usize = 16;
    let GemmDims { m, n, k } = dims;
    let steps = k.div_ceil(P::STEP);
    let tiles = m.div_ceil(MR);
    let mut left = scratch::take::<P>(m * steps);
    let shared = Shared::new(&mut left);
    parallel::for_each_chunk(tiles, 4, |chunk| {
        for i in chunk {
            let rows = tile_rows(m, i);
            // SAFETY: tiles are disjoint ranges of rows.
            pack_left(rows.clone(), unsafe { shared.slice(rows.start * steps..rows.end * steps) });
        }
    });
    let left = &*left;
    let panels = n.div_ceil(NR);
    let row_parts = ENOUGH_TASKS.div_ceil(panels.max(1)).min(tiles);
    parallel::for_each(panels * row_parts, |task| {
        let (panel, part) = (task / row_parts, task % row_parts);
        let cols = panel * NR..((panel + 1) * NR).min(n);
        let mut right = scratch::take::<P>(steps * NR);
        pack_right(cols.clone(), &mut right);
        let mut tile = [0.0f32; MR * NR];
        for i in tiles * part / row_parts..tiles * (part + 1) / row_parts {
            let rows = tile_rows(m, i);
            multiply_tile(isa, &left[rows.start * steps..rows.end * steps], &right, rows.len(), &mut tile);
            finish(rows.clone(), cols.clone(), &tile[..rows.len() * NR]);
        }
    });
}

/// `tile[rows, NR] = left^T right`.
pub(crate) fn multiply_tile<P: Panel>(isa: Isa, left: &[P], right: &[P], rows: usize, tile: &mut [f32]) {
    assert!(tile.len() >= rows * NR);
    let out = TileOut { ptr: tile.as_mut_ptr(), stride: NR, accumulate: false };
    // SAFETY: `tile` holds `rows` rows of `NR` floats.
    unsafe { P::tile(isa, rows, left, right, out) }
}
