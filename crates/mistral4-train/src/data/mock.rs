//! Random tokens, for benchmarks.

use super::order::SplitMix64;
use super::{Dataset, Sample};
use crate::error::Result;

/// Samples of random tokens, the same for the same seed and index.
pub struct MockDataset {
    /// Ids are drawn below this.
    pub vocab_size: usize,
    /// Tokens of a sample.
    pub seq_len: usize,
    /// Samples of an epoch.
    pub num_samples: usize,
    /// Seed.
    pub seed: u64,
}

impl Dataset for MockDataset {
    fn len(&self) -> usize {
        self.num_samples
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let mut random = SplitMix64::new(self.seed, index as u64);
        let ids: Vec<u32> = (0..self.seq_len).map(|_| random.below(self.vocab_size as u64) as u32).collect();
        let labels = ids.iter().map(|&id| i64::from(id)).collect();
        Ok(Sample::from_unshifted(ids, labels))
    }

    fn tokens(&self, _index: usize) -> Result<usize> {
        Ok(self.seq_len)
    }
}
