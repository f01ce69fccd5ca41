//! Matrix products with `f32` sums.
//!
//! Both operands are packed (see [`panel`]), the left one once, the right one panel by panel by the task that
//! uses it. Every output element is one sum along the inner axis in a fixed order, so results depend neither
//! on how rows and columns are cut nor on threads.
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod linear;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_avx2;
#[cfg(target_arch = "x86_64")]
mod pack_avx512;
mod packed;
mod panel;
mod portable;
mod upcoming;

pub(crate) use dot::{Rows, combine_each, combine_rows, dot_rows, few_rows};
pub use linear::{LinearDims, linear, linear_backward_input, linear_backward_weight};
pub(crate) use pack::{pack_lanes, pack_rows};
pub(crate) use packed::{HALF, multiplies_pairs};
pub use packed::{PackedMatrix, packed_linear};
pub(crate) use panel::{Bf16Pair, MR, NR, Panel, TileOut};
pub(crate) use upcoming::{Piece, Stretch, Upcoming};

use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use crate::vector::per_isa;
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
    /// Packs neighbouring tiles of a left operand, `[tiles][steps, height]`.
    fn pack_left<P: Panel>(&self, isa: Isa, tiles: &[Range<usize>], depth: usize, out: &mut [P]) {
        /// Where columns are contiguous, this many of them are packed for all tiles before the next, so that
        /// the tiles share cache lines.
        const COLUMNS: usize = 64;
        let steps = depth.div_ceil(P::STEP);
        let start = tiles.first().map_or(0, |tile| tile.start);
        if self.col_stride == 1 {
            for tile in tiles {
                let base = &self.data[tile.start * self.row_stride..];
                let out = &mut out[(tile.start - start) * steps..(tile.end - start) * steps];
                let row = |i: usize| &base[i * self.row_stride..];
                pack_lanes(isa, depth, [tile.len(), tile.len()], row, out);
            }
            return;
        }
        for first in (0..depth).step_by(COLUMNS) {
            let columns = COLUMNS.min(depth - first);
            for tile in tiles {
                let base = &self.data[tile.start * self.row_stride + first * self.col_stride..];
                let at = (tile.start - start) * steps + first / P::STEP * tile.len();
                let out = &mut out[at..at + columns.div_ceil(P::STEP) * tile.len()];
                pack_rows(isa, columns, [tile.len(), tile.len()], |k| &base[k * self.col_stride..], out);
            }
        }
    }

    /// What [`Matrix::pack_right`] reads.
    fn stretch(&self, cols: Range<usize>, depth: Range<usize>) -> Stretch {
        let values = &self.data[cols.start * self.col_stride + depth.start * self.row_stride..];
        if self.row_stride == 1 {
            Stretch::rows(values, [cols.len(), depth.len(), self.col_stride])
        } else {
            Stretch::rows(values, [depth.len(), cols.len(), self.row_stride])
        }
    }

    /// Packs columns of a right operand, over part of the summed axis, as panels.
    fn pack_right<P: Panel>(&self, isa: Isa, cols: Range<usize>, depth: Range<usize>, out: &mut [P]) {
        let base = &self.data[cols.start * self.col_stride + depth.start * self.row_stride..];
        if self.row_stride == 1 {
            let panel_len = depth.len().div_ceil(P::STEP) * NR;
            for (panel, out) in out.chunks_exact_mut(panel_len).enumerate() {
                let lanes = NR.min(cols.len() - panel * NR);
                let lane = |i: usize| &base[(panel * NR + i) * self.col_stride..];
                pack_lanes(isa, depth.len(), [lanes, NR], lane, out);
            }
        } else {
            let width = cols.len().next_multiple_of(NR);
            pack_rows(isa, depth.len(), [cols.len(), width], |k| &base[k * self.row_stride..], out);
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
    if m <= few_rows::<A, B>(isa) && a.col_stride == 1 && b.row_stride == 1 {
        gemm_few(isa, dims, a, b, c, accumulate);
    } else if m <= few_rows::<A, B>(isa) && a.col_stride == 1 {
        combine_few(isa, dims, a, b, c, accumulate);
    } else if pairs::<A, B>(isa) {
        gemm_as::<Bf16Pair, A, B, C>(isa, dims, a, b, c, accumulate);
    } else {
        gemm_as::<f32, A, B, C>(isa, dims, a, b, c, accumulate);
    }
}

/// Whether a product of these types runs on bf16 pairs.
pub(crate) fn pairs<A: Element, B: Element>(isa: Isa) -> bool {
    A::IS_BF16 && B::IS_BF16 && isa == Isa::Avx512Bf16
}

/// Few left rows times columns that are contiguous.
fn gemm_few<A: Element, B: Element, C: Element>(
    isa: Isa,
    dims: GemmDims,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: MatrixMut<'_, C>,
    accumulate: bool,
) {
    let GemmDims { m, n, k } = dims;
    let (stride, c) = (c.row_stride, Shared::new(c.data));
    let x = Rows { data: a.data, stride: a.row_stride, count: m };
    parallel::for_each_chunk(n, streamed_rows::<B>(k), |cols| {
        let mut sums = scratch::take::<f32>(m * cols.len());
        let data = &b.data[cols.start * b.col_stride..];
        dot_rows(isa, x, Rows { data, stride: b.col_stride, count: cols.len() }, k, &mut sums);
        for row in 0..m {
            // SAFETY: tasks own disjoint columns.
            let target = unsafe { c.slice(row * stride + cols.start..row * stride + cols.end) };
            for (c, sum) in target.iter_mut().zip(&sums[row * cols.len()..]) {
                *c = C::from_f32(if accumulate { c.to_f32() + sum } else { *sum });
            }
        }
    });
}

/// Few left rows times a matrix whose rows are contiguous: sums of its rows.
fn combine_few<A: Element, B: Element, C: Element>(
    isa: Isa,
    dims: GemmDims,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: MatrixMut<'_, C>,
    accumulate: bool,
) {
    /// Columns of one task at most: wide enough for the processor to fetch ahead along a row.
    const COLUMNS: usize = 16 * dot::COLUMNS;
    let GemmDims { m, n, k } = dims;
    let (stride, c) = (c.row_stride, Shared::new(c.data));
    // Little work stays on one thread.
    let width = if n * k < 1 << 15 { n } else { n.div_ceil(rayon::current_num_threads()).min(COLUMNS) };
    parallel::for_each_chunk(n, width.next_multiple_of(dot::COLUMNS), |cols| {
        let mut sums = scratch::take::<f32>(cols.len());
        for row in 0..m {
            let factors = &a.data[row * a.row_stride..][..k];
            let rows = Rows { data: &b.data[cols.start..], stride: b.row_stride, count: k };
            combine_rows(isa, factors, rows, &mut sums);
            // SAFETY: tasks own disjoint columns.
            let target = unsafe { c.slice(row * stride + cols.start..row * stride + cols.end) };
            for (c, sum) in target.iter_mut().zip(&sums[..]) {
                *c = C::from_f32(if accumulate { c.to_f32() + sum } else { *sum });
            }
        }
    });
}

/// Rows of weights that one task reads: enough bytes to be worth waking a thread.
pub(crate) fn streamed_rows<T: Element>(depth: usize) -> usize {
    const BYTES: usize = 128 << 10;
    (BYTES / (depth * size_of::<T>()).max(1)).next_multiple_of(8).max(8)
}

fn gemm_as<P: Panel, A: Element, B: Element, C: Element>(
    isa: Isa,
    dims: GemmDims,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: MatrixMut<'_, C>,
    accumulate: bool,
) {
    let GemmDims { m, n, k } = dims;
    let steps = k.div_ceil(P::STEP);
    // Where rows of `b` are contiguous, long pieces of them are read at once.
    let width = if b.row_stride == 1 { NR } else { task_columns(n, 4) };
    let column_tasks = n.div_ceil(width);
    let parts = row_parts(m, column_tasks);
    let part_rows = |part: usize| m * part / parts..m * (part + 1) / parts;

    let mut left = scratch::take::<P>(m * steps);
    let shared = Shared::new(&mut left);
    let tiles: Vec<Range<usize>> = (0..parts).flat_map(|part| tiles(part_rows(part))).collect();
    parallel::for_each_chunk(tiles.len(), 8, |chunk| {
        let tiles = &tiles[chunk];
        let rows = tiles[0].start..tiles[tiles.len() - 1].end;
        // SAFETY: tiles are disjoint ranges of rows.
        let out = unsafe { shared.slice(rows.start * steps..rows.end * steps) };
        a.pack_left(isa, tiles, k, out);
    });
    let (left, stride, c) = (&*left, c.row_stride, Shared::new(c.data));
    parallel::for_each(column_tasks * parts, |task| {
        let rows = part_rows(task % parts);
        let cols = task / parts * width..((task / parts + 1) * width).min(n);
        let mut sums = scratch::take::<f32>(rows.len() * cols.len().next_multiple_of(NR));
        let pack = |depth: Range<usize>, out: &mut [P]| b.pack_right(isa, cols.clone(), depth, out);
        let memory = |depth: Range<usize>| [b.stretch(cols.clone(), depth), Stretch::NONE];
        let left = Left::new(left, rows.clone(), k);
        multiply_rows(isa, &left, pack, memory, [Stretch::NONE; 2], &mut sums);
        for (cols, sums) in panels(cols, &sums, rows.len()) {
            let target = Target { first: rows.start * stride + cols.start, stride, columns: cols.len() };
            // SAFETY: tasks own disjoint rectangles of `c`.
            unsafe { write_rows(isa, sums, c, target, accumulate) };
        }
    });
}

/// Parts that rows are cut into beside `column_tasks`: enough tasks for all threads, and few enough rows in each for
/// their packed steps of one block to fit the second-level cache.
pub(crate) fn row_parts(rows: usize, column_tasks: usize) -> usize {
    const PART_ROWS: usize = 64 * MR;
    task_target().div_ceil(column_tasks.max(1)).min(rows.div_ceil(MR)).max(rows.div_ceil(PART_ROWS))
}

/// Packs rows as left tiles, which cover `0..` in order: `[tile][steps, height]`.
pub(crate) fn pack_left<'a, P: Panel, T: Element>(
    isa: Isa,
    tiles: &[Range<usize>],
    depth: usize,
    row: impl Fn(usize) -> &'a [T] + Sync + Send,
) -> scratch::Scratch<P> {
    let steps = depth.div_ceil(P::STEP);
    let mut left = scratch::take(tiles.last().map_or(0, |tile| tile.end) * steps);
    let shared = Shared::new(&mut left);
    parallel::for_each_chunk(tiles.len(), 4, |chunk| {
        for tile in &tiles[chunk] {
            // SAFETY: tiles are disjoint ranges of rows.
            let out = unsafe { shared.slice(tile.start * steps..tile.end * steps) };
            pack_lanes(isa, depth, [tile.len(), tile.len()], |lane| row(tile.start + lane), out);
        }
    });
    left
}

