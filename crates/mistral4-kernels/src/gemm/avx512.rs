//! Register tiles of up to 12 x 32 sums for AVX-512.
use super::panel::{Bf16Pair, NR, TileOut};
use super::upcoming::{Fetch, LINE, Piece};
use half::bf16;
use std::arch::x86_64::*;

/// Calls `$kernel::<rows>` for `rows` in `1..=MR`.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident($($arg:expr),*)) => {
        match $rows {
            1 => $kernel::<1>($($arg),*),
            2 => $kernel::<2>($($arg),*),
            3 => $kernel::<3>($($arg),*),
            4 => $kernel::<4>($($arg),*),
            5 => $kernel::<5>($($arg),*),
            6 => $kernel::<6>($($arg),*),
            7 => $kernel::<7>($($arg),*),
            8 => $kernel::<8>($($arg),*),
            9 => $kernel::<9>($($arg),*),
            10 => $kernel::<10>($($arg),*),
            11 => $kernel::<11>($($arg),*),
            12 => $kernel::<12>($($arg),*),
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

/// # Safety
/// `out` addresses `R` rows of `NR` writable floats.
#[target_feature(enable = "avx512f")]
unsafe fn store<const R: usize>(sums: [[__m512; 2]; R], out: TileOut) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe {
                let target = out.ptr.add(row * out.stride + half * 16);
                let sum = if out.accumulate { _mm512_add_ps(sum, _mm512_loadu_ps(target)) } else { sum };
                _mm512_storeu_ps(target, sum);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn f32_rows<const R: usize>(steps: usize, a: *const f32, b: *const f32, out: TileOut, next: Piece) {
    let mut next = Fetch::new(next, steps);
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for step in 0..steps {
        next.line();
        // SAFETY: `a` holds `steps * R` and `b` `steps * NR` elements.
        unsafe {
            let b0 = _mm512_loadu_ps(b.add(step * NR));
            let b1 = _mm512_loadu_ps(b.add(step * NR + 16));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.add(step * R + row));
                sum[0] = _mm512_fmadd_ps(x, b0, sum[0]);
                sum[1] = _mm512_fmadd_ps(x, b1, sum[1]);
            }
        }
    }
    // SAFETY: promised by the caller.
    unsafe { store(sums, out) }
}

/// # Safety
/// `a` holds `steps * rows` and `b` `steps * NR` elements, `out` addresses `rows` rows of `NR` floats, and
/// the processor has AVX-512 F.
pub(super) unsafe fn tile_f32(
    rows: usize,
    steps: usize,
    a: *const f32,
    b: *const f32,
    out: TileOut,
    next: Piece,
) {
    // SAFETY: promised by the caller.
    unsafe { by_rows!(rows, f32_rows(steps, a, b, out, next)) }
}

/// Rows up to which a product passes over its weights faster than they come from memory unasked.
const FEW: usize = 2;
/// How far ahead, in bytes, they are asked for.
const AHEAD: usize = 4096;

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_rows<const R: usize>(
    steps: usize,
    a: *const Bf16Pair,
    b: *const Bf16Pair,
    out: TileOut,
    next: Piece,
) {
    // SAFETY: both types are 64 plain bytes.
    let pairs = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
    let mut next = Fetch::new(next, steps);
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for step in 0..steps {
        next.line();
        // SAFETY: `a` holds `steps * R` and `b` `steps * NR` elements.
        unsafe {
            let b = b.add(step * NR);
            if R <= FEW {
                // The processor itself fetches ahead only within a page.
                _mm_prefetch::<_MM_HINT_T0>(b.cast::<i8>().wrapping_add(AHEAD));
                _mm_prefetch::<_MM_HINT_T0>(b.cast::<i8>().wrapping_add(AHEAD + LINE));
            }
            let b0 = pairs(_mm512_loadu_si512(b.cast()));
            let b1 = pairs(_mm512_loadu_si512(b.add(16).cast()));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = pairs(_mm512_set1_epi32((*a.add(step * R + row)).0.cast_signed()));
                sum[0] = _mm512_dpbf16_ps(sum[0], x, b0);
                sum[1] = _mm512_dpbf16_ps(sum[1], x, b1);
            }
        }
    }
    // SAFETY: promised by the caller.
    unsafe { store(sums, out) }
}

/// # Safety
/// `a` holds `steps * rows` and `b` `steps * NR` elements, `out` addresses `rows` rows of `NR` floats, and
/// the processor has AVX-512 F and BF16.
pub(super) unsafe fn tile_bf16(
    rows: usize,
    steps: usize,
    a: *const Bf16Pair,
    b: *const Bf16Pair,
    out: TileOut,
    next: Piece,
) {
    // SAFETY: promised by the caller.
    unsafe { by_rows!(rows, bf16_rows(steps, a, b, out, next)) }
}

/// Rounds rows of [`NR`] sums to rows that lie `stride` elements apart. Numbers below 2^-126 become zero.
///
/// # Safety
/// `out` addresses as many rows of `NR` writable elements, and the processor has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn round_rows(sums: &[f32], out: *mut bf16, stride: usize) {
    for (row, sums) in sums.as_chunks::<NR>().0.iter().enumerate() {
        // SAFETY: a row of sums is two registers; the rest is promised by the caller.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums[16..].as_ptr()));
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.add(row * stride).cast(), rounded);
        }
    }
}
