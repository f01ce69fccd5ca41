//! Rows of activations times a panel of codes, in AVX2 registers.
//!
//! A lane is a row of the panel, as in the kernels for AVX-512; half a panel fills a register.
use super::LANES;
use super::activations::{Integers, is_four};
use super::matrix::{Panel, Scales, Scheme, Tile};
use super::product::ROWS;
use crate::isa::Isa;
use std::arch::x86_64::*;

/// Lanes of a register.
const WIDTH: usize = LANES / 2;

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// Eight scales of a group.
///
/// # Safety
/// `first + 8` scales are there, and the processor has AVX2.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn scales(scales: &Scales, first: usize) -> __m256 {
    // SAFETY: promised by the caller.
    unsafe {
        match scales {
            Scales::Bf16(scales) => {
                let bits = _mm_loadu_si128(scales.as_ptr().add(first).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
            }
            Scales::F32(scales) => _mm256_loadu_ps(scales.as_ptr().add(first)),
        }
    }
}

/// Up to [`ROWS`] rows of 15-bit integers times a panel of integer codes.
pub(super) fn int_rows(panel: Panel<'_>, x: &Integers<i16>, rows: &[u32], out: &mut [f32], stride: usize) {
    assert!(x.stride >= panel.stack.dims.columns.next_multiple_of(8) && x.groups == panel.stack.groups());
    assert!(panel.group_start(x.groups) <= panel.stack.scales.len());
    assert!(out.len() >= (rows.len() - 1) * stride + LANES);
    let mut ptrs = [(std::ptr::null::<i16>(), 0); ROWS];
    for (ptr, i) in ptrs.iter_mut().zip(rows) {
        let i = *i as usize;
        *ptr = (x.values[i * x.stride..(i + 1) * x.stride].as_ptr(), i * x.groups);
    }
    let is_four = is_four(panel.stack.scheme);
    for (ptrs, out) in parts(&ptrs[..rows.len()], out, stride) {
        let out = out.as_mut_ptr();
        // SAFETY: rows, scales and results are in bounds as asserted, and words are made only where the processor has
        // AVX2.
        unsafe {
            match (ptrs.len(), is_four) {
                (1, true) => int_kernel::<1, true>(panel, x, ptrs, out, stride),
                (1, false) => int_kernel::<1, false>(panel, x, ptrs, out, stride),
                (2, true) => int_kernel::<2, true>(panel, x, ptrs, out, stride),
                (2, false) => int_kernel::<2, false>(panel, x, ptrs, out, stride),
                (_, true) => int_kernel::<3, true>(panel, x, ptrs, out, stride),
                (_, false) => int_kernel::<3, false>(panel, x, ptrs, out, stride),
            }
        }
    }
}

/// Rows in nearly equal parts of up to three, whose sums fit the registers beside the codes, and where their results begin.
fn parts<'a, T>(
    rows: &'a [T],
    out: &'a mut [f32],
    stride: usize,
) -> impl Iterator<Item = (&'a [T], &'a mut [f32])> {
    let size = rows.len().div_ceil(rows.len().div_ceil(3));
    rows.chunks(size).zip(out.chunks_mut(size * stride))
}