/// Tasks that give every thread several.
pub(crate) fn task_target() -> usize {
    4 * rayon::current_num_threads()
}

/// Columns of one task: up to `panels` panels, fewer when threads would run out of tasks.
pub(crate) fn task_columns(columns: usize, panels: usize) -> usize {
    NR * (columns / NR / (2 * rayon::current_num_threads())).clamp(1, panels)
}

/// Splits `[panels, rows, NR]` sums of some columns into the columns and sums of each panel.
pub(crate) fn panels(
    cols: Range<usize>,
    sums: &[f32],
    rows: usize,
) -> impl Iterator<Item = (Range<usize>, &[f32])> {
    let starts = cols.clone().step_by(NR);
    starts.map(move |start| start..(start + NR).min(cols.end)).zip(sums.chunks_exact((rows * NR).max(1)))
}

/// The tiles of a range of rows: nearly equal heights of at most [`MR`].
pub(crate) fn tiles(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let count = rows.len().div_ceil(MR);
    (0..count).map(move |i| rows.start + rows.len() * i / count..rows.start + rows.len() * (i + 1) / count)
}

/// `sums[panels, rows, NR] = left[rows, depth] right[depth, panels]`.
///
/// `pack_right` packs a part of the summed axis as `[panels, steps, NR]`; parts are short enough for one panel to stay in
/// the first-level cache while the tiles pass by. What `memory` says is read for the next [`unit_depth`] elements is
/// fetched during those before, and `next` during the last ones.
pub(crate) fn multiply_rows<P: Panel>(
    isa: Isa,
    left: &Left<'_, P>,
    pack_right: impl Fn(Range<usize>, &mut [P]),
    memory: impl Fn(Range<usize>) -> [Stretch; 2],
    next: [Stretch; 2],
    sums: &mut [f32],
) {
    if left.rows.is_empty() {
        return;
    }
    let panels = sums.len() / (left.rows.len() * NR);
    assert_eq!(sums.len(), panels * left.rows.len() * NR);
    if left.steps == 0 {
        sums.fill(0.0);
    }
    let (block, unit) = (block_depth::<P>(panels), unit_depth::<P>(panels));
    let tiles = panels * tiles(left.rows.clone()).count();
    let part = |first: usize, len: usize| first..(first + len).min(left.depth);
    let mut right = scratch::take::<P>(panels * block.div_ceil(P::STEP).min(left.steps) * NR);
    let mut upcoming = Upcoming::none();
    for first in (0..left.depth).step_by(block) {
        if first.is_multiple_of(unit) {
            let now = part(first, unit);
            let next = if now.end < left.depth { memory(part(now.end, unit)) } else { next };
            upcoming = Upcoming::new(&next, tiles * now.len().div_ceil(block));
        }
        let depth = part(first, block);
        let steps = first / P::STEP..depth.end.div_ceil(P::STEP);
        let right = &mut right[..panels * steps.len() * NR];
        pack_right(depth, right);
        let panels = right.chunks_exact(steps.len() * NR).zip(sums.chunks_exact_mut(left.rows.len() * NR));
        for (right, sums) in panels {
            left.multiply(isa, steps.clone(), right, &mut upcoming, sums);
        }
    }
}

