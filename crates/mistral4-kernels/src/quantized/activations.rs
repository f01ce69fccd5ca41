//! Activations in the form that a product with quantised weights takes them.
use super::matrix::{Bits, QuantizedMatrix, Scheme};
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch::{self, Plain, Scratch};
use crate::vector::per_isa;
use half::bf16;
use std::ops::Range;

/// Largest magnitude of a rounded activation: 127 * 128, so that both digits fit a signed byte.
const LARGEST: f32 = 16_256.0;

/// Rows of activations.
pub(crate) enum Activations {
    /// Signed 15-bit integers as two bytes each, `128 * high + low`: the `stride` high bytes of a row, then the low ones.
    Digits(Integers<i8>),
    /// Signed 15-bit integers, the middle two of each four columns exchanged.
    Words(Integers<i16>),
    /// bf16, zero past the last column.
    Bf16 {
        /// `[rows, stride]`
        values: Scratch<bf16>,
        /// Distance between rows.
        stride: usize,
    },
    /// 32-bit floats, zero past the last column.
    F32 {
        /// `[rows, stride]`
        values: Scratch<f32>,
        /// Distance between rows.
        stride: usize,
    },
}

/// Activations as integers, with a scale a group.
pub(crate) struct Integers<T: Plain> {
    /// Zero past the last column.
    pub(crate) values: Scratch<T>,
    /// Columns of a row, with those past the last.
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
    Words,
    Bf16,
    F32,
}

fn form<X: Element>(isa: Isa, scheme: Scheme) -> Form {
    #[cfg(target_arch = "x86_64")]
    {
        let is_widest = isa == Isa::Avx512Bf16;
        match scheme {
            Scheme::Int { .. } if is_widest && is_x86_feature_detected!("avx512vnni") => return Form::Digits,
            Scheme::Int { .. } if isa >= Isa::Avx2 => return Form::Words,
            Scheme::Fp8 { .. } if is_widest && X::IS_BF16 && is_x86_feature_detected!("avx512vbmi") => {
                return Form::Bf16;
            }
            _ => {}
        }
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
        let columns = stack.dims.columns;
        let stride = columns.next_multiple_of(8);
        match form::<X>(isa, stack.scheme) {
            Form::Digits => {
                let integers = Integers::new(stack, rows, 2 * stride, |i, digits, group| {
                    let (high, low) = digits.split_at_mut(stride);
                    to_digits(isa, &row(i)[group.clone()], &mut high[group.clone()], &mut low[group])
                });
                Activations::Digits(integers)
            }
            Form::Words => {
                let integers = Integers::new(stack, rows, stride, |i, words, group| {
                    let padded = group.start..group.end.next_multiple_of(4);
                    to_words(isa, &row(i)[group], &mut words[padded])
                });
                Activations::Words(integers)
            }
            Form::Bf16 => {
                let mut values = scratch::take::<bf16>(rows * stride);
                fill_rows(isa, &mut values, rows, stride, |i| &row(i)[..columns]);
                Activations::Bf16 { values, stride }
            }
            Form::F32 => {
                let mut values = scratch::take::<f32>(rows * stride);
                fill_rows(isa, &mut values, rows, stride, |i| &row(i)[..columns]);
                Activations::F32 { values, stride }
            }
        }
    }
}

impl<T: Plain + Default + Send + Sync> Integers<T> {
    /// Rows of `width` integers; `round(row, integers, group)` writes those of a group of columns and gives their scale and
    /// sum.
    fn new(
        stack: &QuantizedMatrix,
        rows: usize,
        width: usize,
        round: impl Fn(usize, &mut [T], Range<usize>) -> (f32, i32) + Sync + Send,
    ) -> Self {
        const ROWS: usize = 16;
        let (columns, group, groups) = (stack.dims.columns, stack.scheme.group(), stack.groups());
        let mut integers = Self {
            values: scratch::take(rows * width),
            stride: columns.next_multiple_of(8),
            scales: scratch::take(rows * groups),
            sums: scratch::take(rows * groups),
            groups,
        };
        let values = Shared::new(&mut integers.values);
        let (scales, sums) = (Shared::new(&mut integers.scales), Shared::new(&mut integers.sums));
        parallel::for_each_chunk(rows, ROWS, |range| {
            for i in range {
                // SAFETY: each task owns its rows.
                let (values, scales, sums) = unsafe {
                    (
                        values.slice(i * width..(i + 1) * width),
                        scales.slice(i * groups..(i + 1) * groups),
                        sums.slice(i * groups..(i + 1) * groups),
                    )
                };
                values.fill(T::default());
                for (index, (scale, sum)) in scales.iter_mut().zip(sums).enumerate() {
                    let group = index * group..((index + 1) * group).min(columns);
                    (*scale, *sum) = round(i, values, group);
                }
            }
        });
        integers
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
    let (scale, inverse) = scale_of(x);
    let mut sum = 0i32;
    for ((x, high), low) in x.iter().zip(high).zip(low) {
        let integer = round(*x, inverse);
        let upper = (integer + 64) >> 7;
        *high = upper as i8;
        *low = (integer - (upper << 7)) as i8;
        sum += integer;
    }
    (scale, sum)
}

per_isa! {
    /// As [`to_digits`], for whole words in the order of [`Activations::Words`].
    fn to_words<T: Element>(x: &[T], words: &mut [i16]) -> (f32, i32) = to_words_body;
}

#[inline(always)]
fn to_words_body<T: Element, const FMA: bool>(x: &[T], words: &mut [i16]) -> (f32, i32) {
    let (scale, inverse) = scale_of(x);
    let mut sum = 0i32;
    for (x, word) in x.iter().zip(&mut *words) {
        let integer = round(*x, inverse);
        *word = integer as i16;
        sum += integer;
    }
    for four in words.as_chunks_mut::<4>().0 {
        four.swap(1, 2);
    }
    (scale, sum)
}

/// The scale of a group, and what its values are multiplied with to become integers: 0 where there is no scale.
#[inline(always)]
fn scale_of<T: Element>(x: &[T]) -> (f32, f32) {
    let mut largest = 0u32;
    for x in x {
        // Magnitudes compare as their bits, those that are not finite above all others.
        largest = largest.max(x.to_f32().to_bits() & 0x7fff_ffff);
    }
    let scale = f32::from_bits(largest) / LARGEST;
    if largest >= f32::INFINITY.to_bits() {
        (f32::NAN, 0.0)
    } else if scale < f32::MIN_POSITIVE {
        (0.0, 0.0)
    } else {
        (scale, 1.0 / scale)
    }
}

/// The nearest integer to `x * inverse`, 0 where `inverse` is 0.
#[inline(always)]
fn round<T: Element>(x: T, inverse: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits.
    let scaled = if inverse == 0.0 { 0.0 } else { x.to_f32() * inverse };
    (scaled + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
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
