//! Packed operands and the register tile that multiplies them.
//!
//! Both operands are cut along the summed axis into steps: one element (`f32`) or two ([`Bf16Pair`]). A left
//! tile holds, step by step, its 1 to [`MR`] rows; a right panel holds, step by step, [`NR`] columns.
use crate::element::Element;
use crate::isa::Isa;
use crate::scratch::{self, Plain, Scratch};
use crate::vector::per_isa;
use half::bf16;
use std::ops::Range;

use super::portable;
use super::upcoming::Piece;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Most rows of a left tile: 12 x 32 accumulators fill 24 of the 32 AVX-512 registers.
pub(crate) const MR: usize = 12;
/// Columns of a right panel: two AVX-512 registers.
pub(crate) const NR: usize = 32;

/// Two neighbours along the summed axis, the first in the low half.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Bf16Pair(pub(crate) u32);

// SAFETY: any 32 bits are a pair.
unsafe impl Plain for Bf16Pair {}

/// Where a tile's sums go: row `r` starts at `r * stride`.
#[derive(Clone, Copy)]
pub(crate) struct TileOut {
    pub(crate) ptr: *mut f32,
    pub(crate) stride: usize,
    /// Add to what is there, rather than overwrite it.
    pub(crate) accumulate: bool,
}

/// What operands are packed as.
pub(crate) trait Panel: Plain + Default + Send + Sync + 'static {
    /// Elements of the summed axis in one step.
    const STEP: usize;
    /// Steps of a right panel that stay in the first-level cache while left tiles pass by.
    const BLOCK: usize;

    /// Packs `STEP` elements; missing ones are zero.
    fn pack<T: Element>(first: T, second: Option<T>) -> Self;

    /// What [`Panel::of_pairs`] needs for so many steps.
    fn space(steps: usize) -> Scratch<Self>;

    /// Some steps of a right panel that is packed as pairs; the first is even.
    fn of_pairs<'a>(
        isa: Isa,
        pairs: &'a [Bf16Pair],
        steps: Range<usize>,
        space: &'a mut [Self],
    ) -> &'a [Self];

    /// `out[rows, NR] (+)= a^T b` with `a: [steps, rows]` and `b: [steps, NR]`; meanwhile `next` is asked for from memory.
    ///
    /// # Safety
    /// `out` addresses `rows` rows of `NR` writable floats, not aliased.
    unsafe fn tile(isa: Isa, rows: usize, a: &[Self], b: &[Self], out: TileOut, next: Piece);
}

/// Checks the shapes that every tile kernel relies on.
fn check<P>(rows: usize, a: &[P], b: &[P]) {
    assert!((1..=MR).contains(&rows));
    assert!(b.len().is_multiple_of(NR) && a.len() == b.len() / NR * rows);
}

impl Panel for f32 {
    const STEP: usize = 1;
    // 16 KiB, which leave room for a left tile in 32 KiB.
    const BLOCK: usize = 128;

    #[inline(always)]
    fn pack<T: Element>(first: T, _second: Option<T>) -> Self {
        first.to_f32()
    }

    fn space(steps: usize) -> Scratch<Self> {
        scratch::take(steps * NR)
    }

    fn of_pairs<'a>(
        isa: Isa,
        pairs: &'a [Bf16Pair],
        steps: Range<usize>,
        space: &'a mut [Self],
    ) -> &'a [Self] {
        let space = &mut space[..steps.len() * NR];
        widen(isa, &pairs[steps.start / 2 * NR..steps.end.div_ceil(2) * NR], space);
        space
    }

    unsafe fn tile(isa: Isa, rows: usize, a: &[Self], b: &[Self], out: TileOut, next: Piece) {
        check(rows, a, b);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: shapes are checked above, `out` by the caller, instructions by `Isa`.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
                avx512::tile_f32(rows, b.len() / NR, a.as_ptr(), b.as_ptr(), out, next);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe {
                avx2::tile_f32(rows, b.len() / NR, a.as_ptr(), b.as_ptr(), out, next);
            },
            // SAFETY: as above.
            _ => unsafe { portable::tile_f32(rows, a, b, out) },
        }
    }
}

impl Panel for Bf16Pair {
    const STEP: usize = 2;
    // 32 KiB: processors that multiply pairs in one instruction take so many steps at once best.
    const BLOCK: usize = 256;

    #[inline(always)]
    fn pack<T: Element>(first: T, second: Option<T>) -> Self {
        let bits = |x: T| u32::from(bf16::from_f32(x.to_f32()).to_bits());
        Self(bits(first) | second.map_or(0, |x| bits(x) << 16))
    }

    fn space(_: usize) -> Scratch<Self> {
        scratch::take(0)
    }

    fn of_pairs<'a>(_: Isa, pairs: &'a [Self], steps: Range<usize>, _: &'a mut [Self]) -> &'a [Self] {
        &pairs[steps.start * NR..steps.end * NR]
    }

    unsafe fn tile(isa: Isa, rows: usize, a: &[Self], b: &[Self], out: TileOut, next: Piece) {
        check(rows, a, b);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: shapes are checked above, `out` by the caller, instructions by `Isa`.
            Isa::Avx512Bf16 => unsafe {
                avx512::tile_bf16(rows, b.len() / NR, a.as_ptr(), b.as_ptr(), out, next);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above; AVX-512 includes AVX2.
            Isa::Avx2 | Isa::Avx512 => unsafe {
                avx2::tile_bf16(rows, b.len() / NR, a.as_ptr(), b.as_ptr(), out, next);
            },
            // SAFETY: as above.
            _ => unsafe { portable::tile_bf16(rows, a, b, out) },
        }
    }
}

per_isa! {
    /// `steps[2 * i]` and `steps[2 * i + 1]` are the two halves of `pairs[i]`, each a step of [`NR`] columns; the last may be
    /// missing.
    fn widen(pairs: &[Bf16Pair], steps: &mut [f32]) = widen_body;
}

#[inline(always)]
fn widen_body<const FMA: bool>(pairs: &[Bf16Pair], steps: &mut [f32]) {
    for (pairs, steps) in pairs.as_chunks::<NR>().0.iter().zip(steps.chunks_mut(2 * NR)) {
        let (first, second) = steps.split_at_mut(NR);
        for (pair, first) in pairs.iter().zip(first) {
            *first = f32::from_bits(pair.0 << 16);
        }
        for (pair, second) in pairs.iter().zip(second) {
            *second = f32::from_bits(pair.0 & 0xffff_0000);
        }
    }
}
