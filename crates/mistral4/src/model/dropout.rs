//! Dropout whose choices are a function of a seed: a layer that is run again drops the same values.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::{Tensor, TensorData};

/// Where an adapter drops values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropoutPosition {
    /// Of its input.
    Pre,
    /// Of its output.
    Post,
}

/// The seed that all dropouts of a model share; off until one is set.
#[derive(Debug, Clone, Default)]
pub struct DropoutSeed(Arc<SeedState>);

#[derive(Debug, Default)]
struct SeedState {
    /// Of the step; 0: off.
    step: AtomicU64,
    /// Of the micro-batch.
    micro_batch: AtomicU64,
}

impl DropoutSeed {
    /// Switches dropout on: all that is dropped from here on depends on `seed`, `step` and the micro-batch.
    pub fn begin(&self, seed: u64, step: usize) {
        self.0.step.store(mix(mix(seed) ^ step as u64) | 1, Ordering::Relaxed);
        self.micro_batch(0);
    }

    /// Goes to the choices for a micro-batch of the step, where dropout is on; a layer that is run again for the same one
    /// drops the same, whichever rank runs it.
    pub fn micro_batch(&self, index: usize) {
        let state = match self.0.step.load(Ordering::Relaxed) {
            0 => 0,
            step => mix(step ^ mix(index as u64)) | 1,
        };
        self.0.micro_batch.store(state, Ordering::Relaxed);
    }

    /// Switches dropout off.
    pub fn end(&self) {
        self.0.step.store(0, Ordering::Relaxed);
        self.micro_batch(0);
    }

    /// What choices depend on now; 0: off.
    fn now(&self) -> u64 {
        self.0.micro_batch.load(Ordering::Relaxed)
    }
}

/// Dropout of an adapter.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Share of the values that become zero; the others are divided by what is left.
    pub probability: f64,
    /// Where it applies.
    pub position: DropoutPosition,
    /// Sets this dropout apart from the model's others.
    place: u64,
    /// The columns that this rank has, and their number on all ranks; `None`: it has all.
    columns: Option<(Range<usize>, usize)>,
    seed: DropoutSeed,
}

impl Dropout {
    /// The dropout of the module `name`.
    pub fn new(probability: f64, position: DropoutPosition, name: &str, seed: DropoutSeed) -> Self {
        let place = name.bytes().fold(0, |place, byte| mix(place ^ u64::from(byte)));
        Self { probability, position, place, columns: None, seed }
    }

    /// The same on a rank that has but some columns of `all`.
    pub(crate) fn of_columns(self, columns: Range<usize>, all: usize) -> Self {
        Self { columns: Some((columns, all)), ..self }
    }

    /// Whether values are dropped now.
    pub fn is_on(&self) -> bool {
        self.probability > 0.0 && self.seed.now() != 0
    }

    /// Drops values.
    ///
    /// # Shapes
    /// - `x`, output: `[rows, width]`
    pub fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        let start = self.seed.now() ^ self.place;
        // Of 2^53 equally likely numbers, those below the threshold drop.
        let threshold = (self.probability * (1u64 << 53) as f64) as u64;
        let kept = (1.0 / (1.0 - self.probability)) as f32;
        let [rows, width] = x.dims();
        let value = |index| if mix(start.wrapping_add(index)) >> 11 < threshold { 0.0 } else { kept };
        let (columns, all) = self.columns.clone().unwrap_or((0..width, width));
        assert_eq!(columns.len(), width, "the columns of this rank");
        let indices = (0..rows).flat_map(|row| columns.clone().map(move |column| row * all + column));
        let mask: Vec<f32> = indices.map(|index| value(index as u64)).collect();
        let device = x.device().without_autodiff();
        let mask = Tensor::<2>::from_data(TensorData::new(mask, [rows, width]), &device);
        let dtype = x.dtype();
        x * mask.cast(dtype)
    }
}

/// The finaliser of SplitMix64.
pub(super) fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn values(dropout: &Dropout) -> Vec<f32> {
        let ones = Tensor::<2>::ones([200, 50], &Device::flex());
        dropout.apply(ones).into_data_as::<f32>().try_into_vec().unwrap()
    }

    #[test]
    fn a_share_is_dropped_and_the_mean_stays() {
        let seed = DropoutSeed::default();
        let dropout = Dropout::new(0.25, DropoutPosition::Pre, "a", seed.clone());
        assert!(!dropout.is_on());
        seed.begin(7, 0);
        assert!(dropout.is_on());
        let got = values(&dropout);
        let dropped = got.iter().filter(|&&v| v == 0.0).count() as f64 / got.len() as f64;
        assert!((dropped - 0.25).abs() < 0.02, "{dropped}");
        assert!(got.iter().all(|&v| v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
        seed.end();
        assert!(!dropout.is_on());
    }

    #[test]
    fn choices_depend_on_seed_step_and_place() {
        let seed = DropoutSeed::default();
        let [a, b] = ["a", "b"].map(|name| Dropout::new(0.5, DropoutPosition::Pre, name, seed.clone()));
        seed.begin(1, 5);
        let first = values(&a);
        assert_eq!(first, values(&a));
        assert_ne!(first, values(&b));
        seed.micro_batch(1);
        let second = values(&a);
        assert_ne!(first, second);
        seed.begin(1, 6);
        assert_ne!(first, values(&a));
        seed.begin(1, 5);
        assert_eq!(first, values(&a));
        seed.micro_batch(1);
        assert_eq!(second, values(&a));
    }

    #[test]
    fn ranks_drop_their_columns_of_the_whole() {
        let seed = DropoutSeed::default();
        let whole = Dropout::new(0.5, DropoutPosition::Post, "a", seed.clone());
        seed.begin(3, 1);
        let ones = Tensor::<2>::ones([4, 6], &Device::flex());
        let part = whole.clone().of_columns(2..5, 6).apply(ones.clone().slice([0..4, 2..5]));
        assert_eq!(part.into_data(), whole.apply(ones).slice([0..4, 2..5]).into_data());
    }
}
