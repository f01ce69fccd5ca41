//! Rows of activations times a panel of codes, in AVX-512 registers.
//!
//! A lane is a row of the panel, so that nothing is ever added across lanes.
use super::LANES;
use super::activations::{Integers, is_four};
use super::matrix::{Panel, Scales, Scheme, Tile};
use super::product::ROWS;
use half::bf16;
use std::arch::x86_64::*;

/// Calls `$kernel::<rows, ..>` for `rows` in `1..=ROWS`.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident[$($generic:literal),*]($($arg:expr),*)) => {
        match $rows {
            1 => $kernel::<1, $($generic),*>($($arg),*),
            2 => $kernel::<2, $($generic),*>($($arg),*),
            3 => $kernel::<3, $($generic),*>($($arg),*),
            4 => $kernel::<4, $($generic),*>($($arg),*),
            5 => $kernel::<5, $($generic),*>($($arg),*),
            ROWS => $kernel::<ROWS, $($generic),*>($($arg),*),
            rows => unreachable!("a block of {rows} rows"),
        }
    };
}

/// Where the sums of a block of rows go.
#[derive(Clone, Copy)]
struct Out {
    ptr: *mut f32,
    stride: usize,
}

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// Asks for the codes a page after `tile`: the processor itself fetches ahead only within a page. Many rows take their
/// time with a tile, so that it keeps up alone.
#[inline(always)]
fn fetch_ahead<const ROWS: usize>(tile: &Tile) {
    if ROWS <= 2 {
        // SAFETY: a prefetch may point anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(tile.0.as_ptr().wrapping_add(PAGE).cast()) };
    }
}

/// Scales of a group.
///
/// # Safety
/// `first + 16` scales are there, and the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn scales(scales: &Scales, first: usize) -> __m512 {
    // SAFETY: promised by the caller.
    unsafe {
        match scales {
            Scales::Bf16(scales) => {
                let bits = _mm256_loadu_si256(scales.as_ptr().add(first).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
            }
            Scales::F32(scales) => _mm512_loadu_ps(scales.as_ptr().add(first)),
        }
    }
}

/// Up to [`ROWS`] rows of 15-bit integers times a panel of integer codes.
pub(super) fn int_rows(panel: Panel<'_>, x: &Integers<i8>, rows: &[u32], out: &mut [f32], stride: usize) {
    let row = |i: &u32| {
        let i = *i as usize;
        // Both ends are in bounds.
        (x.values[i * 2 * x.stride..(i + 1) * 2 * x.stride].as_ptr(), i * x.groups)
    };
    let mut ptrs = [(std::ptr::null::<i8>(), 0); ROWS];
    for (ptr, i) in ptrs.iter_mut().zip(rows) {
        *ptr = row(i);
    }
    assert!(x.stride >= panel.stack.dims.columns.next_multiple_of(8) && x.groups == panel.stack.groups());
    assert!(panel.group_start(x.groups) <= panel.stack.scales.len());
    assert!(out.len() >= (rows.len() - 1) * stride + LANES);
    let out = Out { ptr: out.as_mut_ptr(), stride };
    // SAFETY: rows, scales and results are in bounds as asserted, and digits are made only where the processor has
    // AVX-512 VNNI.
    unsafe {
        if is_four(panel.stack.scheme) {
            by_rows!(rows.len(), int_kernel[true](panel, x, ptrs, out));
        } else {
            by_rows!(rows.len(), int_kernel[false](panel, x, ptrs, out));
        }
    }
}

