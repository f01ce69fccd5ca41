//! Activations in the form that a product with quantised weights takes them.
use super::matrix::{Bits, QuantizedMatrix, Scheme};
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Scratch};
use crate::vector::per_isa;
use half::bf16;

/// Largest magnitude of a rounded activation: 127 * 128, so that both digits fit a signed byte.
const LARGEST: f32 = 16_256.0;

/// Rows of activations.
pub(crate) enum Activations {
    /// Signed 15-bit integers, `128 * high + low`, with a scale a group.
    Digits(Digits),
    /// bf16, zero past the last column.
    Bf16 {
        /// `[rows, stride]`
        values: Scratch<bf16>,
        /// Distance between rows.
        stride: usize,
    },
    /// 32-bit floats, `[rows, columns]`.
    F32(Scratch<f32>),
}

/// Activations as two signed bytes each.
pub(crate) struct Digits {
    /// `[rows][high, low][stride]`, zero past the last column.
    pub(crate) bytes: Scratch<i8>,
    /// Distance between the high and the low bytes of a row.
    pub(crate) stride: usize,
    /// `[rows, groups]`; not a number where the group holds a value that is not finite.
    pub(crate) scales: Scratch<f32>,
    /// Sums of each group's integers, `[rows, groups]`.
    pub(crate) sums: Scratch<i32>,
    pub(crate) groups: usize,
}

/// How products with a stack run on an instruction set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Digits,
    Bf16,
    F32,
}

fn form<X: Element>(isa: Isa, scheme: Scheme) -> Form {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 {
        return match scheme {
            Scheme::Int { .. } if is_x86_feature_detected!("avx512vnni") => Form::Digits,
            Scheme::Fp8 { .. } if X::IS_BF16 && is_x86_feature_detected!("avx512vbmi") => Form::Bf16,
            _ => Form::F32,
        };
    }
    let _ = (isa, scheme);
    Form::F32
}

impl Activations {
    /// Prepares rows for products with `stack`; `X` is the precision that the caller computes in.
    pub(crate) fn new<'a, X: Element, T: Element>(
        isa: Isa,
        stack: &QuantizedMatrix,
        rows: usize,
        row: impl Fn(usize) -> &'a [T] + Sync + Send,
    ) -> Self {
        const ROWS: usize = 16;
        let columns = stack.dims.columns;
        let stride = columns.next_multiple_of(8);
        match form::<X>(isa, stack.scheme) {
            Form::Digits => {
                let (group, groups) = (stack.scheme.group(), stack.groups());
                let mut digits = Digits {
                    bytes: scratch::take(rows * 2 * stride),
                    stride,
                    scales: scratch::take(rows * groups),
                    sums: scratch::take(rows * groups),
                    groups,
                };
                let bytes = Shared::new(&mut digits.bytes);
                let (scales, sums) = (Shared::new(&mut digits.scales), Shared::new(&mut digits.sums));
                parallel::for_each_chunk(rows, ROWS, |range| {
                    for i in range {
                        // SAFETY: each task owns its rows.
                        let (bytes, scales, sums) = unsafe {
                            (
                                bytes.slice(i * 2 * stride..(i + 1) * 2 * stride),
                                scales.slice(i * groups..(i + 1) * groups),
                                sums.slice(i * groups..(i + 1) * groups),
                            )
                        };
                        let (high, low) = bytes.split_at_mut(stride);
                        high[columns..].fill(0);
                        low[columns..].fill(0);
                        let digits = high.chunks_mut(group).zip(low.chunks_mut(group));
                        for ((x, (high, low)), (scale, sum)) in
                            row(i).chunks(group).zip(digits).zip(scales.iter_mut().zip(sums))
                        {
                            (*scale, *sum) = to_digits(isa, x, high, low);
                        }
                    }
                });
                Activations::Digits(digits)
            }
            Form::Bf16 => {
                let mut values = scratch::take::<bf16>(rows * stride);
                fill_rows(isa, &mut values, rows, stride, |i| &row(i)[..columns]);
                Activations::Bf16 { values, stride }
            }
            Form::F32 => {
                let mut values = scratch::take::<f32>(rows * columns);
                fill_rows(isa, &mut values, rows, columns, |i| &row(i)[..columns]);
                Activations::F32(values)
            }
        }
    }
}

