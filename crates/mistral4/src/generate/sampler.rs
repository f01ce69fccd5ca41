//! Choice of the next token from its logits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// How tokens are chosen. The filters apply in the order in which they stand here.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Logits of tokens seen before are divided (or, below 0, multiplied) by this; 1: off.
    pub repetition_penalty: f64,
    /// Logits are divided by this; 0: always the likeliest token.
    pub temperature: f64,
    /// Keep the `k` likeliest; 0: all.
    pub top_k: usize,
    /// Keep the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f64,
    /// Keep tokens at least this likely relative to the likeliest; 0: all.
    pub min_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl SamplingOptions {
    fn check(&self) -> Result<()> {
        let wrong = [
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "above 0"),
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or above"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
        ]
        .into_iter()
        .find(|(_, value, ok, _)| !ok || !value.is_finite());
        match wrong {
            Some((name, value, _, allowed)) => {
                Err(Error::Unsupported(format!("{name} is {value}, allowed is {allowed}")))
            }
            None => Ok(()),
        }
    }
}

/// Chooses tokens for one row.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler with its own stream of random numbers.
    ///
    /// # Errors
    /// An option outside its range.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.check()?;
        let rng = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Self { options, rng })
    }

    /// The next token; among equals the lowest id.
    ///
    /// # Shapes
    /// - `logits`: `[V]`; `seen`: prompt and answer so far
    pub fn choose(&mut self, logits: &[f32], seen: &[u32]) -> u32 {
        let mut logits = logits.to_vec();
        self.penalise(&mut logits, seen);
        if self.options.temperature == 0.0 {
            return likeliest(&logits);
        }
        let mut candidates = self.candidates(&logits);
        let draw: f32 = self.rng.random();
        let total: f32 = candidates.iter().map(|c| c.1).sum();
        let mut left = draw * total;
        let last = candidates.pop().expect("the likeliest token always stays");
        candidates
            .iter()
            .find(|c| {
                left -= c.1;
                left < 0.0
            })
            .unwrap_or(&last)
            .0
    }

    fn penalise(&self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.options.repetition_penalty as f32;
        if penalty == 1.0 {
            return;
        }
        let mut seen: Vec<u32> = seen.iter().copied().filter(|&t| (t as usize) < logits.len()).collect();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }

    /// Tokens that pass the filters with their unnormalised probabilities, likeliest first.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        let SamplingOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let mut order: Vec<u32> =
            (0..logits.len() as u32).filter(|&i| !logits[i as usize].is_nan()).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if top_k > 0 {
            order.truncate(top_k);
        }
        let Some(&first) = order.first() else { return vec![(0, 1.0)] };
        let highest = logits[first as usize];
        let weight = |i: u32| ((logits[i as usize] - highest) / temperature as f32).exp();
        let mut kept: Vec<(u32, f32)> = order.into_iter().map(|i| (i, weight(i))).collect();
        if top_p < 1.0 {
            let total: f32 = kept.iter().map(|c| c.1).sum();
            let mut sum = 0.0;
            let within = kept.iter().position(|c| {
                sum += c.1;
                f64::from(sum / total) >= top_p
            });
            kept.truncate(within.map_or(kept.len(), |last| last + 1));
        }
        // The likeliest has weight 1.
        kept.retain(|c| f64::from(c.1) >= min_p);
        kept
    }
}

/// The index of the highest logit; the lowest index among equals.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || logits[best].is_nan() {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(options: SamplingOptions, logits: &[f32]) -> u32 {
        Sampler::new(options).unwrap().choose(logits, &[])
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_whatever_the_seed() {
        for seed in 0..20 {
            assert_eq!(choose(SamplingOptions { seed, ..Default::default() }, &[0.0, 3.0, 3.0, -1.0]), 1);
        }
    }

    #[test]
    fn equal_seeds_draw_equal_tokens() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let options = SamplingOptions { temperature: 1.0, seed: 3, ..Default::default() };
        let draw = || {
            let mut sampler = Sampler::new(options.clone()).unwrap();
            (0..30).map(|_| sampler.choose(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
        assert!(draw().iter().any(|&t| t != draw()[0]), "thirty draws over fifty tokens are not all equal");
    }

    #[test]
    fn filters_keep_only_what_they_allow() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let kept = |options: SamplingOptions| {
            let options = SamplingOptions { temperature: 1.0, ..options };
            let candidates = Sampler::new(options).unwrap().candidates(&logits);
            candidates.into_iter().map(|c| c.0).collect::<Vec<_>>()
        };
        assert_eq!(kept(SamplingOptions { top_k: 2, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingOptions { top_p: 0.7, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingOptions { top_p: 0.9, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingOptions { min_p: 0.2, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingOptions::default()), [0, 1, 2, 3]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let mut sampler =
            Sampler::new(SamplingOptions { temperature: 1.0, seed: 11, ..Default::default() }).unwrap();
        let mut counts = [0usize; 3];
        (0..20_000).for_each(|_| counts[sampler.choose(&logits, &[]) as usize] += 1);
        for (count, expected) in counts.iter().zip([0.7, 0.2, 0.1]) {
            assert!((*count as f64 / 20_000.0 - expected).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn repetition_penalty_lowers_seen_tokens_of_either_sign() {
        let options = SamplingOptions { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(Sampler::new(options.clone()).unwrap().choose(&[1.0, 0.9], &[0]), 1);
        assert_eq!(Sampler::new(options).unwrap().choose(&[-1.0, -1.5], &[0]), 1);
    }

    #[test]
    fn options_outside_their_range_are_named() {
        let message = |options| Sampler::new(options).unwrap_err().to_string();
        assert!(message(SamplingOptions { top_p: 0.0, ..Default::default() }).contains("top_p is 0"));
        assert!(
            message(SamplingOptions { temperature: -1.0, ..Default::default() })
                .contains("temperature is -1")
        );
        assert!(message(SamplingOptions { min_p: f64::NAN, ..Default::default() }).contains("min_p is NaN"));
    }
}
