//! Which samples make which rows, the same for the same seed and epoch on every machine.

/// Sets the order of a stream's parts apart from that of indexed rows.
pub(crate) const STREAM_PARTS: u64 = 0x7061_7274_7300_0000;
/// Sets the order within a window of a stream apart from both.
pub(crate) const STREAM_WINDOW: u64 = 0x7769_6e64_6f77_0000;

/// The rows of one epoch, each a list of sample indices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    order: Vec<usize>,
    /// Row `i` is `order[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
}

impl Plan {
    /// One sample a row.
    pub(crate) fn single(order: Vec<usize>) -> Self {
        let starts = (0..=order.len()).collect();
        Self { order, starts }
    }

    /// Packs samples into rows of at most `size` tokens: first fit, within buffers of `buffer` samples.
    ///
    /// No sample is split, and every sample is in exactly one row. Samples longer than `size` must not be given.
    pub(crate) fn packed(order: &[usize], tokens: &[usize], size: usize, buffer: usize) -> Self {
        let mut plan = Self { order: Vec::with_capacity(order.len()), starts: vec![0] };
        for buffer in order.chunks(buffer.max(1)) {
            let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
            for &sample in buffer {
                let length = tokens[sample];
                assert!(length <= size, "a sample of {length} tokens does not fit a row of {size}");
                match rows.iter_mut().find(|(used, _)| used + length <= size) {
                    Some((used, row)) => {
                        *used += length;
                        row.push(sample);
                    }
                    None => rows.push((length, vec![sample])),
                }
            }
            for (_, row) in rows {
                plan.order.extend(row);
                plan.starts.push(plan.order.len());
            }
        }
        plan
    }

    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub(crate) fn row(&self, index: usize) -> &[usize] {
        &self.order[self.starts[index]..self.starts[index + 1]]
    }
}

/// Shuffles indices by Fisher and Yates, keyed by seed and epoch.
///
/// The generator is written out here so that a saved data position means the same in every later release.
pub(crate) fn shuffle(indices: &mut [usize], seed: u64, epoch: usize) {
    let mut random = SplitMix64::new(seed, epoch as u64);
    for i in (1..indices.len()).rev() {
        indices.swap(i, random.below(i as u64 + 1) as usize);
    }
}

/// SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator for one stream of a seed.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut first = Self(seed);
        let mixed = first.next() ^ stream.wrapping_mul(0xd134_2543_de82_ef95);
        Self(mixed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, without bias. Source: Lemire, "Fast random integer generation in an interval", 2019.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= bound.wrapping_neg() % bound {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn orders_differ_by_seed_and_epoch_and_repeat() {
        let order = |seed, epoch| {
            let mut order: Vec<usize> = (0..50).collect();
            shuffle(&mut order, seed, epoch);
            order
        };
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
    }

    #[test]
    fn every_position_is_about_equally_likely() {
        let mut counts = [[0usize; 5]; 5];
        for epoch in 0..5000 {
            let mut order: Vec<usize> = (0..5).collect();
            shuffle(&mut order, 7, epoch);
            for (place, &value) in order.iter().enumerate() {
                counts[place][value] += 1;
            }
        }
        // 1000 expected in each cell; the standard deviation is 28.
        assert!(counts.iter().flatten().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn packing_keeps_every_sample_whole_and_once(
            tokens in proptest::collection::vec(1usize..20, 1..200),
            size in 20usize..60,
            buffer in 1usize..80,
            seed in any::<u64>(),
        ) {
            let mut order: Vec<usize> = (0..tokens.len()).collect();
            shuffle(&mut order, seed, 0);
            let plan = Plan::packed(&order, &tokens, size, buffer);
            let mut seen: Vec<usize> = (0..plan.len()).flat_map(|row| plan.row(row).to_vec()).collect();
            for row in 0..plan.len() {
                prop_assert!(plan.row(row).iter().map(|&sample| tokens[sample]).sum::<usize>() <= size);
                prop_assert!(!plan.row(row).is_empty());
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..tokens.len()).collect::<Vec<_>>());
        }
    }
}
