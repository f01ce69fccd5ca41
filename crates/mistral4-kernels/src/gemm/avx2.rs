//! Register tiles of up to 6 x 16 or 3 x 32 sums for AVX2 with fused multiply-add.
use super::panel::{Bf16Pair, MR, NR, TileOut};
use super::upcoming::{Fetch, LINE, Piece};
use std::arch::x86_64::*;

/// Floats in a register.
const WIDTH: usize = 8;
/// Registers across a panel.
const ACROSS: usize = NR / WIDTH;
/// Rows whose sums over half a panel fill 12 of the 16 registers; half as many take the whole panel at once.
const ROWS: usize = 6;

/// Calls `$kernel::<rows, registers across>` for parts of nearly equal height of `$rows` in `1..=MR` rows.
macro_rules! by_parts {
    ($rows:expr, $kernel:ident($steps:expr, $a:expr, $b:expr, $out:expr, $next:expr)) => {{
        debug_assert!((1..=MR).contains(&$rows));
        let parts = $rows.div_ceil(ROWS);
        let mut next = Fetch::new($next, $steps);
        for part in 0..parts {
            let (first, end) = ($rows * part / parts, $rows * (part + 1) / parts);
            let a = Left { ptr: $a.add(first), stride: $rows };
            let out = TileOut { ptr: $out.ptr.add(first * $out.stride), ..$out };
            let half = TileOut { ptr: out.ptr.add(NR / 2), ..out };
            match end - first {
                1 => $kernel::<1, ACROSS>($steps, a, $b, out, &mut next),
                2 => $kernel::<2, ACROSS>($steps, a, $b, out, &mut next),
                3 => $kernel::<3, ACROSS>($steps, a, $b, out, &mut next),
                4 => {
                    $kernel::<4, 2>($steps, a, $b, out, &mut next);
                    $kernel::<4, 2>($steps, a, $b.add(NR / 2), half, &mut next);
                }
                5 => {
                    $kernel::<5, 2>($steps, a, $b, out, &mut next);
                    $kernel::<5, 2>($steps, a, $b.add(NR / 2), half, &mut next);
                }
                _ => {
                    $kernel::<6, 2>($steps, a, $b, out, &mut next);
                    $kernel::<6, 2>($steps, a, $b.add(NR / 2), half, &mut next);
                }
            }
        }
    }};
}

/// Some rows of a left tile.
#[derive(Clone, Copy)]
struct Left<P> {
    ptr: *const P,
    /// Rows of the whole tile: the distance between steps.
    stride: usize,
}

/// # Safety
/// `out` addresses `R` rows of `C * WIDTH` writable floats.
#[target_feature(enable = "avx2")]
unsafe fn store<const R: usize, const C: usize>(sums: [[__m256; C]; R], out: TileOut) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (column, sum) in sums.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe {
                let target = out.ptr.add(row * out.stride + column * WIDTH);
                let sum = if out.accumulate { _mm256_add_ps(sum, _mm256_loadu_ps(target)) } else { sum };
                _mm256_storeu_ps(target, sum);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn f32_rows<const R: usize, const C: usize>(
    steps: usize,
    a: Left<f32>,
    b: *const f32,
    out: TileOut,
    next: &mut Fetch,
) {
    let mut sums = [[_mm256_setzero_ps(); C]; R];
    for step in 0..steps {
        next.line();
        // SAFETY: `a` addresses `R` rows and `b` `C * WIDTH` of `NR` columns in each of `steps` steps.
        unsafe {
            let (a, b) = (a.ptr.add(step * a.stride), b.add(step * NR));
            let mut right = [_mm256_setzero_ps(); C];
            for (column, right) in right.iter_mut().enumerate() {
                *right = _mm256_loadu_ps(b.add(column * WIDTH));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*a.add(row));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm256_fmadd_ps(x, right, *sum);
                }
            }
        }
    }
    // SAFETY: promised by the caller.
    unsafe { store(sums, out) }
}

/// # Safety
/// `a` holds `steps * rows` and `b` `steps * NR` elements, `out` addresses `rows` rows of `NR` floats, and
/// the processor has AVX2 and FMA.
pub(super) unsafe fn tile_f32(
    rows: usize,
    steps: usize,
    a: *const f32,
    b: *const f32,
    out: TileOut,
    next: Piece,
) {
    // SAFETY: the parts lie inside what the caller promised.
    unsafe { by_parts!(rows, f32_rows(steps, a, b, out, next)) }
}

/// The first of each pair.
#[inline]
#[target_feature(enable = "avx2")]
fn low(pairs: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs))
}

/// The second of each pair.
#[inline]
#[target_feature(enable = "avx2")]
fn high(pairs: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32.cast_signed())))
}

/// How far ahead, in bytes, few rows ask for weights: they pass faster than memory brings them unasked, as the processor
/// itself fetches ahead only within a page.
const AHEAD: usize = 4096;

#[target_feature(enable = "avx2,fma")]
unsafe fn bf16_rows<const R: usize, const C: usize>(
    steps: usize,
    a: Left<Bf16Pair>,
    b: *const Bf16Pair,
    out: TileOut,
    next: &mut Fetch,
) {
    // The products of one row alone would wait for each other.
    let chains = if R == 1 { 2 } else { 1 };
    let mut sums = [[[_mm256_setzero_ps(); C]; R]; 2];
    for step in 0..steps {
        next.line();
        // SAFETY: `a` addresses `R` rows and `b` `C * WIDTH` of `NR` columns in each of `steps` steps.
        unsafe {
            let (a, b) = (a.ptr.add(step * a.stride), b.add(step * NR));
            if R <= 2 {
                _mm_prefetch::<_MM_HINT_T0>(b.cast::<i8>().wrapping_add(AHEAD));
                _mm_prefetch::<_MM_HINT_T0>(b.cast::<i8>().wrapping_add(AHEAD + LINE));
            }
            let mut right = [_mm256_setzero_ps(); C];
            for (column, right) in right.iter_mut().enumerate() {
                *right = low(_mm256_loadu_si256(b.add(column * WIDTH).cast()));
            }
            for (row, sums) in sums[0].iter_mut().enumerate() {
                let x = low(_mm256_set1_epi32((*a.add(row)).0.cast_signed()));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm256_fmadd_ps(x, right, *sum);
                }
            }
            for (column, right) in right.iter_mut().enumerate() {
                *right = high(_mm256_loadu_si256(b.add(column * WIDTH).cast()));
            }
            for (row, sums) in sums[chains - 1].iter_mut().enumerate() {
                let x = high(_mm256_set1_epi32((*a.add(row)).0.cast_signed()));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm256_fmadd_ps(x, right, *sum);
                }
            }
        }
    }
    let [mut sums, second] = sums;
    if chains == 2 {
        for (sum, second) in sums.iter_mut().flatten().zip(second.into_iter().flatten()) {
            *sum = _mm256_add_ps(*sum, second);
        }
    }
    // SAFETY: promised by the caller.
    unsafe { store(sums, out) }
}

/// # Safety
/// `a` holds `steps * rows` and `b` `steps * NR` elements, `out` addresses `rows` rows of `NR` floats, and
/// the processor has AVX2 and FMA.
pub(super) unsafe fn tile_bf16(
    rows: usize,
    steps: usize,
    a: *const Bf16Pair,
    b: *const Bf16Pair,
    out: TileOut,
    next: Piece,
) {
    // SAFETY: the parts lie inside what the caller promised.
    unsafe { by_parts!(rows, bf16_rows(steps, a, b, out, next)) }
}
