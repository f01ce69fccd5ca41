//! Tokens sorted by expert, and products of the groups.
use crate::element::{Element, Index};
use crate::gemm::{NR, Panel, Upcoming, multiply_rows, pack_left, tiles};
use crate::isa::Isa;
use crate::scratch::{self, Plain, Scratch};
use std::ops::Range;

/// Token slots (`token * K + k`) sorted by expert; slots of one expert stay in token order.
pub(crate) struct Groups {
    /// Sorted row -> slot.
    slots: Vec<u32>,
    top_k: usize,
    /// Experts with tokens and their sorted rows.
    pub(crate) used: Vec<(usize, Range<usize>)>,
    /// Rows of every left tile, expert after expert.
    tiles: Vec<Range<usize>>,
}

impl Groups {
    pub(crate) fn new<I: Index>(indices: &[I], top_k: usize, experts: usize) -> Self {
        let expert_of = |i: &I| {
            let e = usize::try_from(i.to_i64()).unwrap_or(usize::MAX);
            assert!(e < experts, "expert index {i:?} is not in 0..{experts}");
            e
        };
        let mut offsets = vec![0usize; experts + 1];
        for i in indices {
            offsets[expert_of(i) + 1] += 1;
        }
        for e in 0..experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let mut slots = vec![0u32; indices.len()];
        for (slot, i) in indices.iter().enumerate() {
            let e = expert_of(i);
            slots[next[e]] = u32::try_from(slot).expect("fewer than 2^32 token slots");
            next[e] += 1;
        }
        let used: Vec<_> = (0..experts)
            .map(|e| (e, offsets[e]..offsets[e + 1]))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        let tiles = used.iter().flat_map(|(_, rows)| tiles(rows.clone())).collect();
        Self { slots, top_k, used, tiles }
    }

    pub(crate) fn rows(&self) -> usize {
        self.slots.len()
    }

    /// Rows of the busiest expert.
    pub(crate) fn most_rows(&self) -> usize {
        self.used.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0)
    }

    pub(crate) fn slot(&self, row: usize) -> usize {
        self.slots[row] as usize
    }

    pub(crate) fn token(&self, row: usize) -> usize {
        self.slot(row) / self.top_k
    }

    /// Packs every sorted row (`depth` elements each) as left tiles.
    pub(crate) fn pack_left<'a, P: Panel, T: Element>(
        &self,
        isa: Isa,
        depth: usize,
        row: impl Fn(usize) -> &'a [T] + Sync + Send,
    ) -> Scratch<P> {
        pack_left(isa, &self.tiles, depth, row)
    }

    /// Multiplies the left tiles of every used expert with a right panel of that expert.
    ///
    /// `pack_right(expert, depth, out)` packs `columns` columns of part of the summed axis; see
    /// [`Groups::multiply_with`] for the rest.
    pub(crate) fn multiply<'a, P: Panel, W: Element>(
        &self,
        isa: Isa,
        left: &[P],
        [depth, columns]: [usize; 2],
        source: impl Fn(usize) -> [&'a [W]; 2],
        pack_right: impl Fn(usize, Range<usize>, &mut [P]),
        finish: impl FnMut(Range<usize>, &mut [f32]),
    ) {
        let product = |expert: usize, rows: Range<usize>, next: &mut Upcoming<'_>, sums: &mut [f32]| {
            let pack = |depth: Range<usize>, out: &mut [P]| pack_right(expert, depth, out);
            multiply_rows(isa, left, rows, depth, pack, next, sums);
        };
        self.multiply_with(columns, source, product, finish);
    }

    /// Multiplies the rows of every used expert with `columns` columns of that expert.
    ///
    /// `product(expert, rows, next, sums)` does so for one expert, fetching `next`; `finish(rows, sums)` receives the `[panels, rows, NR]` sums, in the order of experts and rows. `source(expert)`
    /// is the memory that `product` reads for an expert; it is fetched while the expert before it is multiplied.
    pub(crate) fn multiply_with<'a, W: Plain + 'a>(
        &self,
        columns: usize,
        source: impl Fn(usize) -> [&'a [W]; 2],
        product: impl Fn(usize, Range<usize>, &mut Upcoming<'_>, &mut [f32]),
        mut finish: impl FnMut(Range<usize>, &mut [f32]),
    ) {
        let panels = columns.div_ceil(NR);
        let mut sums = scratch::take::<f32>(self.most_rows() * panels * NR);
        for (index, (expert, rows)) in self.used.iter().enumerate() {
            let sums = &mut sums[..rows.len() * panels * NR];
            let next = self.used.get(index + 1).map_or([&[][..]; 2], |(expert, _)| source(*expert));
            // Depth is cut into few blocks; with one block the pieces come out right, with more they come sooner.
            let mut next = Upcoming::new(next, tiles(rows.clone()).count() * panels);
            product(*expert, rows.clone(), &mut next, sums);
            finish(rows.clone(), sums);
        }
    }
}
