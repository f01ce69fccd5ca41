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
    /// Tokens in the order of [`Ranking`], kept for its memory.
    order: Vec<u32>,
}

/// Tokens from the likeliest on, lower ids first among equals, sorted only as far as they are asked for.
struct Ranking<'a> {
    logits: &'a [f32],
    order: &'a mut [u32],
    sorted: usize,
    highest: f32,
    temperature: f64,
}

impl Ranking<'_> {
    /// Tokens that are sorted first.
    const FIRST: usize = 64;

    fn get(&mut self, rank: usize) -> Option<u32> {
        let by_logit =
            |a: &u32, b: &u32| self.logits[*b as usize].total_cmp(&self.logits[*a as usize]).then(a.cmp(b));
        while rank >= self.sorted && self.sorted < self.order.len() {
            // As many again, so that sorting all in pieces takes about as long as at once.
            let count = self.sorted.max(Self::FIRST);
            let rest = &mut self.order[self.sorted..];
            let next = match rest.len() > count {
                true => rest.select_nth_unstable_by(count, by_logit).0,
                false => rest,
            };
            next.sort_unstable_by(by_logit);
            self.sorted += next.len();
        }
        self.order.get(rank).copied()
    }

    /// The unnormalised probability of the token of a rank; the likeliest has 1.
    fn weight(&mut self, rank: usize) -> Option<f64> {
        self.get(rank).map(|token| self.weight_of(token))
    }

    fn weight_of(&self, token: u32) -> f64 {
        f64::from(((self.logits[token as usize] - self.highest) / self.temperature as f32).exp())
    }
}

impl Sampler {
    /// A sampler with its own stream of random numbers.
    ///
    /// # Errors
    /// An option outside its range.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.check()?;
        let rng = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Self { options, rng, order: Vec::new() })
    }

    /// The next token; among equals the lowest id. Logits are overwritten where a penalty says so.
    ///
    /// # Shapes
    /// - `logits`: `[V]`; `seen`: prompt and answer so far
    pub fn choose(&mut self, logits: &mut [f32], seen: &[u32]) -> u32 {
        self.penalise(logits, seen);
        if self.options.temperature == 0.0 {
            return likeliest(logits);
        }
        let draw: f32 = self.rng.random();
        let (mut ranking, count, total) = self.kept(logits);
        // Rounding may leave a little over for the last one.
        let last = count.saturating_sub(1);
        let mut left = f64::from(draw) * total;
        let chosen = (0..last).find(|&rank| {
            left -= ranking.weight(rank).unwrap_or(0.0);
            left < 0.0
        });
        // Where all logits are NaN, no token is likelier than another.
        ranking.get(chosen.unwrap_or(last)).unwrap_or(0)
    }

    fn penalise(&mut self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.options.repetition_penalty as f32;
        if penalty == 1.0 {
            return;
        }
        let seen_tokens = &mut self.order;
        seen_tokens.clear();
        seen_tokens.extend(seen.iter().copied().filter(|&t| (t as usize) < logits.len()));
        seen_tokens.sort_unstable();
        seen_tokens.dedup();
        for &mut token in seen_tokens {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }

    /// The tokens that pass the filters: their ranking, their number, and the sum of their weights.
    fn kept<'a>(&'a mut self, logits: &'a [f32]) -> (Ranking<'a>, usize, f64) {
        let SamplingOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        self.order.clear();
        self.order.extend((0..logits.len() as u32).filter(|&token| !logits[token as usize].is_nan()));
        let mut ranking = Ranking { logits, order: &mut self.order, sorted: 0, highest: 0.0, temperature };
        let Some(first) = ranking.get(0) else { return (ranking, 0, 0.0) };
        ranking.highest = logits[first as usize];
        let all = ranking.order.len();
        let within = if top_k > 0 { top_k.min(all) } else { all };
        let sum: f64 = match within < all {
            true => (0..within).filter_map(|rank| ranking.weight(rank)).sum(),
            false => ranking.order.iter().map(|&token| ranking.weight_of(token)).sum(),
        };
        if top_p == 1.0 && min_p == 0.0 {
            return (ranking, within, sum);
        }
        let (mut count, mut total) = (0, 0.0);
        while count < within
            && let Some(weight) = ranking.weight(count).filter(|&weight| weight >= min_p)
        {
            (count, total) = (count + 1, total + weight);
            if total / sum >= top_p {
                break;
            }
        }
        (ranking, count, total)
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
        Sampler::new(options).unwrap().choose(&mut logits.to_vec(), &[])
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
            (0..30).map(|_| sampler.choose(&mut logits.clone(), &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
        assert!(draw().iter().any(|&t| t != draw()[0]), "thirty draws over fifty tokens are not all equal");
    }

    #[test]
    fn filters_keep_only_what_they_allow() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let kept = |options: SamplingOptions| {
            let options = SamplingOptions { temperature: 1.0, ..options };
            let mut sampler = Sampler::new(options).unwrap();
            let (mut ranking, count, _) = sampler.kept(&logits);
            (0..count).map(|rank| ranking.get(rank).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(kept(SamplingOptions { top_k: 2, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingOptions { top_p: 0.7, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingOptions { top_p: 0.9, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingOptions { min_p: 0.2, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingOptions::default()), [0, 1, 2, 3]);
        assert_eq!(kept(SamplingOptions { top_k: 3, top_p: 0.8, min_p: 0.5, ..Default::default() }), [0, 1]);
    }

    #[test]
    fn a_ranking_is_that_of_a_stable_sort_and_leaves_nan_out() {
        let mut logits: Vec<f32> = (0..1000u32).map(|i| (i * 7919 % 301) as f32).collect();
        logits[5] = f32::NAN;
        logits[900] = f32::NEG_INFINITY;
        let mut sampler = Sampler::new(SamplingOptions { temperature: 0.7, ..Default::default() }).unwrap();
        let (mut ranking, count, _) = sampler.kept(&logits);
        let got: Vec<u32> = (0..count).map(|rank| ranking.get(rank).unwrap()).collect();
        let mut want: Vec<u32> = (0..1000).filter(|&token| token != 5).collect();
        want.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        assert_eq!(got, want);
        assert_eq!(ranking.get(count), None);
        let mut all_nan = vec![f32::NAN; 3];
        assert_eq!(sampler.choose(&mut all_nan, &[]), 0);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let mut sampler =
            Sampler::new(SamplingOptions { temperature: 1.0, seed: 11, ..Default::default() }).unwrap();
        let mut counts = [0usize; 3];
        (0..20_000).for_each(|_| counts[sampler.choose(&mut logits.clone(), &[]) as usize] += 1);
        for (count, expected) in counts.iter().zip([0.7, 0.2, 0.1]) {
            assert!((*count as f64 / 20_000.0 - expected).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn repetition_penalty_lowers_seen_tokens_of_either_sign() {
        let options = SamplingOptions { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(Sampler::new(options.clone()).unwrap().choose(&mut [1.0, 0.9], &[0]), 1);
        assert_eq!(Sampler::new(options).unwrap().choose(&mut [-1.0, -1.5], &[0]), 1);
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
