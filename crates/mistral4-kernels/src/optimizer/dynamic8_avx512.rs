//! Blocks of 8-bit numbers in AVX-512 registers: levels and fractions come out of tables, 16 numbers at a time.
use super::dynamic8::{BLOCK_8BIT, DynamicMap, LEVELS, Level};
use std::arch::x86_64::*;

/// Numbers in a register.
const LANES: usize = 16;

/// See [`dequantize_block`](super::dynamic8::dequantize_block).
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn dequantize_block(
    map: DynamicMap,
    codes: &[u8],
    absmax: f32,
    to: &mut [f32; BLOCK_8BIT],
) {
    let fractions = map.fractions();
    let (whole, rest) = codes.as_chunks::<LANES>();
    let (to_whole, to_rest) = to.split_at_mut(whole.len() * LANES);
    for (codes, to) in whole.iter().zip(to_whole.as_chunks_mut::<LANES>().0) {
        // SAFETY: 16 codes and 16 floats are there, and every code has a fraction.
        unsafe {
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let fraction = _mm512_i32gather_ps::<4>(index, fractions.as_ptr());
            _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(fraction, _mm512_set1_ps(absmax)));
        }
    }
    for (code, to) in rest.iter().zip(to_rest) {
        *to = fractions[*code as usize] * absmax;
    }
}

/// See [`quantize_block`](super::dynamic8::quantize_block).
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn quantize_block(map: DynamicMap, from: &[f32; BLOCK_8BIT], codes: &mut [u8]) -> f32 {
    let levels = map.levels();
    let table = |constant: fn(&Level) -> f32| {
        let mut values = [0.0f32; LANES];
        for (value, level) in values.iter_mut().zip(levels) {
            *value = constant(level);
        }
        // SAFETY: 16 floats are there.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    };
    let (slopes, offsets) = (table(|level| level.slope), table(|level| level.offset));
    let (firsts, lasts) = (table(|level| level.first), table(|level| level.last));
    let parts = from.as_chunks::<LANES>().0;

    let mut largest = _mm512_setzero_ps();
    for part in parts {
        // SAFETY: 16 floats are there. A maximum with what is no number is its second operand.
        largest = unsafe { _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(part.as_ptr())), largest) };
    }
    let (absmax, inverse) = super::dynamic8::scale(_mm512_reduce_max_ps(largest));

    let mut all = [0u8; BLOCK_8BIT];
    for (part, codes) in parts.iter().zip(all.as_chunks_mut::<LANES>().0) {
        // SAFETY: 16 floats and 16 codes are there.
        unsafe {
            let value = _mm512_loadu_ps(part.as_ptr());
            let x = _mm512_mul_ps(_mm512_abs_ps(value), _mm512_set1_ps(inverse));
            let mut level = _mm512_setzero_si512();
            for above in &levels[1..LEVELS] {
                let reached = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(above.from));
                level = _mm512_mask_add_epi32(level, reached, level, _mm512_set1_epi32(1));
            }
            let of_level = |table: __m512| _mm512_permutexvar_ps(level, table);
            let steps = _mm512_fmadd_ps(x, of_level(slopes), of_level(offsets));
            let steps = _mm512_min_ps(_mm512_max_ps(steps, of_level(firsts)), of_level(lasts));
            let steps = _mm512_cvttps_epi32(steps);
            let codes_of = match map {
                DynamicMap::Unsigned => steps,
                DynamicMap::Signed => {
                    let zero = _mm512_set1_epi32(i32::from(map.zero()));
                    let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(value, _mm512_setzero_ps());
                    // There is one fraction less below 0 than above.
                    let down = _mm512_sub_epi32(zero, _mm512_min_epi32(steps, zero));
                    _mm512_mask_mov_epi32(_mm512_add_epi32(zero, steps), below, down)
                }
            };
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(codes_of));
        }
    }
    codes.copy_from_slice(&all[..codes.len()]);
    absmax
}
