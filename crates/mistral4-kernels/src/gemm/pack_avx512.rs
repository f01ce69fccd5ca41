//! Packing with AVX-512: 16 x 16 transposes of 32-bit steps, and interleaving of rows.
use super::panel::{NR, Panel};
use crate::element::Element;
use crate::vector::side_by_side;
use std::arch::x86_64::*;

/// Steps, and lanes, handled at once.
const N: usize = 16;

/// Bytes by which a lane is fetched ahead of its use.
const LANE_AHEAD: usize = 512;
/// Rows by which rows are fetched ahead of their use.
const ROWS_AHEAD: usize = 16;

/// The lowest `count` bits, at most 16.
#[inline(always)]
fn mask16(count: usize) -> u16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// The lowest `count` bits, at most 32.
#[inline(always)]
fn mask32(count: usize) -> u32 {
    if count >= 32 { u32::MAX } else { (1 << count) - 1 }
}

/// Rounds to bf16, in the low half of each 32 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet))
}

/// Up to 16 elements as `f32`, zero past `count`.
///
/// # Safety
/// `count.min(16)` elements are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_f32<T: Element>(from: *const T, count: usize) -> __m512 {
    let mask = mask16(count);
    // SAFETY: the mask covers readable elements only.
    unsafe {
        if T::IS_BF16 {
            let bits = _mm256_maskz_loadu_epi16(mask, from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        } else {
            _mm512_maskz_loadu_ps(mask, from.cast())
        }
    }
}

/// Two times 16 floats rounded to bf16, in order.
///
/// # Safety
/// With `NATIVE`, the processor has AVX-512 BF16.
#[inline(always)]
unsafe fn narrow<const NATIVE: bool>(low: __m512, high: __m512) -> __m512i {
    /// Numbers below 2^-126 become zero, as which the products take them anyway.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn native(low: __m512, high: __m512) -> __m512i {
        // SAFETY: both types are 64 plain bytes.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn by_hand(low: __m512, high: __m512) -> __m512i {
        let low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(round(low)));
        _mm512_inserti64x4::<1>(low, _mm512_cvtepi32_epi16(round(high)))
    }
    // SAFETY: promised by the caller; everything here is called on processors with AVX-512 alone.
    unsafe { if NATIVE { native(low, high) } else { by_hand(low, high) } }
}

/// 16 steps of one lane whose elements are neighbours, zero past `count` elements.
///
/// # Safety
/// `count.min(16 * STEP)` elements are readable; `NATIVE` as for [`narrow`].
#[inline(always)]
unsafe fn load_steps<P: Panel, T: Element, const NATIVE: bool>(from: *const T, count: usize) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe {
        if P::STEP == 1 {
            _mm512_castps_si512(load_f32(from, count))
        } else if T::IS_BF16 {
            _mm512_maskz_loadu_epi16(mask32(count), from.cast())
        } else {
            let rest = count.saturating_sub(N);
            let high = load_f32(if rest > 0 { from.add(N) } else { from }, rest);
            narrow::<NATIVE>(load_f32(from, count), high)
        }
    }
}

/// Two rows of bf16 in two registers, and both in one, side by side.
static TWO_REGISTERS: [u16; 2 * N] = side_by_side(0, 32);
static ONE_REGISTER: [u16; 2 * N] = side_by_side(0, 16);

/// Up to 16 steps of two rows, zero past `count` lanes; without a second row its elements are zeros.
///
/// # Safety
/// `count.min(16)` elements of each row are readable; `NATIVE` as for [`narrow`].
#[inline(always)]
unsafe fn interleave<P: Panel, T: Element, const NATIVE: bool>(
    first: *const T,
    second: Option<*const T>,
    count: usize,
) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe {
        if P::STEP == 1 {
            return _mm512_castps_si512(load_f32(first, count));
        }
        if T::IS_BF16 {
            let load =
                |row: *const T| _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask16(count), row.cast()));
            let order = _mm512_loadu_si512(TWO_REGISTERS.as_ptr().cast());
            let second = second.map_or(_mm512_setzero_si512(), load);
            return _mm512_permutex2var_epi16(load(first), order, second);
        }
        let order = _mm512_loadu_si512(ONE_REGISTER.as_ptr().cast());
        let second = second.map_or(_mm512_setzero_ps(), |row| load_f32(row, count));
        _mm512_permutexvar_epi16(order, narrow::<NATIVE>(load_f32(first, count), second))
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn transpose(r: [__m512i; N]) -> [__m512i; N] {
    let mut a = r;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Columns 4q + j of four rows each, in the 128-bit parts q.
    let mut b = a;
    for i in 0..4 {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    let mut out = r;
    for j in 0..4 {
        let low_even = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
        let low_odd = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
        let high_even = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
        let high_odd = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(low_even, high_even);
        out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low_even, high_even);
        out[4 + j] = _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(low_odd, high_odd);
    }
    out
}

