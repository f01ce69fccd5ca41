//! Products with few left rows: weights are read once, in place, at the speed of memory.
use super::pairs;
use crate::element::Element;
use crate::isa::Isa;
use crate::scratch;
use crate::vector::{mul_add, per_isa};

/// Right rows handled together.
const ROWS: usize = 4;
/// Partial sums of one `f32` dot product.
const LANES: usize = 16;

/// Left rows up to which dot products in place beat packing.
pub(crate) fn few_rows<X: Element, W: Element>(isa: Isa) -> usize {
    if pairs::<X, W>(isa) { 6 } else { 3 }
}

/// Rows of a matrix, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl<'a, T> Rows<'a, T> {
    fn row(&self, i: usize, depth: usize) -> &'a [T] {
        &self.data[i * self.stride..][..depth]
    }
}

/// `out[x.count, w.count] = x w^T` over rows of `depth` elements.
pub(crate) fn dot_rows<X: Element, W: Element>(
    isa: Isa,
    x: Rows<'_, X>,
    w: Rows<'_, W>,
    depth: usize,
    out: &mut [f32],
) {
    assert_eq!(out.len(), x.count * w.count);
    #[cfg(target_arch = "x86_64")]
    if pairs::<X, W>(isa) {
        for j in (0..w.count).step_by(ROWS) {
            for i in (0..x.count).step_by(avx512::LEFT_ROWS) {
                let rows = avx512::Block {
                    x: x.row(i, depth).as_ptr().cast(),
                    x_stride: x.stride,
                    x_rows: (x.count - i).min(avx512::LEFT_ROWS),
                    w: w.row(j, depth).as_ptr().cast(),
                    w_stride: w.stride,
                    w_rows: (w.count - j).min(ROWS),
                    depth,
                    out_stride: w.count,
                };
                // Both ends of each block are in bounds.
                x.row(i + rows.x_rows - 1, depth);
                w.row(j + rows.w_rows - 1, depth);
                // SAFETY: the rows are in bounds, hold bf16 (`pairs`), and the processor has AVX-512 BF16.
                unsafe { avx512::dot_block(rows, out[i * w.count + j..].as_mut_ptr()) };
            }
        }
        return;
    }
    for i in 0..x.count {
        let row = x.row(i, depth);
        let mut wide = scratch::take::<f32>(depth);
        for (wide, x) in wide.iter_mut().zip(row) {
            *wide = x.to_f32();
        }
        let out = &mut out[i * w.count..(i + 1) * w.count];
        for (j, out) in out.chunks_mut(ROWS).enumerate() {
            let last = out.len() - 1;
            // A short last block reads its last row several times.
            let rows = std::array::from_fn(|r| w.row(j * ROWS + r.min(last), depth));
            let sums = dot_four(isa, &wide, rows);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}

per_isa! {
    fn dot_four<W: Element>(x: &[f32], w: [&[W]; ROWS]) -> [f32; ROWS] = dot_four_body;
}

#[inline(always)]
fn dot_four_body<W: Element, const FMA: bool>(x: &[f32], w: [&[W]; ROWS]) -> [f32; ROWS] {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let split = chunks.len() * LANES;
    let [w0, w1, w2, w3] = w.map(|w| w[..split].as_chunks::<LANES>().0);
    let [mut s0, mut s1, mut s2, mut s3] = [[0.0f32; LANES]; ROWS];
    for ((((x, w0), w1), w2), w3) in chunks.iter().zip(w0).zip(w1).zip(w2).zip(w3) {
        for i in 0..LANES {
            s0[i] = mul_add::<FMA>(x[i], w0[i].to_f32(), s0[i]);
            s1[i] = mul_add::<FMA>(x[i], w1[i].to_f32(), s1[i]);
            s2[i] = mul_add::<FMA>(x[i], w2[i].to_f32(), s2[i]);
            s3[i] = mul_add::<FMA>(x[i], w3[i].to_f32(), s3[i]);
        }
    }
    let mut out = [0.0; ROWS];
    for ((out, sums), w) in out.iter_mut().zip([s0, s1, s2, s3]).zip(w) {
        let rest: f32 = tail.iter().zip(&w[split..]).map(|(x, w)| x * w.to_f32()).sum();
        *out = sums.iter().sum::<f32>() + rest;
    }
    out
}

/// Columns whose sums [`combine_rows`] keeps in registers.
pub(crate) const COLUMNS: usize = 64;

/// `out = sum_k factors[k] rows[k]`.
pub(crate) fn combine_rows<X: Element, W: Element>(
    isa: Isa,
    factors: &[X],
    rows: Rows<'_, W>,
    out: &mut [f32],
) {
    assert_eq!(factors.len(), rows.count);
    combine(isa, factors, rows, out);
}

per_isa! {
    fn combine<X: Element, W: Element>(factors: &[X], rows: Rows<'_, W>, out: &mut [f32]) = combine_body;
}

#[inline(always)]
fn combine_body<X: Element, W: Element, const FMA: bool>(factors: &[X], rows: Rows<'_, W>, out: &mut [f32]) {
    let (blocks, tail) = out.as_chunks_mut::<COLUMNS>();
    let wide = blocks.len() * COLUMNS;
    for (block, out) in blocks.iter_mut().enumerate() {
        let mut sums = [0.0f32; COLUMNS];
        for (k, factor) in factors.iter().enumerate() {
            let factor = factor.to_f32();
            let row = &rows.data[k * rows.stride + block * COLUMNS..].as_chunks::<COLUMNS>().0[0];
            for i in 0..COLUMNS {
                sums[i] = mul_add::<FMA>(factor, row[i].to_f32(), sums[i]);
            }
        }
        *out = sums;
    }
    tail.fill(0.0);
    for (k, factor) in factors.iter().enumerate() {
        let factor = factor.to_f32();
        for (out, value) in tail.iter_mut().zip(&rows.data[k * rows.stride + wide..]) {
            *out = mul_add::<FMA>(factor, value.to_f32(), *out);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! Dot products of bf16 rows.
    use std::arch::x86_64::*;

    /// Left rows of one block: 6 x 4 sums fill 24 registers.
    pub(super) const LEFT_ROWS: usize = 6;

    /// Up to 6 left and 4 right rows.
    #[derive(Clone, Copy)]
    pub(super) struct Block {
        pub(super) x: *const u16,
        pub(super) x_stride: usize,
        pub(super) x_rows: usize,
        pub(super) w: *const u16,
        pub(super) w_stride: usize,
        pub(super) w_rows: usize,
        pub(super) depth: usize,
        pub(super) out_stride: usize,
    }

    /// # Safety
    /// The rows of the block hold `depth` bf16 each, `out` takes its sums, and the processor has AVX-512 BF16.
    pub(super) unsafe fn dot_block(block: Block, out: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe {
            match (block.w_rows, block.x_rows) {
                (4, 1) => dot::<1, 4>(block, out),
                (4, 2) => dot::<2, 4>(block, out),
                (4, 3) => dot::<3, 4>(block, out),
                (4, 4) => dot::<4, 4>(block, out),
                (4, 5) => dot::<5, 4>(block, out),
                (4, 6) => dot::<6, 4>(block, out),
                (rows, count) => {
                    for j in 0..rows {
                        for i in 0..count {
                            let x = block.x.add(i * block.x_stride);
                            let w = block.w.add(j * block.w_stride);
                            dot::<1, 1>(Block { x, w, ..block }, out.add(i * block.out_stride + j));
                        }
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn dot<const X: usize, const W: usize>(block: Block, out: *mut f32) {
        let mut sums = [[_mm512_setzero_ps(); W]; X];
        // SAFETY: masks and offsets stay below `depth`.
        unsafe {
            let mut step = |k: usize, mask: u32| {
                let load = |p: *const u16| {
                    let bits = if mask == u32::MAX {
                        _mm512_loadu_si512(p.add(k).cast())
                    } else {
                        _mm512_maskz_loadu_epi16(mask, p.add(k).cast())
                    };
                    std::mem::transmute::<__m512i, __m512bh>(bits)
                };
                let w: [__m512bh; W] = std::array::from_fn(|j| load(block.w.add(j * block.w_stride)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = load(block.x.add(i * block.x_stride));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = _mm512_dpbf16_ps(*sum, x, w);
                    }
                }
            };
            let whole = block.depth / 32 * 32;
            for k in (0..whole).step_by(32) {
                step(k, u32::MAX);
            }
            if whole < block.depth {
                step(whole, (1 << (block.depth - whole)) - 1);
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, sum) in sums.into_iter().enumerate() {
                    *out.add(i * block.out_stride + j) = _mm512_reduce_add_ps(sum);
                }
            }
        }
    }
}
