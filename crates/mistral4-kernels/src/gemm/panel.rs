//! Packed operands and the register tile that multiplies them.
//!
//! Both operands are cut along the summed axis into steps: one element (`f32`) or two ([`Bf16Pair`]). A left
//! tile holds, step by step, its 1 to [`MR`] rows; a right panel holds, step by step, [`NR`] columns.
use crate::element::Element;
use crate::isa::Isa;
use crate::scratch::Plain;
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{portable, prefetch};

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

    /// Packs `STEP` elements; missing ones are zero.
    fn pack<T: Element>(first: T, second: Option<T>) -> Self;

    /// `out[rows, NR] (+)= a^T b` with `a: [steps, rows]` and `b: [steps, NR]`; meanwhile `next` is asked for from memory.
    ///
    /// # Safety
    /// `out` addresses `rows` rows of `NR` writable floats, not aliased.
    unsafe fn tile(isa: Isa, rows: usize, a: &[Self], b: &[Self], out: TileOut, next: &[u8]);
}

/// Checks the shapes that every tile kernel relies on.
fn check<P>(rows: usize, a: &[P], b: &[P]) {
    assert!((1..=MR).contains(&rows));
    assert!(b.len().is_multiple_of(NR) && a.len() == b.len() / NR * rows);
}

impl Panel for f32 {
    const STEP: usize = 1;

    #[inline(always)]
    fn pack<T: Element>(first: T, _second: Option<T>) -> Self {
        first.to_f32()
    }

    unsafe fn tile(isa: Isa, rows: usize, a: &[Self], b: &[Self], out: TileOut, next: &[u8]) {
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
                prefetch(next);
                avx2::tile_f32(rows, b.len() / NR, a.as_ptr(), b.as_ptr(), out);
            },
            // SAFETY: as above.
            _ => unsafe { portable::tile_f32(rows, a, b, out) },
        }
    }
}

impl Panel for Bf16Pair {
    const STEP: usize = 2;

    #[inline(always)]
    fn pack<T: Element>(first: T, second: Option<T>) -> Self {
        let bits = |x: T| u32::from(bf16::from_f32(x.to_f32()).to_bits());
        Self(bits(first) | second.map_or(0, |x| bits(x) << 16))
    }

    unsafe fn tile(isa: Isa, rows: usize, a: &[Self], b: &[Self], out: TileOut, next: &[u8]) {
        check(rows, a, b);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: shapes are checked above, `out` by the caller, instructions by `Isa`.
            Isa::Avx512Bf16 => unsafe {
                avx512::tile_bf16(rows, b.len() / NR, a.as_ptr(), b.as_ptr(), out, next);
            },
            // SAFETY: as above.
            _ => unsafe { portable::tile_bf16(rows, a, b, out) },
        }
    }
}