/// Elements of the summed axis that [`multiply_rows`] packs at once: 128 KiB of all panels at most.
fn block_depth<P: Panel>(panels: usize) -> usize {
    P::STEP * (1024 / panels.max(1)).clamp(16, P::BLOCK)
}

/// Elements of the summed axis that [`multiply_rows`] fetches ahead: some parts, together 128 KiB of bf16 or one part.
pub(crate) fn unit_depth<P: Panel>(panels: usize) -> usize {
    let block = block_depth::<P>(panels);
    block * (2048 / (panels.max(1) * block)).max(1)
}

/// As [`multiply_rows`] with a right operand whose panels are packed already as pairs, each over the whole summed axis.
pub(crate) fn multiply_packed<'a, P: Panel>(
    isa: Isa,
    left: &[P],
    rows: Range<usize>,
    depth: usize,
    panels: impl Iterator<Item = &'a [Bf16Pair]>,
    next: &mut Upcoming,
    sums: &mut [f32],
) {
    let left = Left::new(left, rows, depth);
    // What passes by once, as it is, needs no place in the cache.
    let block = if P::STEP == Bf16Pair::STEP && left.rows.len() <= MR { left.steps } else { P::BLOCK };
    let mut space = P::space(block.min(left.steps));
    for (panel, sums) in panels.zip(sums.chunks_exact_mut((left.rows.len() * NR).max(1))) {
        if left.steps == 0 {
            sums.fill(0.0);
        }
        for first in (0..left.steps).step_by(block.max(1)) {
            let steps = first..(first + block).min(left.steps);
            left.multiply(isa, steps.clone(), P::of_pairs(isa, panel, steps, &mut space), next, sums);
        }
    }
}

