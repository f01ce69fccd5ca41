//! Register tiles of up to 6 x 16 sums for AVX2 with fused multiply-add.
use super::panel::{NR, TileOut};
use std::arch::x86_64::*;

/// Rows kept in registers at once: 6 x 2 sums of the 16 registers.
const ROWS: usize = 6;

#[target_feature(enable = "avx2,fma")]
unsafe fn f32_rows<const R: usize>(steps: usize, rows: usize, a: *const f32, b: *const f32, out: TileOut) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for step in 0..steps {
        // SAFETY: `a` addresses `R` of `rows` rows in each of `steps` steps, `b` 16 of `NR` columns.
        unsafe {
            let b0 = _mm256_loadu_ps(b.add(step * NR));
            let b1 = _mm256_loadu_ps(b.add(step * NR + 8));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*a.add(step * rows + row));
                sum[0] = _mm256_fmadd_ps(x, b0, sum[0]);
                sum[1] = _mm256_fmadd_ps(x, b1, sum[1]);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: `out` addresses `R` rows of 16 writable floats.
            unsafe {
                let target = out.ptr.add(row * out.stride + half * 8);
                let sum = if out.accumulate { _mm256_add_ps(sum, _mm256_loadu_ps(target)) } else { sum };
                _mm256_storeu_ps(target, sum);
            }
        }
    }
}

/// # Safety
/// `a` holds `steps * rows` and `b` `steps * NR` elements, `out` addresses `rows` rows of `NR` floats, and
/// the processor has AVX2 and FMA.
pub(super) unsafe fn tile_f32(rows: usize, steps: usize, a: *const f32, b: *const f32, out: TileOut) {
    for column in [0, NR / 2] {
        for row in (0..rows).step_by(ROWS) {
            // SAFETY: the part lies inside what the caller promised.
            unsafe {
                let (a, b) = (a.add(row), b.add(column));
                let out = TileOut { ptr: out.ptr.add(row * out.stride + column), ..out };
                match rows - row {
                    1 => f32_rows::<1>(steps, rows, a, b, out),
                    2 => f32_rows::<2>(steps, rows, a, b, out),
                    3 => f32_rows::<3>(steps, rows, a, b, out),
                    4 => f32_rows::<4>(steps, rows, a, b, out),
                    5 => f32_rows::<5>(steps, rows, a, b, out),
                    _ => f32_rows::<6>(steps, rows, a, b, out),
                }
            }
        }
    }
}