/// # Safety
/// The first `R` of `rows` point to digits of the panel's columns, `out` takes `R` rows of 16 sums, and the processor
/// has AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn int_kernel<const R: usize, const FOUR: bool>(
    panel: Panel<'_>,
    x: &Integers<i8>,
    rows: [(*const i8, usize); ROWS],
    out: Out,
) {
    let stack = panel.stack;
    let Scheme::Int { bits, group_size, .. } = stack.scheme else { unreachable!("integer codes") };
    let per_group = group_size / stack.scheme.tile_columns();
    let nibble = _mm512_set1_epi8(0x0f);
    let middle = _mm512_set1_epi32(i32::from(bits.middle()));
    let mut sums = [_mm512_setzero_ps(); R];
    for (group, tiles) in panel.tiles.chunks(per_group).enumerate() {
        let lanes = panel.group_start(group);
        // SAFETY: groups, columns and rows are in bounds as promised; a tile holds 64 bytes.
        unsafe {
            let zero = if stack.zeros.is_empty() {
                middle
            } else {
                _mm512_cvtepu8_epi32(_mm_loadu_si128(stack.zeros.as_ptr().add(lanes).cast()))
            };
            // One row alone needs two chains of sums a digit to hide the latency.
            let mut high = [[_mm512_setzero_si512(); 2]; R];
            let mut low = high;
            for (low, (_, first)) in low.iter_mut().zip(&rows[..R]) {
                let sum = *x.sums.get_unchecked(first + group);
                low[0] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(-sum));
            }
            let mut step = |codes: __m512i, column: usize, chain: usize| {
                for r in 0..R {
                    let word =
                        |from: *const i8| _mm512_set1_epi32(from.add(column).cast::<i32>().read_unaligned());
                    let chain = if R == 1 { chain } else { 0 };
                    high[r][chain] = _mm512_dpbusd_epi32(high[r][chain], codes, word(rows[r].0));
                    low[r][chain] = _mm512_dpbusd_epi32(low[r][chain], codes, word(rows[r].0.add(x.stride)));
                }
            };
            let load = |tile: &Tile| {
                fetch_ahead::<R>(tile);
                _mm512_load_si512(tile.0.as_ptr().cast())
            };
            let first = group * group_size;
            if FOUR {
                for (i, tile) in tiles.iter().enumerate() {
                    let codes = load(tile);
                    step(_mm512_and_si512(codes, nibble), first + 8 * i, 0);
                    step(_mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibble), first + 8 * i + 4, 1);
                }
            } else {
                let (pairs, last) = tiles.as_chunks::<2>();
                for (i, [a, b]) in pairs.iter().enumerate() {
                    step(load(a), first + 8 * i, 0);
                    step(load(b), first + 8 * i + 4, 1);
                }
                if let [last] = last {
                    step(load(last), first + 8 * pairs.len(), 0);
                }
            }
            let scale = scales(&stack.scales, lanes);
            for r in 0..R {
                let [high, low] =
                    [high[r], low[r]].map(|s| if R == 1 { _mm512_add_epi32(s[0], s[1]) } else { s[0] });
                let total = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
                let factor = _mm512_set1_ps(*x.scales.get_unchecked(rows[r].1 + group));
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(scale, factor), sums[r]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        // SAFETY: `out` takes the rows.
        unsafe { _mm512_storeu_ps(out.ptr.add(r * out.stride), sums) };
    }
}

/// Up to [`ROWS`] rows of bf16 times a panel of FP8 codes.
pub(super) fn fp8_rows(
    panel: Panel<'_>,
    x: &[bf16],
    x_stride: usize,
    rows: &[u32],
    out: &mut [f32],
    stride: usize,
) {
    let mut ptrs = [std::ptr::null::<bf16>(); ROWS];
    for (ptr, i) in ptrs.iter_mut().zip(rows) {
        *ptr = x[*i as usize * x_stride..(*i as usize + 1) * x_stride].as_ptr();
    }
    assert!(x_stride >= panel.tiles.len() * 4);
    assert!(panel.group_start(panel.stack.groups()) <= panel.stack.scales.len());
    assert!(out.len() >= (rows.len() - 1) * stride + LANES);
    let out = Out { ptr: out.as_mut_ptr(), stride };
    // SAFETY: rows, scales and results are in bounds as asserted, and bf16 activations are made only where the
    // processor has AVX-512 BF16 and VBMI.
    unsafe { by_rows!(rows.len(), fp8_kernel[](panel, ptrs, out)) }
}