/// Some rows of a packed left operand.
pub(crate) struct Left<'a, P> {
    tiles: &'a [P],
    rows: Range<usize>,
    depth: usize,
    steps: usize,
}

impl<'a, P: Panel> Left<'a, P> {
    /// `tiles` are those of all rows of the operand, each `[steps, height]`.
    pub(crate) fn new(tiles: &'a [P], rows: Range<usize>, depth: usize) -> Self {
        Self { tiles, rows, depth, steps: depth.div_ceil(P::STEP) }
    }

    /// `sums[rows, NR] (+)= left[rows, steps] right[steps, NR]`; adds if `steps` are not the first.
    fn multiply(&self, isa: Isa, steps: Range<usize>, right: &[P], next: &mut Upcoming, sums: &mut [f32]) {
        assert_eq!(sums.len(), self.rows.len() * NR);
        for tile in tiles(self.rows.clone()) {
            let start = tile.start * self.steps + steps.start * tile.len();
            let left = &self.tiles[start..start + steps.len() * tile.len()];
            let ptr = sums[(tile.start - self.rows.start) * NR..].as_mut_ptr();
            let out = TileOut { ptr, stride: NR, accumulate: steps.start > 0 };
            // SAFETY: `sums` holds `NR` floats for each row.
            unsafe { P::tile(isa, tile.len(), left, right, out, next.piece()) };
        }
    }
}