/// Converts rows, with zeros up to `stride`.
fn fill_rows<'a, F: Element, T: Element>(
    isa: Isa,
    to: &mut [F],
    rows: usize,
    stride: usize,
    row: impl Fn(usize) -> &'a [T] + Sync + Send,
) {
    let to = Shared::new(to);
    parallel::for_each_chunk(rows, 32, |range| {
        for i in range {
            // SAFETY: each task owns its rows.
            let to = unsafe { to.slice(i * stride..(i + 1) * stride) };
            let from = row(i);
            convert(isa, &mut to[..from.len()], from);
            to[from.len()..].fill(F::default());
        }
    });
}

per_isa! {
    fn convert<F: Element, T: Element>(to: &mut [F], from: &[T]) = convert_body;
}

#[inline(always)]
fn convert_body<F: Element, T: Element, const FMA: bool>(to: &mut [F], from: &[T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = F::from_f32(from.to_f32());
    }
}

per_isa! {
    /// Rounds a group to integers of 15 bits; returns its scale and the sum of the integers.
    fn to_digits<T: Element>(x: &[T], high: &mut [i8], low: &mut [i8]) -> (f32, i32) = to_digits_body;
}

#[inline(always)]
fn to_digits_body<T: Element, const FMA: bool>(x: &[T], high: &mut [i8], low: &mut [i8]) -> (f32, i32) {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits.
    let mut largest = 0u32;
    for x in x {
        // Magnitudes compare as their bits, those that are not finite above all others.
        largest = largest.max(x.to_f32().to_bits() & 0x7fff_ffff);
    }
    if largest >= f32::INFINITY.to_bits() {
        high[..x.len()].fill(0);
        low[..x.len()].fill(0);
        return (f32::NAN, 0);
    }
    let scale = f32::from_bits(largest) / LARGEST;
    if scale < f32::MIN_POSITIVE {
        high[..x.len()].fill(0);
        low[..x.len()].fill(0);
        return (0.0, 0);
    }
    let inverse = 1.0 / scale;
    let mut sum = 0i32;
    for ((x, high), low) in x.iter().zip(high).zip(low) {
        let integer = (x.to_f32() * inverse + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        let upper = (integer + 64) >> 7;
        *high = upper as i8;
        *low = (integer - (upper << 7)) as i8;
        sum += integer;
    }
    (scale, sum)
}

/// Whether codes of this scheme have 4 bits.
pub(crate) fn is_four(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Int { bits: Bits::Four, .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_restore_the_values() {
        let x: Vec<f32> = (0..64).map(|i| (i as f32 - 31.5) * 0.37).collect();
        let (mut high, mut low) = ([0i8; 64], [0i8; 64]);
        let (scale, sum) = to_digits(Isa::active(), &x, &mut high, &mut low);
        let integers: Vec<i32> =
            high.iter().zip(&low).map(|(h, l)| 128 * i32::from(*h) + i32::from(*l)).collect();
        assert_eq!(integers.iter().sum::<i32>(), sum);
        for (x, integer) in x.iter().zip(integers) {
            assert!((x - integer as f32 * scale).abs() <= 0.501 * scale, "{x} {integer} {scale}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let (mut high, mut low) = ([0i8; 3], [0i8; 3]);
        assert!(to_digits(Isa::active(), &[1.0, f32::NAN, 2.0], &mut high, &mut low).0.is_nan());
        assert_eq!(to_digits(Isa::active(), &[0.0f32; 3], &mut high, &mut low), (0.0, 0));
    }
}
