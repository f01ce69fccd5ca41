//! Weighted sums of latents in AVX-512 registers, two slots at a time.
use super::heads::HEADS;
use crate::isa::Isa;
use crate::scratch;
use crate::vector::{convert, side_by_side};
use half::bf16;
use std::arch::x86_64::*;

/// Columns of one register of bf16.
const WIDTH: usize = 32;

/// Positions of the words of two rows, those of one column side by side: columns 0 to 15, then 16 to 31.
static SIDE_BY_SIDE: [[u16; WIDTH]; 2] = [side_by_side(0, 32), side_by_side(16, 48)];

/// `out[head * stride..][..columns] = sum_i factors[head, i] rows[i][..columns]` for up to [`HEADS`] heads, with factors
/// rounded to bf16.
///
/// # Safety
/// The processor has AVX-512 BF16.
pub(super) unsafe fn weigh<'a>(
    factors: &[f32],
    rows: impl ExactSizeIterator<Item = &'a [bf16]>,
    columns: usize,
    stride: usize,
    out: &mut [f32],
) {
    let count = rows.len();
    let heads = factors.len() / count;
    assert!((1..=HEADS).contains(&heads) && factors.len() == heads * count);
    assert!(out.len() >= (heads - 1) * stride + columns);
    // A row without a neighbour is its own, with factor 0.
    let pairs = count.div_ceil(2);
    let mut ptrs = scratch::take::<Pointer>(2 * pairs);
    for (ptr, row) in ptrs.iter_mut().zip(rows) {
        *ptr = Pointer(row[..columns].as_ptr() as usize);
    }
    if !count.is_multiple_of(2) {
        ptrs[count] = ptrs[count - 1];
    }
    let mut rounded = scratch::take::<bf16>(HEADS * 2 * pairs);
    for (head, rounded) in rounded.chunks_exact_mut(2 * pairs).enumerate() {
        // Missing heads repeat the last one; their sums are dropped.
        let of_head = &factors[head.min(heads - 1) * count..][..count];
        convert(Isa::Avx512Bf16, of_head, rounded);
        rounded[count..].fill(bf16::ZERO);
    }
    for first in (0..columns).step_by(2 * WIDTH) {
        let width = (columns - first).min(2 * WIDTH);
        let mut sums = [[0.0f32; 2 * WIDTH]; HEADS];
        // SAFETY: each pointer is to `columns` values, of which `first..first + width` are read.
        unsafe { block(&rounded, &ptrs, first, width, &mut sums) };
        for (head, sums) in sums[..heads].iter().enumerate() {
            out[head * stride + first..][..width].copy_from_slice(&sums[..width]);
        }
    }
}

/// Address of a row.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Pointer(usize);

// SAFETY: any bits are an address.
unsafe impl scratch::Plain for Pointer {}

/// # Safety
/// Rows hold `first + width` values, `width` is at most `2 * WIDTH`, and the processor has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn block(
    factors: &[bf16],
    rows: &[Pointer],
    first: usize,
    width: usize,
    out: &mut [[f32; 2 * WIDTH]; HEADS],
) {
    // SAFETY: both types are 64 plain bytes.
    let pairs = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
    // SAFETY: the tables hold 64 bytes.
    let order = [0, 1].map(|i| unsafe { _mm512_loadu_si512(SIDE_BY_SIDE[i].as_ptr().cast()) });
    let mask = |from: usize| ((1u64 << (width.saturating_sub(from)).min(WIDTH)) - 1) as u32;
    let masks = [mask(0), mask(WIDTH)];
    let mut sums = [[_mm512_setzero_ps(); 4]; HEADS];
    let rows = rows.as_chunks::<2>().0;
    let of_head: [&[[bf16; 2]]; HEADS] =
        std::array::from_fn(|head| &factors.as_chunks::<2>().0[head * rows.len()..(head + 1) * rows.len()]);
    for (pair, rows) in rows.iter().enumerate() {
        let [a, b] = rows.map(|row| (row.0 as *const i16).wrapping_add(first));
        for half in 0..2 {
            // SAFETY: masks leave out what lies past the row.
            let [a, b] = [a, b]
                .map(|row| unsafe { _mm512_maskz_loadu_epi16(masks[half], row.wrapping_add(half * WIDTH)) });
            for (part, order) in order.into_iter().enumerate() {
                let both = pairs(_mm512_permutex2var_epi16(a, order, b));
                for head in 0..HEADS {
                    let [first, second] = of_head[head][pair].map(|factor| u32::from(factor.to_bits()));
                    let factor = pairs(_mm512_set1_epi32((first | second << 16).cast_signed()));
                    let sum = &mut sums[head][2 * half + part];
                    *sum = _mm512_dpbf16_ps(*sum, factor, both);
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, sum) in out.chunks_exact_mut(16).zip(sums) {
            // SAFETY: 16 floats are there.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}
