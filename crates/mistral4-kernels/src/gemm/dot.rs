//! Products with few left rows: weights are read once, in place, at the speed of memory.
use crate::element::Element;
use crate::isa::Isa;
use crate::scratch;
use crate::vector::{mul_add, per_isa};

/// Right rows handled together.
const ROWS: usize = 4;
/// Left and right rows handled together where there are several left ones: each value is widened for fewer products.
const BLOCK: [usize; 2] = [4, 2];
/// Partial sums of one `f32` dot product.
const LANES: usize = 16;

/// Left rows up to which dot products in place beat packing.
pub(crate) fn few_rows<X: Element, W: Element>(isa: Isa) -> usize {
    if has_pair_dots::<X, W>(isa) { 6 } else { 3 }
}

/// Whether the processor multiplies pairs of these types in one instruction.
fn has_pair_dots<X: Element, W: Element>(isa: Isa) -> bool {
    X::IS_BF16 && W::IS_BF16 && isa == Isa::Avx512Bf16
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
    if has_pair_dots::<X, W>(isa) {
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
                // SAFETY: the rows are in bounds, hold bf16, and the processor has AVX-512 BF16.
                unsafe { avx512::dot_block(rows, out[i * w.count + j..].as_mut_ptr()) };
            }
        }
        return;
    }
    let mut wide = scratch::take::<f32>(x.count * depth);
    for (i, wide) in wide.chunks_exact_mut(depth.max(1)).enumerate() {
        for (wide, x) in wide.iter_mut().zip(x.row(i, depth)) {
            *wide = x.to_f32();
        }
    }
    let wide = |i: usize| &wide[i * depth..(i + 1) * depth];
    let blocked = x.count / BLOCK[0] * BLOCK[0];
    // Rows of a short last block appear in it several times.
    for i in (0..blocked).step_by(BLOCK[0]) {
        let left = std::array::from_fn(|r| wide(i + r));
        for j in (0..w.count).step_by(BLOCK[1]) {
            let right = std::array::from_fn(|r| w.row((j + r).min(w.count - 1), depth));
            for (r, sums) in dot_block(isa, left, right).into_iter().enumerate() {
                let out = &mut out[(i + r) * w.count..(i + r + 1) * w.count][j..];
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
            }
        }
    }
    for i in blocked..x.count {
        let out = &mut out[i * w.count..(i + 1) * w.count];
        for (j, out) in out.chunks_mut(ROWS).enumerate() {
            let last = out.len() - 1;
            let right = std::array::from_fn(|r| w.row(j * ROWS + r.min(last), depth));
            let sums = dot_four(isa, wide(i), right);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}

per_isa! {
    fn dot_block<W: Element>(x: [&[f32]; BLOCK[0]], w: [&[W]; BLOCK[1]]) -> [[f32; BLOCK[1]]; BLOCK[0]] = dot_block_body;
}

#[inline(always)]
fn dot_block_body<W: Element, const FMA: bool>(
    x: [&[f32]; BLOCK[0]],
    w: [&[W]; BLOCK[1]],
) -> [[f32; BLOCK[1]]; BLOCK[0]] {
    /// Partial sums of one product; those of the block's eight fill as many registers of AVX2.
    const LANES: usize = 8;
    let split = w[0].len() / LANES * LANES;
    let [x0, x1, x2, x3] = x.map(|x| x[..split].as_chunks::<LANES>().0);
    let [w0, w1] = w.map(|w| w[..split].as_chunks::<LANES>().0);
    let mut sums = [[[0.0f32; LANES]; BLOCK[1]]; BLOCK[0]];
    for (((((x0, x1), x2), x3), w0), w1) in x0.iter().zip(x1).zip(x2).zip(x3).zip(w0).zip(w1) {
        let (mut a, mut b) = ([0.0f32; LANES], [0.0f32; LANES]);
        for i in 0..LANES {
            a[i] = w0[i].to_f32();
            b[i] = w1[i].to_f32();
        }
        for i in 0..LANES {
            sums[0][0][i] = mul_add::<FMA>(x0[i], a[i], sums[0][0][i]);
            sums[0][1][i] = mul_add::<FMA>(x0[i], b[i], sums[0][1][i]);
            sums[1][0][i] = mul_add::<FMA>(x1[i], a[i], sums[1][0][i]);
            sums[1][1][i] = mul_add::<FMA>(x1[i], b[i], sums[1][1][i]);
            sums[2][0][i] = mul_add::<FMA>(x2[i], a[i], sums[2][0][i]);
            sums[2][1][i] = mul_add::<FMA>(x2[i], b[i], sums[2][1][i]);
            sums[3][0][i] = mul_add::<FMA>(x3[i], a[i], sums[3][0][i]);
            sums[3][1][i] = mul_add::<FMA>(x3[i], b[i], sums[3][1][i]);
        }
    }
    let mut out = [[0.0f32; BLOCK[1]]; BLOCK[0]];
    for ((out, sums), x) in out.iter_mut().zip(sums).zip(x) {
        for ((out, sums), w) in out.iter_mut().zip(sums).zip(w) {
            let rest: f32 = x[split..].iter().zip(&w[split..]).map(|(x, w)| x * w.to_f32()).sum();
            *out = sums.iter().sum::<f32>() + rest;
        }
    }
    out
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

/// Rows of factors that [`combine_each`] takes at once: each value is widened for fewer products.
const TOGETHER: usize = 4;

/// `out[i * stride..][..columns] = sum_k factors[i, k] rows[k]` for several rows of factors, of which each has one for each
/// of `rows`.
pub(crate) fn combine_each<W: Element>(
    isa: Isa,
    factors: Rows<'_, f32>,
    rows: Rows<'_, W>,
    out: &mut [f32],
    [columns, stride]: [usize; 2],
) {
    assert!(factors.count == 0 || out.len() >= (factors.count - 1) * stride + columns);
    let of = |i: usize| factors.row(i, rows.count);
    let mut outs = out.chunks_mut(stride).take(factors.count).map(|out| &mut out[..columns]);
    let fours = factors.count / TOGETHER * TOGETHER;
    for first in (0..fours).step_by(TOGETHER) {
        let out = std::array::from_fn(|_| outs.next().expect("a row of results for each of factors"));
        combine_four(isa, std::array::from_fn(|i| of(first + i)), rows, out);
    }
    for (i, out) in (fours..).zip(outs) {
        combine_rows(isa, of(i), rows, out);
    }
}

per_isa! {
    fn combine_four<W: Element>(
        factors: [&[f32]; TOGETHER],
        rows: Rows<'_, W>,
        out: [&mut [f32]; TOGETHER],
    ) = combine_four_body;
}

#[inline(always)]
fn combine_four_body<W: Element, const FMA: bool>(
    factors: [&[f32]; TOGETHER],
    rows: Rows<'_, W>,
    mut out: [&mut [f32]; TOGETHER],
) {
    /// Columns at once: two registers of AVX2 for each row of factors.
    const COLUMNS: usize = 16;
    let columns = out[0].len();
    let [f0, f1, f2, f3] = factors;
    for first in (0..columns / COLUMNS * COLUMNS).step_by(COLUMNS) {
        let mut sums = [[0.0f32; COLUMNS]; TOGETHER];
        for (k, (((f0, f1), f2), f3)) in f0.iter().zip(f1).zip(f2).zip(f3).enumerate() {
            let row = &rows.data[k * rows.stride + first..].as_chunks::<COLUMNS>().0[0];
            let mut wide = [0.0f32; COLUMNS];
            for i in 0..COLUMNS {
                wide[i] = row[i].to_f32();
            }
            for i in 0..COLUMNS {
                sums[0][i] = mul_add::<FMA>(*f0, wide[i], sums[0][i]);
                sums[1][i] = mul_add::<FMA>(*f1, wide[i], sums[1][i]);
                sums[2][i] = mul_add::<FMA>(*f2, wide[i], sums[2][i]);
                sums[3][i] = mul_add::<FMA>(*f3, wide[i], sums[3][i]);
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            out[first..first + COLUMNS].copy_from_slice(&sums);
        }
    }
    for column in columns / COLUMNS * COLUMNS..columns {
        let column_of = |k: usize| rows.data[k * rows.stride + column].to_f32();
        for (out, factors) in out.iter_mut().zip(factors) {
            out[column] = factors.iter().enumerate().map(|(k, factor)| factor * column_of(k)).sum();
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
                let out = out.add(i * block.out_stride);
                if let Some(four) = sums.first_chunk::<4>().filter(|_| W == 4) {
                    _mm_storeu_ps(out, add_up(*four));
                    continue;
                }
                for (j, sum) in sums.into_iter().enumerate() {
                    *out.add(j) = _mm512_reduce_add_ps(sum);
                }
            }
        }
    }

    /// The sum of each register, four at once: in a third of the steps.
    #[target_feature(enable = "avx512f")]
    fn add_up([a, b, c, d]: [__m512; 4]) -> __m128 {
        let fold = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (ab, cd) = (_mm512_castps_pd(fold(a, b)), _mm512_castps_pd(fold(c, d)));
        let all = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let all = _mm512_add_ps(all, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(all)));
        let half = _mm256_add_ps(_mm512_castps512_ps256(all), high);
        _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
    }
}