/// A rectangle of a matrix: its first element, the distance between its rows, and its columns.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) first: usize,
    pub(crate) stride: usize,
    pub(crate) columns: usize,
}

/// Writes rows of [`NR`] sums to a rectangle.
///
/// # Safety
/// No other task borrows the rectangle.
pub(crate) unsafe fn write_rows<C: Element>(
    isa: Isa,
    sums: &[f32],
    c: Shared<'_, C>,
    target: Target,
    accumulate: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 && C::IS_BF16 && !accumulate && target.columns == NR {
        let Some(last) = (sums.len() / NR).checked_sub(1) else { return };
        let out = c.ptr(target.first..target.first + last * target.stride + NR);
        // SAFETY: the caller owns the rectangle, which ends with the range, and an `Isa` value is only made where the
        // processor has its instructions.
        unsafe { avx512::round_rows(sums, out.cast(), target.stride) };
        return;
    }
    write(isa, sums, c, target, accumulate);
}

per_isa! {
    /// Only for [`write_rows`], whose caller owns the rectangle.
    fn write<C: Element>(sums: &[f32], c: Shared<'_, C>, target: Target, accumulate: bool) = write_body;
}

#[inline(always)]
fn write_body<C: Element, const FMA: bool>(sums: &[f32], c: Shared<'_, C>, target: Target, accumulate: bool) {
    for (row, sums) in sums.as_chunks::<NR>().0.iter().enumerate() {
        let start = target.first + row * target.stride;
        // SAFETY: the caller of `write_rows` owns the rectangle.
        let out = unsafe { c.slice(start..start + target.columns) };
        if !accumulate && let Some(out) = out.as_chunks_mut::<NR>().0.first_mut() {
            for (c, sum) in out.iter_mut().zip(sums) {
                *c = C::from_f32(*sum);
            }
        } else {
            for (c, sum) in out.iter_mut().zip(sums) {
                *c = C::from_f32(if accumulate { c.to_f32() + sum } else { *sum });
            }
        }
    }
}
