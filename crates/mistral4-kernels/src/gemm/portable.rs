//! Register tiles in plain Rust, vectorised by the compiler for its baseline (SSE2, NEON).
use super::panel::{Bf16Pair, NR, TileOut};

/// # Safety
/// `out` addresses `rows` rows of `NR` writable floats.
unsafe fn store(row: usize, sums: &[f32; NR], out: TileOut) {
    // SAFETY: promised by the caller.
    let target = unsafe { std::slice::from_raw_parts_mut(out.ptr.add(row * out.stride), NR) };
    for (c, s) in target.iter_mut().zip(sums) {
        *c = if out.accumulate { *c + s } else { *s };
    }
}

/// # Safety
/// See [`super::panel::Panel::tile`].
pub(super) unsafe fn tile_f32(rows: usize, a: &[f32], b: &[f32], out: TileOut) {
    for row in 0..rows {
        let mut sums = [0.0f32; NR];
        for (a, b) in a.iter().skip(row).step_by(rows).zip(b.as_chunks::<NR>().0) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
        // SAFETY: promised by the caller.
        unsafe { store(row, &sums, out) };
    }
}

/// # Safety
/// See [`super::panel::Panel::tile`].
pub(super) unsafe fn tile_bf16(rows: usize, a: &[Bf16Pair], b: &[Bf16Pair], out: TileOut) {
    let low = |x: Bf16Pair| f32::from_bits(x.0 << 16);
    let high = |x: Bf16Pair| f32::from_bits(x.0 & 0xffff_0000);
    for row in 0..rows {
        let mut sums = [0.0f32; NR];
        for (a, b) in a.iter().skip(row).step_by(rows).zip(b.as_chunks::<NR>().0) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += low(*a) * low(*b) + high(*a) * high(*b);
            }
        }
        // SAFETY: promised by the caller.
        unsafe { store(row, &sums, out) };
    }
}
