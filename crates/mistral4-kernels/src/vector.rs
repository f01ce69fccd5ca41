//! Elementwise mathematics as plain loops that the compiler turns into vectors of each instruction set.
use crate::element::Element;

/// Declares `name(isa, args..)`, which runs the generic `body::<.., FMA>(args..)` compiled for `isa`.
///
/// `body` must be `#[inline(always)]`, so that it takes on the instruction set of its caller.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident : $bound:path),*>)?
     ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$meta])*
        $vis fn $name $(<$($g: $bound),*>)? (isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::isa::Isa;
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512 $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<$($($g,)*)? true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<$($($g,)*)? true>($($arg),*)
                }
                match isa {
                    // SAFETY: an `Isa` value is only made where the processor has its instructions.
                    Isa::Avx512 | Isa::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $body::<$($($g,)*)? { $crate::vector::BASELINE_FMA }>($($arg),*)
        }
    };
}
pub(crate) use per_isa;

/// Whether the compilation target itself has fused multiply-add.
pub(crate) const BASELINE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// Independent partial sums of a reduction: as wide as two AVX-512 registers, whatever the instruction set.
pub(crate) const LANES: usize = 32;

/// `a * b + c`, fused where the instruction set has it.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 units in the last place; 0 below -87.3, and constant above 88.3.
///
/// Source: the range reduction and polynomial of Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.clamp(-87.3, 88.3);
    let shifted = mul_add::<FMA>(bounded, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_HIGH, bounded);
    let r = mul_add::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = mul_add::<FMA>(p, r, c);
    }
    let value = mul_add::<FMA>(p, r * r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { value * power }
}

#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp::<FMA>(2.0 * x))
}

/// The error function within 4 units in the last place.
///
/// Source: the rational approximation on [-4, 4] that Eigen and XLA use.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let z = x * x;
    let mut p = -2.726_142_3e-10;
    for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_3e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = mul_add::<FMA>(p, z, c);
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        q = mul_add::<FMA>(q, z, c);
    }
    x * p / q
}

per_isa! {
    /// `to = from`, rounded to nearest where `B` is the narrower type.
    pub(crate) fn convert<A: Element, B: Element>(from: &[A], to: &mut [B]) = convert_body;
}

#[inline(always)]
fn convert_body<A: Element, B: Element, const FMA: bool>(from: &[A], to: &mut [B]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = B::from_f32(from.to_f32());
    }
}

/// The order that puts the words of two registers side by side: those that begin at word `first` and at word `second`,
/// where the second register's count from 32.
pub(crate) const fn side_by_side(first: u16, second: u16) -> [u16; 32] {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = i as u16 / 2 + if i.is_multiple_of(2) { first } else { second };
        i += 1;
    }
    order
}

/// Adds up partial sums, always in the same order.
#[inline(always)]
pub(crate) fn reduce(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Folds values into [`LANES`] partial sums by `add(value, sum)`, and adds those up.
#[inline(always)]
pub(crate) fn sum_by<T>(values: &[T], add: impl Fn(&T, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = add(value, *sum);
        }
    }
    for (sum, value) in sums.iter_mut().zip(tail) {
        *sum = add(value, *sum);
    }
    reduce(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_saturates() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            for got in [exp::<false>(x), exp::<true>(x)] {
                assert!((f64::from(got) / want - 1.0).abs() < 3e-7, "{x}: {got} {want}");
            }
        }
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-100.0), 0.0);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_close() {
        for i in -500..=500 {
            let x = i as f32 * 0.01;
            let want = crate::reference::erf(f64::from(x));
            assert!((f64::from(erf::<true>(x)) - want).abs() < 4e-7, "{x}");
        }
    }
}
