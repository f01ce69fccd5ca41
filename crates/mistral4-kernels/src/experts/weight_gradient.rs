//! Gradients of the experts' weights, block by block.
use super::groups::Groups;
use crate::element::Element;
use crate::gemm::{
    MR, NR, Panel, Stretch, Target, TileOut, Upcoming, pack_rows, task_target, tiles, write_rows,
};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use std::ops::Range;

/// Rows of one matrix of a stack: a rectangle of neighbouring columns.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// The first element.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Elements from row to row.
    pub(crate) stride: usize,
}

impl Block {
    /// The elements of a row.
    pub(crate) fn row(&self, row: usize) -> Range<usize> {
        let first = self.first + row * self.stride;
        first..first + self.columns
    }

    /// The memory of the block in a slice.
    pub(crate) fn stretch<T: Element>(&self, slice: Shared<'_, T>) -> Stretch {
        let first = slice.ptr(self.first..self.row(self.rows - 1).end);
        Stretch::at(first, [self.rows, self.columns, self.stride])
    }
}

/// What becomes of a gradient.
pub(crate) trait Sink: Sync {
    /// Columns of a block at most: a multiple of [`NR`].
    const COLUMNS: usize;

    /// What [`Sink::take`] reads.
    fn memory(&self, block: Block) -> [Stretch; 4];

    /// Takes a block of the gradient, rows of which are `pitch` apart in `sums`, and fetches a piece of `next` a row.
    ///
    /// # Safety
    /// No other task takes the block.
    unsafe fn take(&self, isa: Isa, block: Block, sums: &[f32], pitch: usize, next: &mut Upcoming);
}

/// Writes the gradient.
pub(crate) struct Write<'a, W>(pub(crate) Shared<'a, W>);

impl<W: Element> Sink for Write<'_, W> {
    // Sums of a block leave room in the first-level cache.
    const COLUMNS: usize = 4 * NR;

    fn memory(&self, _: Block) -> [Stretch; 4] {
        [Stretch::NONE; 4]
    }

    unsafe fn take(&self, isa: Isa, block: Block, sums: &[f32], pitch: usize, _: &mut Upcoming) {
        let whole = block.columns / NR * NR;
        for (row, sums) in sums.chunks_exact(pitch).take(block.rows).enumerate() {
            let first = block.row(row).start;
            for (columns, target) in [(0..whole, NR), (whole..pitch, block.columns - whole)] {
                let target = Target { first: first + columns.start, stride: NR, columns: target };
                // SAFETY: promised by the caller.
                unsafe { write_rows(isa, &sums[columns], self.0, target, false) };
            }
        }
    }
}

/// `gradient[e] = left[rows of e]^T right[rows of e]`, `[m, n]` for each of `experts`, block by block into `sink`; zero for
/// unused experts.
pub(crate) fn weight_product<'a, P: Panel, L: Element, R: Element, S: Sink>(
    isa: Isa,
    groups: &Groups,
    [experts, m, n]: [usize; 3],
    left: impl Fn(usize) -> &'a [L] + Sync + Send,
    right: impl Fn(usize) -> &'a [R] + Sync + Send,
    sink: &S,
) {
    let mut rows_of = vec![0..0; experts];
    for (expert, rows) in &groups.used {
        rows_of[*expert] = rows.clone();
    }
    let parts = task_target().div_ceil(groups.used.len().max(1)).min(m.div_ceil(MR)).max(1);
    parallel::for_each(experts * parts, |task| {
        let (expert, part) = (task / parts, task % parts);
        let rows = rows_of[expert].clone();
        let (depth, steps) = (rows.len(), rows.len().div_ceil(P::STEP));
        let outputs = m * part / parts..m * (part + 1) / parts;
        let first = (expert * m + outputs.start) * n;
        let tiles: Vec<Range<usize>> = tiles(0..outputs.len()).collect();
        let mut packed = scratch::take::<P>(outputs.len() * steps);
        for tile in &tiles {
            let row = |k: usize| &left(rows.start + k)[outputs.start + tile.start..];
            let out = &mut packed[tile.start * steps..tile.end * steps];
            pack_rows(isa, depth, [tile.len(), tile.len()], row, out);
        }
        let width = S::COLUMNS.min(n.next_multiple_of(NR));
        let mut right_panels = scratch::take::<P>(width * steps);
        let mut sums = scratch::take::<f32>(MR * width);
        for start in (0..n).step_by(width) {
            let columns = width.min(n - start);
            let pitch = columns.next_multiple_of(NR);
            let panels = &mut right_panels[..pitch * steps];
            pack_rows(isa, depth, [columns, pitch], |k: usize| &right(rows.start + k)[start..], panels);
            let block = |tile: &Range<usize>| Block {
                first: first + tile.start * n + start,
                rows: tile.len(),
                columns,
                stride: n,
            };
            for (i, tile) in tiles.iter().enumerate() {
                let now = block(tile);
                let memory = tiles.get(i + 1).map(|next| sink.memory(block(next)));
                let mut next = Upcoming::new(memory.as_ref().map_or(&[], |m| &m[..]), pitch / NR + now.rows);
                let left = &packed[tile.start * steps..tile.end * steps];
                for panel in 0..pitch / NR {
                    let right = &panels[panel * NR * steps..(panel + 1) * NR * steps];
                    let ptr = sums[panel * NR..(tile.len() - 1) * pitch + (panel + 1) * NR].as_mut_ptr();
                    let out = TileOut { ptr, stride: pitch, accumulate: false };
                    // SAFETY: `sums` holds `NR` floats of this panel in each of the tile's rows.
                    unsafe { P::tile(isa, tile.len(), left, right, out, next.piece()) };
                }
                // SAFETY: each task owns its rows of one expert.
                unsafe { sink.take(isa, now, &sums, pitch, &mut next) };
            }
        }
    });
}
