//! Element types that kernels read and write.
use half::bf16;

/// A float type that kernels load and store; sums are always kept in `f32` or `f64`.
#[allow(private_bounds, reason = "the bound is how scratch memory is typed, and the trait is sealed anyway")]
pub trait Element:
    Copy + Default + Send + Sync + std::fmt::Debug + crate::scratch::Plain + private::Sealed + 'static
{
    /// Whether this type is [`bf16`].
    const IS_BF16: bool;

    /// Widens to `f32` without loss.
    fn to_f32(self) -> f32;

    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Rounds the result of a computation up or down: up for a share of the values of `random` that is the distance from
    /// the number below.
    fn from_f32_random(value: f32, random: u16) -> Self;
}

impl Element for f32 {
    const IS_BF16: bool = false;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn from_f32_random(value: f32, _: u16) -> Self {
        value
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Written without a branch so that loops over it vectorise.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16)
    }

    #[inline(always)]
    fn from_f32_random(value: f32, random: u16) -> Self {
        // What a processor computes as NaN is one in its upper half as well.
        let random = if value.is_nan() { 0 } else { u32::from(random) };
        bf16::from_bits((value.to_bits().wrapping_add(random) >> 16) as u16)
    }
}

/// An integer type for expert indices and labels.
pub trait Index: Copy + Send + Sync + std::fmt::Debug + private::Sealed + 'static {
    /// The value as `i64`.
    fn to_i64(self) -> i64;
}

impl Index for i32 {
    #[inline(always)]
    fn to_i64(self) -> i64 {
        i64::from(self)
    }
}

impl Index for i64 {
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self
    }
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for i32 {}
    impl Sealed for i64 {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_equals_half() {
        for i in 0..=u32::MAX / 9973 {
            let v = f32::from_bits(i * 9973);
            let (ours, theirs) = (<bf16 as Element>::from_f32(v), bf16::from_f32(v));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{v} {ours} {theirs}");
        }
    }
}
