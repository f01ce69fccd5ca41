//! Register tiles in plain Rust, vectorised by the compiler for its baseline (SSE2, NEON).
use super::panel::{Bf16Pair, MR, NR, TileOut};
use crate::vector::{BASELINE_FMA, mul_add};

/// Rows of a block, whose sums stay in registers: SSE2 has 16 of them, NEON twice as many.
const ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };
/// Columns of a block.
const COLUMNS: usize = 16;

const _: () = assert!(NR.is_multiple_of(COLUMNS) && MR.is_multiple_of(ROWS));

/// # Safety
/// See [`super::panel::Panel::tile`].
pub(super) unsafe fn tile_f32(rows: usize, a: &[f32], b: &[f32], out: TileOut) {
    // SAFETY: promised by the caller.
    unsafe {
        tile(rows, a, b, out, |a, b, sums| {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = mul_add::<BASELINE_FMA>(*a, *b, *sum);
            }
        });
    }
}

/// # Safety
/// See [`super::panel::Panel::tile`].
pub(super) unsafe fn tile_bf16(rows: usize, a: &[Bf16Pair], b: &[Bf16Pair], out: TileOut) {
    let low = |x: Bf16Pair| f32::from_bits(x.0 << 16);
    let high = |x: Bf16Pair| f32::from_bits(x.0 & 0xffff_0000);
    // SAFETY: promised by the caller.
    unsafe {
        tile(rows, a, b, out, |a, b, sums| {
            let (a_low, a_high) = (low(*a), high(*a));
            for (sum, b) in sums.iter_mut().zip(b) {
                let first = mul_add::<BASELINE_FMA>(a_low, low(*b), *sum);
                *sum = mul_add::<BASELINE_FMA>(a_high, high(*b), first);
            }
        });
    }
}

/// A tile block by block; `step` adds one step of a row to its sums.
///
/// # Safety
/// See [`super::panel::Panel::tile`].
#[inline(always)]
unsafe fn tile<P>(
    rows: usize,
    a: &[P],
    b: &[P],
    out: TileOut,
    step: impl Fn(&P, &[P; COLUMNS], &mut [f32; COLUMNS]),
) {
    for first in (0..rows).step_by(ROWS) {
        // Rows of a short last block repeat the last one; their sums are dropped.
        let places: [usize; ROWS] = std::array::from_fn(|row| (first + row).min(rows - 1));
        for column in (0..NR).step_by(COLUMNS) {
            let mut sums = [[0.0f32; COLUMNS]; ROWS];
            for (a, b) in a.chunks_exact(rows).zip(b.as_chunks::<NR>().0) {
                let b = &b[column..].as_chunks::<COLUMNS>().0[0];
                for (sums, place) in sums.iter_mut().zip(places) {
                    step(&a[place], b, sums);
                }
            }
            for (row, sums) in sums.iter().enumerate().take(rows - first) {
                // SAFETY: promised by the caller.
                let target = unsafe { out.ptr.add((first + row) * out.stride + column) };
                // SAFETY: as above.
                let target = unsafe { std::slice::from_raw_parts_mut(target, COLUMNS) };
                for (c, s) in target.iter_mut().zip(sums) {
                    *c = if out.accumulate { *c + s } else { *s };
                }
            }
        }
    }
}