/// Declares `name(native, ..)`, which runs `body::<P, T, NATIVE>(..)` compiled for AVX-512 with or without BF16.
macro_rules! compiled {
    ($(#[$meta:meta])* fn $name:ident = $body:ident;) => {
        $(#[$meta])*
        pub(super) unsafe fn $name<P: Panel, T: Element>(
            native: bool,
            shape: [usize; 3],
            source: impl Fn(usize) -> *const T,
            out: *mut P,
        ) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
            unsafe fn with<P: Panel, T: Element>(shape: [usize; 3], source: impl Fn(usize) -> *const T, out: *mut P) {
                // SAFETY: promised by the caller.
                unsafe { $body::<P, T, true>(shape, source, out) }
            }
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            unsafe fn without<P: Panel, T: Element>(shape: [usize; 3], source: impl Fn(usize) -> *const T, out: *mut P) {
                // SAFETY: promised by the caller.
                unsafe { $body::<P, T, false>(shape, source, out) }
            }
            // SAFETY: promised by the caller.
            unsafe { if native { with(shape, source, out) } else { without(shape, source, out) } }
        }
    };
}

compiled! {
    /// See [`super::pack::pack_lanes`]; `[depth, lanes, width]`, and the pointer to each lane.
    ///
    /// # Safety
    /// The processor has AVX-512, with BF16 if `native`. Each of `lanes <= width` lanes has `depth` readable elements,
    /// `out` holds `steps * width` elements.
    fn pack_lanes = pack_lanes_body;
}

compiled! {
    /// See [`super::pack::pack_rows`]; `[depth, lanes, width]`, and the pointer to each row.
    ///
    /// # Safety
    /// The processor has AVX-512, with BF16 if `native`. Each of `depth` rows has `lanes <= width` readable elements,
    /// `out` holds `steps * width` elements.
    fn pack_rows = pack_rows_body;
}

/// See [`pack_lanes`].
#[inline(always)]
unsafe fn pack_lanes_body<P: Panel, T: Element, const NATIVE: bool>(
    [depth, lanes, width]: [usize; 3],
    lane: impl Fn(usize) -> *const T,
    out: *mut P,
) {
    let steps = depth.div_ceil(P::STEP);
    for group in (0..width).step_by(N) {
        let used = lanes.saturating_sub(group).min(N);
        let store = mask16(width - group);
        let mut sources = [std::ptr::null::<T>(); N];
        for (i, source) in sources.iter_mut().enumerate().take(used) {
            *source = lane(group + i);
        }
        for first in (0..steps).step_by(N) {
            let element = first * P::STEP;
            // SAFETY: `depth - element` elements remain in each lane; a prefetch may point anywhere.
            let columns = unsafe {
                let mut rows = [_mm512_setzero_si512(); N];
                for (row, source) in rows.iter_mut().zip(&sources[..used]) {
                    let ahead = source.wrapping_add(element).wrapping_byte_add(LANE_AHEAD);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    *row = load_steps::<P, T, NATIVE>(source.add(element), depth - element);
                }
                transpose(rows)
            };
            let count = steps - first;
            // SAFETY: the step is below `steps`, and the mask ends at `width`.
            let write = |step: usize, column: __m512i| unsafe {
                let target = out.add((first + step) * width + group);
                _mm512_mask_storeu_epi32(target.cast(), store, column);
            };
            for (step, column) in columns.into_iter().enumerate() {
                if step < count {
                    write(step, column);
                }
            }
        }
    }
}

/// See [`pack_rows`].
#[inline(always)]
unsafe fn pack_rows_body<P: Panel, T: Element, const NATIVE: bool>(
    [depth, lanes, width]: [usize; 3],
    row: impl Fn(usize) -> *const T,
    out: *mut P,
) {
    let steps = depth.div_ceil(P::STEP);
    let panel_width = width.min(NR);
    for step in 0..steps {
        let k = step * P::STEP;
        let first = row(k);
        let second = (P::STEP == 2 && k + 1 < depth).then(|| row(k + 1));
        if k + ROWS_AHEAD + P::STEP <= depth {
            for ahead in 0..P::STEP {
                let ahead = row(k + ROWS_AHEAD + ahead);
                for line in (0..lanes).step_by(64 / size_of::<T>()) {
                    // SAFETY: a prefetch may point anywhere.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast()) };
                }
            }
        }
        for group in (0..width).step_by(N) {
            let count = lanes.saturating_sub(group);
            // SAFETY: masks cover readable and writable elements only.
            unsafe {
                let skip = group.min(lanes);
                let second = second.map(|row| row.add(skip));
                let words = interleave::<P, T, NATIVE>(first.add(skip), second, count);
                let target = out.add((group / NR * steps + step) * panel_width + group % NR);
                _mm512_mask_storeu_epi32(target.cast(), mask16(width - group), words);
            }
        }
    }
}