/// # Safety
/// The first `R` of `rows` point to words of the panel's columns, `out` takes `R` rows of 16 sums, `stride` apart, and the
/// processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn int_kernel<const R: usize, const FOUR: bool>(
    panel: Panel<'_>,
    x: &Integers<i16>,
    rows: &[(*const i16, usize)],
    out: *mut f32,
    stride: usize,
) {
    // Of a length known to the compiler, so that the sums of rows stay in registers.
    let rows = rows.first_chunk::<R>().expect("as many rows as promised");
    let stack = panel.stack;
    let Scheme::Int { bits, group_size, .. } = stack.scheme else { unreachable!("integer codes") };
    let per_group = group_size / stack.scheme.tile_columns();
    // Columns 0 and 2 of four, in 16 bits each.
    let even = _mm256_set1_epi32(if FOUR { 0x000f_000f } else { 0x00ff_00ff });
    let middle = _mm256_set1_epi32(i32::from(bits.middle()));
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for (group, tiles) in panel.tiles.chunks(per_group).enumerate() {
        let lanes = panel.group_start(group);
        // SAFETY: groups, columns and rows are in bounds as promised; a tile holds 64 bytes.
        unsafe {
            let mut totals = [[_mm256_setzero_si256(); 2]; R];
            for (half, first) in [lanes, lanes + WIDTH].into_iter().enumerate() {
                let zero = if stack.zeros.is_empty() {
                    middle
                } else {
                    _mm256_cvtepu8_epi32(_mm_loadl_epi64(stack.zeros.as_ptr().add(first).cast()))
                };
                for r in 0..R {
                    let sum = *x.sums.get_unchecked(rows[r].1 + group);
                    totals[r][half] = _mm256_mullo_epi32(zero, _mm256_set1_epi32(-sum));
                }
            }
            let mut column = group * group_size;
            for tile in tiles {
                if R <= 2 {
                    // The processor itself fetches ahead only within a page.
                    _mm_prefetch::<_MM_HINT_T0>(tile.0.as_ptr().wrapping_add(PAGE).cast());
                }
                let [a, b] = load(tile);
                // Shifted so that the codes of a pair of columns are the lowest of their 16 bits.
                add_pair(&mut totals, rows, column, even, [a, b]);
                let next = [_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b)];
                add_pair(&mut totals, rows, column + 2, even, next);
                if FOUR {
                    let next = [_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
                    add_pair(&mut totals, rows, column + 4, even, next);
                    let next = [_mm256_srli_epi16::<12>(a), _mm256_srli_epi16::<12>(b)];
                    add_pair(&mut totals, rows, column + 6, even, next);
                }
                column += if FOUR { 8 } else { 4 };
            }
            let scales = [scales(&stack.scales, lanes), scales(&stack.scales, lanes + WIDTH)];
            for r in 0..R {
                let factor = _mm256_set1_ps(*x.scales.get_unchecked(rows[r].1 + group));
                for half in 0..2 {
                    let (total, scale) = (_mm256_cvtepi32_ps(totals[r][half]), scales[half]);
                    sums[r][half] = _mm256_fmadd_ps(total, _mm256_mul_ps(scale, factor), sums[r][half]);
                }
            }
        }
    }
    for (row, [a, b]) in sums.into_iter().enumerate() {
        // SAFETY: `out` takes the rows.
        unsafe {
            _mm256_storeu_ps(out.add(row * stride), a);
            _mm256_storeu_ps(out.add(row * stride + WIDTH), b);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(tile: &Tile) -> [__m256i; 2] {
    // SAFETY: a tile is 64 bytes, aligned to as many.
    unsafe { [_mm256_load_si256(tile.0.as_ptr().cast()), _mm256_load_si256(tile.0.as_ptr().add(32).cast())] }
}

/// Adds the products of two columns of codes with each row's words of them.
///
/// # Safety
/// The first `R` of `rows` point to words of `column` and the next, and the processor has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_pair<const R: usize>(
    totals: &mut [[__m256i; 2]; R],
    rows: &[(*const i16, usize); R],
    column: usize,
    mask: __m256i,
    [a, b]: [__m256i; 2],
) {
    let (a, b) = (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    for r in 0..R {
        // SAFETY: promised by the caller.
        let pair = _mm256_set1_epi32(unsafe { rows[r].0.add(column).cast::<i32>().read_unaligned() });
        totals[r][0] = _mm256_add_epi32(totals[r][0], _mm256_madd_epi16(a, pair));
        totals[r][1] = _mm256_add_epi32(totals[r][1], _mm256_madd_epi16(b, pair));
    }
}

/// Whether [`fp8_rows`] multiplies with this panel.
pub(super) fn has_fp8(isa: Isa, panel: Panel<'_>) -> bool {
    matches!(panel.stack.scheme, Scheme::Fp8 { .. }) && isa >= Isa::Avx2 && is_x86_feature_detected!("f16c")
}

/// Up to [`ROWS`] rows of floats times a panel of FP8 codes, where [`has_fp8`].
pub(super) fn fp8_rows(
    panel: Panel<'_>,
    x: &[f32],
    x_stride: usize,
    rows: &[u32],
    out: &mut [f32],
    stride: usize,
) {
    assert!(x_stride >= panel.tiles.len() * 4);
    assert!(panel.group_start(panel.stack.groups()) <= panel.stack.scales.len());
    assert!(out.len() >= (rows.len() - 1) * stride + LANES);
    let mut ptrs = [std::ptr::null::<f32>(); ROWS];
    for (ptr, i) in ptrs.iter_mut().zip(rows) {
        *ptr = x[*i as usize * x_stride..(*i as usize + 1) * x_stride].as_ptr();
    }
    for (ptrs, out) in parts(&ptrs[..rows.len()], out, stride) {
        let out = out.as_mut_ptr();
        // SAFETY: rows, scales and results are in bounds as asserted; `has_fp8` looked for the instructions.
        unsafe {
            match ptrs.len() {
                1 => fp8_kernel::<1>(panel, ptrs, out, stride),
                2 => fp8_kernel::<2>(panel, ptrs, out, stride),
                _ => fp8_kernel::<3>(panel, ptrs, out, stride),
            }
        }
    }
}

/// Registers of sums of a row: each holds those of four rows of the panel, in two parts.
const PARTS: usize = 4;

/// # Safety
/// The first `R` of `rows` point to as many floats as the panel's tiles have columns, `out` takes `R` rows of 16 sums,
/// `stride` apart, and the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fp8_kernel<const R: usize>(panel: Panel<'_>, rows: &[*const f32], out: *mut f32, stride: usize) {
    let rows = rows.first_chunk::<R>().expect("as many rows as promised");
    let stack = panel.stack;
    let per_group = stack.scheme.group().div_ceil(4);
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for (group, tiles) in panel.tiles.chunks(per_group).enumerate() {
        let mut totals = [[_mm256_setzero_ps(); PARTS]; R];
        let mut column = group * per_group * 4;
        // SAFETY: groups, columns and rows are in bounds as promised; a tile holds 64 bytes.
        unsafe {
            for tile in tiles {
                if R <= 2 {
                    _mm_prefetch::<_MM_HINT_T0>(tile.0.as_ptr().wrapping_add(PAGE).cast());
                }
                let [a, b] = load(tile);
                // Columns 0 and 2 of four, then 1 and 3, as the upper bytes of their 16 bits.
                let even = [_mm256_slli_epi16::<8>(a), _mm256_slli_epi16::<8>(b)];
                add_codes::<R, 0b10_00_10_00>(&mut totals, rows, column, even);
                add_codes::<R, 0b11_01_11_01>(&mut totals, rows, column, [a, b]);
                column += 4;
            }
            let lanes = panel.group_start(group);
            for half in 0..2 {
                // Codes count 2^-8: see `add_codes`.
                let scale = _mm256_mul_ps(scales(&stack.scales, lanes + half * WIDTH), _mm256_set1_ps(256.0));
                for r in 0..R {
                    let both = _mm256_hadd_ps(totals[r][2 * half], totals[r][2 * half + 1]);
                    let both = _mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(both));
                    sums[r][half] = _mm256_fmadd_ps(_mm256_castpd_ps(both), scale, sums[r][half]);
                }
            }
        }
    }
    for (row, [a, b]) in sums.into_iter().enumerate() {
        // SAFETY: `out` takes the rows.
        unsafe {
            _mm256_storeu_ps(out.add(row * stride), a);
            _mm256_storeu_ps(out.add(row * stride + WIDTH), b);
        }
    }
}

/// Adds the products of two of four columns of codes, those that `ORDER` picks, with each row's floats. Codes are the upper
/// bytes of 16 bits.
///
/// # Safety
/// The first `R` of `rows` point to floats of `column` and the next three, and the processor has AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_codes<const R: usize, const ORDER: i32>(
    totals: &mut [[__m256; PARTS]; R],
    rows: &[*const f32; R],
    column: usize,
    codes: [__m256i; 2],
) {
    // With its sign, exponent and mantissa there, a code is a half float of 2^-8 times its value, subnormal or not.
    let places = _mm256_set1_epi16(0xbf80u16.cast_signed());
    let mut x = [_mm256_setzero_ps(); R];
    for r in 0..R {
        // SAFETY: promised by the caller.
        let four = unsafe { _mm_loadu_ps(rows[r].add(column)) };
        x[r] = _mm256_permute_ps::<ORDER>(_mm256_set_m128(four, four));
    }
    for half in 0..2 {
        let halves = _mm256_and_si256(_mm256_srai_epi16::<1>(codes[half]), places);
        let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
        for r in 0..R {
            totals[r][2 * half] = _mm256_fmadd_ps(x[r], low, totals[r][2 * half]);
            totals[r][2 * half + 1] = _mm256_fmadd_ps(x[r], high, totals[r][2 * half + 1]);
        }
    }
}
