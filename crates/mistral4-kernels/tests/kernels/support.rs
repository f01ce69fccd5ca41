//! Seeded data and comparisons for the kernel tests.
use mistral4_kernels::{Element, Isa};

/// A small seeded generator (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn values<T: Element>(&mut self, len: usize, scale: f32) -> Vec<T> {
        (0..len).map(|_| T::from_f32(self.unit() * scale)).collect()
    }
}

/// A buffer that shows whatever is left unwritten.
pub(crate) fn poison<T: Element>(len: usize) -> Vec<T> {
    vec![T::from_f32(f32::NAN); len]
}

/// Runs a test on every instruction set of this processor.
pub(crate) fn on_each_isa(test: impl Fn(Isa)) {
    for isa in Isa::available() {
        isa.run(|| test(isa));
    }
}

/// Asserts `|got - want| <= tolerance * max(|want|)`.
#[track_caller]
pub(crate) fn assert_close<T: Element>(what: &str, got: &[T], want: &[T], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max).max(1e-6);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (g, w) = (g.to_f32(), w.to_f32());
        assert!(g == w || (g - w).abs() <= tolerance * scale, "{what}[{i}]: {g} is not {w} (scale {scale})");
    }
}

/// Relative tolerance for sums rounded to `T`, some operands of which were rounded to bf16.
pub(crate) fn tolerance<T: Element>() -> f32 {
    if T::IS_BF16 { 2e-2 } else { 2e-5 }
}