/// Bytes of bf16 numbers by the lower 7 bits of an e4m3 code: low bytes, then high bytes.
static BF16_BYTES: [[u8; 128]; 2] = {
    let mut bytes = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        let (exponent, mantissa) = (code as u16 >> 3, code as u16 & 7);
        let bits = if code == 127 {
            0x7fc0
        } else if exponent > 0 {
            ((exponent + 120) << 7) | (mantissa << 4)
        } else if mantissa == 0 {
            0
        } else {
            // mantissa * 2^-9, normalised.
            let top = mantissa.ilog2() as u16;
            ((127 - 9 + top) << 7) | (((mantissa << (3 - top)) & 7) << 4)
        };
        bytes[0][code] = bits as u8;
        bytes[1][code] = (bits >> 8) as u8;
        code += 1;
    }
    bytes
};

/// Byte positions that put columns 0 and 1 (then 2 and 3) of each row side by side: 64 and above mean high bytes.
static PAIRS: [[u8; 64]; 2] = {
    let mut order = [[0; 64]; 2];
    let mut i = 0;
    while i < 64 {
        let code = i as u8 / 4 * 4 + i as u8 % 4 / 2;
        let byte = 64 * (i as u8 % 2);
        order[0][i] = code + byte;
        order[1][i] = code + 2 + byte;
        i += 1;
    }
    order
};

/// # Safety
/// The first `R` of `rows` point to as many bf16 as the panel's tiles have columns, `out` takes `R` rows of 16 sums,
/// and the processor has AVX-512 BF16 and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn fp8_kernel<const R: usize>(panel: Panel<'_>, rows: [*const bf16; ROWS], out: Out) {
    let stack = panel.stack;
    let per_group = stack.scheme.group().div_ceil(4);
    // SAFETY: both types are 64 plain bytes.
    let pairs = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
    // SAFETY: the tables hold as many bytes.
    let load = |from: &[u8]| unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
    let [low, high] = [&BF16_BYTES[0], &BF16_BYTES[1]].map(|table| [load(&table[..64]), load(&table[64..])]);
    let order = [load(&PAIRS[0]), load(&PAIRS[1])];
    let sign = _mm512_set1_epi8(-128);
    let mut sums = [_mm512_setzero_ps(); R];
    for (group, tiles) in panel.tiles.chunks(per_group).enumerate() {
        let mut parts = [[_mm512_setzero_ps(); 2]; R];
        let mut column = group * per_group * 4;
        // SAFETY: groups, columns and rows are in bounds as promised; a tile holds 64 bytes.
        unsafe {
            for tile in tiles {
                fetch_ahead::<R>(tile);
                let codes = _mm512_load_si512(tile.0.as_ptr().cast());
                // The lookup takes the lower 7 bits of each code.
                let low = _mm512_permutex2var_epi8(low[0], codes, low[1]);
                let high = _mm512_permutex2var_epi8(high[0], codes, high[1]);
                let high = _mm512_or_si512(high, _mm512_and_si512(codes, sign));
                for (half, order) in order.into_iter().enumerate() {
                    let w = pairs(_mm512_permutex2var_epi8(low, order, high));
                    for r in 0..R {
                        let at = rows[r].add(column + 2 * half).cast::<i32>();
                        let x = pairs(_mm512_set1_epi32(at.read_unaligned()));
                        parts[r][half] = _mm512_dpbf16_ps(parts[r][half], w, x);
                    }
                }
                column += 4;
            }
            let scale = scales(&stack.scales, panel.group_start(group));
            for (sum, [a, b]) in sums.iter_mut().zip(parts) {
                *sum = _mm512_fmadd_ps(_mm512_add_ps(a, b), scale, *sum);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        // SAFETY: `out` takes the rows.
        unsafe { _mm512_storeu_ps(out.ptr.add(r * out.stride), sums) };
    }
}
