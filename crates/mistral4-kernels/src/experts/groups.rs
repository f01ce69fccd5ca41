//! Tokens sorted by expert, and products of the groups.
use crate::element::{Element, Index};
use crate::gemm::{Left, NR, Panel, Stretch, multiply_rows, pack_left, tiles, unit_depth};
use crate::isa::Isa;
use crate::scratch::{self, Scratch};
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

    /// Multiplies the left tiles of every used expert with right panels of that expert.
    ///
    /// `pack_right(expert, depth, out)` packs `columns` columns of part of the summed axis, for which it reads
    /// `memory(expert, depth)`; see [`Groups::multiply_with`] for the rest.
    pub(crate) fn multiply<P: Panel>(
        &self,
        isa: Isa,
        left: &[P],
        [depth, columns]: [usize; 2],
        memory: impl Fn(usize, Range<usize>) -> [Stretch; 2],
        pack_right: impl Fn(usize, Range<usize>, &mut [P]),
        finish: impl FnMut(Range<usize>, &mut [f32]),
    ) {
        let first = 0..depth.min(unit_depth::<P>(columns.div_ceil(NR)));
        let product = |expert: usize, rows: Range<usize>, next: Option<usize>, sums: &mut [f32]| {
            let pack = |depth: Range<usize>, out: &mut [P]| pack_right(expert, depth, out);
            let next =
                next.filter(|_| depth > 0).map_or([Stretch::NONE; 2], |expert| memory(expert, first.clone()));
            let left = Left::new(left, rows, depth);
            multiply_rows(isa, &left, pack, |depth| memory(expert, depth), next, sums);
        };
        self.multiply_with(columns, product, finish);
    }

    /// Multiplies the rows of every used expert with `columns` columns of that expert.
    ///
    /// `product(expert, rows, next, sums)` does so for one expert, before the expert `next`; `finish(rows, sums)`
    /// receives the `[panels, rows, NR]` sums, in the order of experts and rows.
    pub(crate) fn multiply_with(
        &self,
        columns: usize,
        product: impl Fn(usize, Range<usize>, Option<usize>, &mut [f32]),
        mut finish: impl FnMut(Range<usize>, &mut [f32]),
    ) {
        let panels = columns.div_ceil(NR);
        let mut sums = scratch::take::<f32>(self.most_rows() * panels * NR);
        for (index, (expert, rows)) in self.used.iter().enumerate() {
            let sums = &mut sums[..rows.len() * panels * NR];
            let next = self.used.get(index + 1).map(|(expert, _)| *expert);
            product(*expert, rows.clone(), next, sums);
            finish(rows.clone(), sums);
        }
    }
}
