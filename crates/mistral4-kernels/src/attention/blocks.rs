//! Lanes of queries and packed blocks of keys and values.
use super::{Attention, Segment};
use crate::element::Element;
use crate::gemm::{MR, NR, Panel, Piece, TileOut, pack_lanes, pack_rows, tiles};
use crate::isa::Isa;
use crate::scratch::{self, Scratch};
use std::ops::Range;

/// Keys of one block: eight tiles.
pub(super) const KEYS: usize = 8 * MR;

/// The (query, head) pairs of one task.
pub(super) struct Lanes {
    kv_head: usize,
    group: usize,
    first_query: usize,
    range: Range<usize>,
    /// Keys that each lane attends; 0 for lanes that hold no query.
    pub(super) limits: [u32; NR],
}

impl Lanes {
    /// Number of lane blocks of a segment.
    pub(super) fn blocks(segment: &Segment, group: usize) -> usize {
        (segment.q.len() * group).div_ceil(NR)
    }

    pub(super) fn new(segment: &Segment, group: usize, kv_head: usize, block: usize) -> Self {
        let range = block * NR..((block + 1) * NR).min(segment.q.len() * group);
        let mut limits = [0; NR];
        for (limit, lane) in limits.iter_mut().zip(range.clone()) {
            *limit = u32::try_from(segment.limit(lane / group)).expect("fewer than 2^32 keys");
        }
        Self { kv_head, group, first_query: segment.q.start, range, limits }
    }

    pub(super) fn len(&self) -> usize {
        self.range.len()
    }

    /// Row of the query and its head.
    pub(super) fn query(&self, lane: usize) -> (usize, usize) {
        let lane = self.range.start + lane;
        (self.first_query + lane / self.group, self.kv_head * self.group + lane % self.group)
    }

    /// Keys that some lane attends.
    pub(super) fn keys(&self) -> usize {
        self.limits.iter().max().map_or(0, |limit| *limit as usize)
    }
}

/// Splits keys `0..keys` into blocks.
pub(super) fn key_blocks(keys: usize) -> impl Iterator<Item = Range<usize>> {
    (0..keys.div_ceil(KEYS)).map(move |i| i * KEYS..((i + 1) * KEYS).min(keys))
}

/// Left tiles whose rows are `rows` vectors of `depth` elements: `[tile][steps, rows of tile]`.
pub(super) fn pack_vectors<'a, P: Panel, T: Element>(
    isa: Isa,
    [rows, depth]: [usize; 2],
    row: impl Fn(usize) -> &'a [T],
    out: &mut [P],
) {
    let steps = depth.div_ceil(P::STEP);
    for tile in tiles(0..rows) {
        let out = &mut out[tile.start * steps..tile.end * steps];
        pack_lanes(isa, depth, [tile.len(), tile.len()], |i| row(tile.start + i), out);
    }
}

/// Left tiles whose rows are the `width` columns of `depth` vectors.
pub(super) fn pack_columns<'a, P: Panel, T: Element>(
    isa: Isa,
    [width, depth]: [usize; 2],
    row: impl Fn(usize) -> &'a [T],
    out: &mut [P],
) {
    let steps = depth.div_ceil(P::STEP);
    for tile in tiles(0..width) {
        let out = &mut out[tile.start * steps..tile.end * steps];
        pack_rows(isa, depth, [tile.len(), tile.len()], |k| &row(k)[tile.start..], out);
    }
}

/// `out[rows, NR] (+)= left^T right`, where `left` holds the tiles of `rows` rows.
pub(super) fn multiply<P: Panel>(
    isa: Isa,
    left: &[P],
    rows: usize,
    right: &[P],
    out: &mut [f32],
    accumulate: bool,
) {
    assert!(out.len() >= rows * NR);
    let steps = right.len() / NR;
    for tile in tiles(0..rows) {
        let left = &left[tile.start * steps..tile.end * steps];
        let out = TileOut { ptr: out[tile.start * NR..].as_mut_ptr(), stride: NR, accumulate };
        // SAFETY: `out` holds `rows` rows of `NR` floats.
        unsafe { P::tile(isa, tile.len(), left, right, out, Piece::NONE) };
    }
}

/// Packs scores `[keys, lanes]` as a right panel.
pub(super) fn scores_panel<P: Panel>(isa: Isa, scores: &[f32]) -> Scratch<P> {
    let keys = scores.len() / NR;
    let mut panel = scratch::take(keys.div_ceil(P::STEP) * NR);
    pack_rows(isa, keys, [NR, NR], |key| &scores[key * NR..], &mut panel);
    panel
}

/// Packs the vectors of the lanes as a right panel of `depth` rows.
pub(super) fn lanes_panel<'a, P: Panel, T: Element>(
    isa: Isa,
    lanes: &Lanes,
    depth: usize,
    vector: impl Fn(usize, usize) -> &'a [T],
) -> Scratch<P> {
    let mut panel = scratch::take(depth.div_ceil(P::STEP) * NR);
    let lane = |i: usize| {
        let (row, head) = lanes.query(i);
        vector(row, head)
    };
    pack_lanes(isa, depth, [lanes.len(), NR], lane, &mut panel);
    panel
}

/// Packs the keys of one block, for scores.
pub(super) fn pack_keys<P: Panel, T: Element>(
    isa: Isa,
    input: &Attention<'_, T>,
    rows: Range<usize>,
    kv_head: usize,
    out: &mut [P],
) {
    pack_vectors(isa, [rows.len(), input.dims.head_dim], |i| input.k_row(rows.start + i, kv_head), out);
}

/// Packs the values of one block, for the weighted sum.
pub(super) fn pack_values<P: Panel, T: Element>(
    isa: Isa,
    input: &Attention<'_, T>,
    rows: Range<usize>,
    kv_head: usize,
    out: &mut [P],
) {
    pack_columns(isa, [input.dims.value_dim, rows.len()], |i| input.v_row(rows.start + i, kv_head), out);
}
