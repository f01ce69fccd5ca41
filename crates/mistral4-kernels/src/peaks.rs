//! What this machine can do at most, for comparison with what kernels reach.
use crate::gemm::{Bf16Pair, MR, NR, Panel, Piece, TileOut};
use crate::isa::Isa;
use crate::scratch;
use crate::vector::{per_isa, sum_by};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Measured this often; the best counts, since everything else on the machine only takes away.
const REPEATS: usize = 5;
/// How long one measurement runs.
const SPAN: Duration = Duration::from_millis(40);

/// Multiply-adds of `f32` matrix products by all threads of the pool, in 10^9 floating-point operations per
/// second, with operands in the first-level cache.
pub fn peak_f32_gflops() -> f64 {
    tile_rate::<f32>()
}

/// As [`peak_f32_gflops`] for bf16 operands and `f32` sums, on the instructions that [`Isa::active`] would use.
pub fn peak_bf16_gflops() -> f64 {
    if Isa::active() == Isa::Avx512Bf16 { tile_rate::<Bf16Pair>() } else { tile_rate::<f32>() }
}

/// Bytes that all threads of the pool read from memory, in 10^9 per second.
pub fn read_bandwidth() -> f64 {
    /// Larger than any last-level cache share.
    const FLOATS: usize = 64 << 20;
    let isa = Isa::active();
    let data = vec![1.0f32; FLOATS];
    let rate = best_of(|| {
        let start = Instant::now();
        rayon::broadcast(|context| {
            let (i, threads) = (context.index(), context.num_threads());
            let part = &data[FLOATS * i / threads..FLOATS * (i + 1) / threads];
            part.chunks(1 << 16).map(|chunk| f64::from(sum(isa, chunk))).sum::<f64>()
        })
        .into_iter()
        .for_each(|sum| {
            black_box(sum);
        });
        (FLOATS * size_of::<f32>()) as f64 / start.elapsed().as_secs_f64()
    });
    rate / 1e9
}

per_isa! {
    fn sum(values: &[f32]) -> f32 = sum_body;
}

#[inline(always)]
fn sum_body<const FMA: bool>(values: &[f32]) -> f32 {
    sum_by(values, |value, sum| sum + value)
}

fn best_of(measure: impl Fn() -> f64) -> f64 {
    (0..REPEATS).map(|_| measure()).fold(0.0, f64::max)
}

/// Rate of whole register tiles.
fn tile_rate<P: Panel>() -> f64 {
    const STEPS: usize = 128;
    let isa = Isa::active();
    let rate = best_of(|| {
        let rates = rayon::broadcast(|_| {
            let (mut left, mut right) = (scratch::take::<P>(STEPS * MR), scratch::take::<P>(STEPS * NR));
            left.fill(P::default());
            right.fill(P::default());
            let mut sums = [0.0f32; MR * NR];
            let (start, mut tiles) = (Instant::now(), 0u32);
            while start.elapsed() < SPAN {
                for _ in 0..64 {
                    let out = TileOut { ptr: sums.as_mut_ptr(), stride: NR, accumulate: false };
                    // SAFETY: `sums` holds `MR` rows of `NR` floats.
                    unsafe { P::tile(isa, MR, black_box(&left), black_box(&right), out, Piece::NONE) };
                    black_box(&mut sums);
                }
                tiles += 64;
            }
            f64::from(tiles) / start.elapsed().as_secs_f64()
        });
        rates.into_iter().sum::<f64>()
    });
    rate * (2 * MR * NR * STEPS * P::STEP) as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loose bounds: any processor of the last decade, and none of the next, lies between them.
    #[test]
    fn peaks_are_plausible() {
        for rate in [peak_f32_gflops(), peak_bf16_gflops()] {
            assert!((0.05..1e6).contains(&rate), "{rate}");
        }
        assert!((0.05..1e5).contains(&read_bandwidth()));
    }
}
