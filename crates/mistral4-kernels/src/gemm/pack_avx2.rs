//! Packing with AVX2: 8 x 8 transposes of 32-bit steps, and interleaving of rows.
use super::panel::{NR, Panel};
use crate::element::Element;
use std::arch::x86_64::*;

/// Steps, and lanes, handled at once.
const N: usize = 8;

/// Bytes by which a lane is fetched ahead of its use.
const LANE_AHEAD: usize = 512;
/// Rows by which rows are fetched ahead of their use.
const ROWS_AHEAD: usize = 16;

/// Rounds to bf16, in the low half of each 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn round(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
}

/// Eight elements as `f32`.
///
/// # Safety
/// Eight elements are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_f32<T: Element>(from: *const T) -> __m256 {
    // SAFETY: promised by the caller.
    unsafe {
        if T::IS_BF16 {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        } else {
            _mm256_loadu_ps(from.cast())
        }
    }
}

/// Eight steps of one lane whose elements are neighbours.
///
/// # Safety
/// `8 * STEP` elements are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_steps<P: Panel, T: Element>(from: *const T) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe {
        if P::STEP == 1 {
            _mm256_castps_si256(load_f32(from))
        } else if T::IS_BF16 {
            _mm256_loadu_si256(from.cast())
        } else {
            let halves = _mm256_packus_epi32(round(load_f32(from)), round(load_f32(from.add(N))));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(halves)
        }
    }
}

/// The first `count` of up to 16 elements, and zeros.
///
/// # Safety
/// `count` elements are readable.
#[inline]
unsafe fn some<T: Element>(from: *const T, count: usize) -> [T; 2 * N] {
    let mut values = [T::default(); 2 * N];
    // SAFETY: promised by the caller; the copy ends with the array.
    unsafe { std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), count.min(2 * N)) };
    values
}

#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256i; N]) -> [__m256i; N] {
    let mut a = r;
    for i in 0..4 {
        a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Columns 4q + j of four rows each, in the 128-bit parts q.
    let mut b = a;
    for i in 0..2 {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    let mut out = r;
    for j in 0..4 {
        out[j] = _mm256_permute2x128_si256::<0x20>(b[j], b[4 + j]);
        out[4 + j] = _mm256_permute2x128_si256::<0x31>(b[j], b[4 + j]);
    }
    out
}

/// Writes the first `count` of eight steps.
///
/// # Safety
/// `count.min(8)` elements are writable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<P: Panel>(to: *mut P, count: usize, values: __m256i) {
    // SAFETY: promised by the caller.
    unsafe {
        if count >= N {
            _mm256_storeu_si256(to.cast(), values);
        } else {
            let places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), places);
            _mm256_maskstore_epi32(to.cast(), mask, values);
        }
    }
}

/// See [`super::pack::pack_lanes`].
///
/// # Safety
/// Each of `lanes <= width` lanes has `depth` readable elements, `out` holds `steps * width` elements.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn pack_lanes<P: Panel, T: Element>(
    depth: usize,
    lanes: usize,
    width: usize,
    lane: impl Fn(usize) -> *const T,
    out: *mut P,
) {
    let steps = depth.div_ceil(P::STEP);
    for group in (0..width).step_by(N) {
        let used = lanes.saturating_sub(group).min(N);
        let mut sources = [std::ptr::null::<T>(); N];
        for (i, source) in sources.iter_mut().enumerate().take(used) {
            *source = lane(group + i);
        }
        for first in (0..steps).step_by(N) {
            let element = first * P::STEP;
            let mut rows = [_mm256_setzero_si256(); N];
            for (row, source) in rows.iter_mut().zip(&sources[..used]) {
                // SAFETY: `depth - element` elements remain in the lane; a prefetch may point anywhere.
                unsafe {
                    let from = source.add(element);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_byte_add(LANE_AHEAD).cast());
                    *row = if depth - element >= N * P::STEP {
                        load_steps::<P, T>(from)
                    } else {
                        load_steps::<P, T>(some(from, depth - element).as_ptr())
                    };
                }
            }
            for (step, column) in transpose(rows).into_iter().enumerate().take(steps - first) {
                // SAFETY: the step is below `steps`, and what is written ends at `width`.
                unsafe { store(out.add((first + step) * width + group), width - group, column) };
            }
        }
    }
}

/// See [`super::pack::pack_rows`].
///
/// # Safety
/// Each of `depth` rows has `lanes <= width` readable elements, `out` holds `steps * width` elements.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn pack_rows<P: Panel, T: Element>(
    depth: usize,
    lanes: usize,
    width: usize,
    row: impl Fn(usize) -> *const T,
    out: *mut P,
) {
    let steps = depth.div_ceil(P::STEP);
    let panel_width = width.min(NR);
    for step in 0..steps {
        let k = step * P::STEP;
        let first = row(k);
        let second = (k + 1 < depth).then(|| row(k + 1));
        if k + ROWS_AHEAD + P::STEP <= depth {
            for ahead in 0..P::STEP {
                let ahead = row(k + ROWS_AHEAD + ahead);
                for line in (0..lanes).step_by(64 / size_of::<T>()) {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast());
                }
            }
        }
        for group in (0..width).step_by(N) {
            let skip = group.min(lanes);
            let count = lanes - skip;
            // SAFETY: what is read ends at `lanes`, what is written at `width`.
            unsafe {
                let load = |row: *const T| match count {
                    0 => _mm256_setzero_ps(),
                    N.. => load_f32(row.add(skip)),
                    _ => load_f32(some(row.add(skip), count).as_ptr()),
                };
                let a = load(first);
                let words = if P::STEP == 1 {
                    _mm256_castps_si256(a)
                } else {
                    let b = second.map_or(_mm256_setzero_ps(), load);
                    if T::IS_BF16 {
                        // Already rounded: the high halves are the values.
                        let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(a));
                        _mm256_or_si256(low, _mm256_castps_si256(b))
                    } else {
                        _mm256_or_si256(round(a), _mm256_slli_epi32::<16>(round(b)))
                    }
                };
                let target = out.add((group / NR * steps + step) * panel_width + group % NR);
                store(target, width - group, words);
            }
        }
    }
}
