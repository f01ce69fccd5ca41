//! Top-k routing by biased softmax scores.
use crate::element::Index;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use crate::vector::{LANES, exp, per_isa, reduce};

/// Sizes and rules of routing; the names are those of the checkpoint's configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterDims {
    /// T: tokens.
    pub tokens: usize,
    /// E: experts.
    pub experts: usize,
    /// K: experts chosen for each token.
    pub top_k: usize,
    /// Groups that the experts form, in order; divides E.
    pub n_group: usize,
    /// Groups that a token may choose from.
    pub topk_group: usize,
    /// Divide the weights of a token by their sum.
    pub norm_topk_prob: bool,
    /// Factor on weights.
    pub routed_scaling_factor: f32,
}

impl RouterDims {
    fn check(&self) {
        let RouterDims { experts, top_k, n_group, topk_group, .. } = *self;
        assert!((1..=experts).contains(&top_k), "top_k {top_k} of {experts} experts");
        assert!(n_group >= 1 && experts.is_multiple_of(n_group), "n_group {n_group} divides {experts}");
        assert!((1..=n_group).contains(&topk_group), "topk_group {topk_group} of {n_group} groups");
    }
}

/// Tokens of one task.
const TOKENS: usize = 32;
/// Added to the sum of weights that they are divided by.
const SUM_EPS: f32 = 1e-20;

/// Chooses the experts of each token by `softmax(logits) + bias`, best first.
///
/// With several groups, each is rated by the sum of its two best choice scores, and choice scores outside the
/// best `topk_group` groups count as zero. Ties go to the lowest index.
///
/// # Shapes
/// `logits`: `[T, E]`, `bias`: `[E]`, `indices`: `[T, K]`.
///
/// # Panics
/// When a slice has the wrong length or the sizes contradict each other.
pub fn choose_experts(dims: RouterDims, logits: &[f32], bias: &[f32], indices: &mut [i32]) {
    dims.check();
    let RouterDims { tokens, experts, top_k, .. } = dims;
    assert_eq!(logits.len(), tokens * experts, "logits are [T, E]");
    assert_eq!(bias.len(), experts, "bias is [E]");
    assert_eq!(indices.len(), tokens * top_k, "indices are [T, K]");
    let isa = Isa::active();
    let indices = Shared::new(indices);
    parallel::for_each_chunk(tokens, TOKENS, |chunk| {
        let mut choice = scratch::take::<f32>(experts);
        for token in chunk {
            // SAFETY: each task owns its tokens.
            let indices = unsafe { indices.slice(token * top_k..(token + 1) * top_k) };
            softmax(isa, &logits[token * experts..(token + 1) * experts], &mut choice);
            for (choice, bias) in choice.iter_mut().zip(bias) {
                *choice += bias;
            }
            if dims.topk_group < dims.n_group {
                mask_groups(&dims, &mut choice);
            }
            for index in indices {
                let best = first_max(&choice);
                choice[best] = f32::NEG_INFINITY;
                *index = i32::try_from(best).expect("fewer than 2^31 experts");
            }
        }
    });
}

/// Weights of chosen experts: their `softmax(logits)`, divided by its sum over a token's choice if so asked, times the
/// factor.
///
/// # Shapes
/// `logits`: `[T, E]`; `indices`, `weights`: `[T, K]`.
///
/// # Panics
/// When a slice has the wrong length or an index is not in `0..E`.
pub fn routing_weights<I: Index>(dims: RouterDims, logits: &[f32], indices: &[I], weights: &mut [f32]) {
    dims.check();
    let RouterDims { tokens, experts, top_k, .. } = dims;
    assert_eq!(logits.len(), tokens * experts, "logits are [T, E]");
    assert_eq!(indices.len(), tokens * top_k, "indices are [T, K]");
    assert_eq!(weights.len(), tokens * top_k, "weights are [T, K]");
    let isa = Isa::active();
    let weights = Shared::new(weights);
    parallel::for_each_chunk(tokens, TOKENS, |chunk| {
        let mut scores = scratch::take::<f32>(experts);
        for token in chunk {
            let chosen = token * top_k..(token + 1) * top_k;
            // SAFETY: each task owns its tokens.
            let weights = unsafe { weights.slice(chosen.clone()) };
            softmax(isa, &logits[token * experts..(token + 1) * experts], &mut scores);
            for (weight, index) in weights.iter_mut().zip(&indices[chosen]) {
                *weight = scores[expert(index)];
            }
            let divisor = if dims.norm_topk_prob { weights.iter().sum::<f32>() + SUM_EPS } else { 1.0 };
            for weight in weights {
                *weight = *weight / divisor * dims.routed_scaling_factor;
            }
        }
    });
}

fn expert<I: Index>(index: &I) -> usize {
    usize::try_from(index.to_i64()).expect("the index of an expert")
}

/// Position of the first largest value.
fn first_max(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] || values[best].is_nan() && !value.is_nan() {
            best = i;
        }
    }
    best
}

/// Zeroes the choice scores outside the best groups.
fn mask_groups(dims: &RouterDims, choice: &mut [f32]) {
    let size = dims.experts / dims.n_group;
    let mut ratings: Vec<f32> = choice
        .chunks_exact(size)
        .map(|group| {
            let best = first_max(group);
            let second = (0..size).filter(|i| *i != best).map(|i| group[i]).reduce(f32::max);
            group[best] + second.unwrap_or(0.0)
        })
        .collect();
    let mut keep = vec![false; dims.n_group];
    for _ in 0..dims.topk_group {
        let best = first_max(&ratings);
        keep[best] = true;
        ratings[best] = f32::NEG_INFINITY;
    }
    for (group, keep) in choice.chunks_exact_mut(size).zip(keep) {
        if !keep {
            group.fill(0.0);
        }
    }
}

per_isa! {
    fn softmax(logits: &[f32], scores: &mut [f32]) = softmax_body;
}

#[inline(always)]
fn softmax_body<const FMA: bool>(logits: &[f32], scores: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0f32; LANES];
    for (scores, logits) in scores.chunks_mut(LANES).zip(logits.chunks(LANES)) {
        for ((sum, score), logit) in sums.iter_mut().zip(scores).zip(logits) {
            *score = exp::<FMA>(*logit - max);
            *sum += *score;
        }
    }
    let sum = reduce(sums);
    for score in scores {
        *score /= sum;
    }
}

/// Gradient of the logits (`[T, E]`, overwritten) by [`routing_weights`], from that of the weights.
///
/// # Shapes
/// As in [`routing_weights`], with `dweights` in place of `weights`.
///
/// # Panics
/// As [`routing_weights`].
pub fn routing_weights_backward<I: Index>(
    dims: RouterDims,
    logits: &[f32],
    indices: &[I],
    dweights: &[f32],
    dlogits: &mut [f32],
) {
    dims.check();
    let RouterDims { tokens, experts, top_k, .. } = dims;
    assert_eq!(logits.len(), tokens * experts, "logits are [T, E]");
    assert_eq!(indices.len(), tokens * top_k, "indices are [T, K]");
    assert_eq!(dweights.len(), tokens * top_k, "dweights are [T, K]");
    assert_eq!(dlogits.len(), tokens * experts, "dlogits are [T, E]");
    let isa = Isa::active();
    let dlogits = Shared::new(dlogits);
    parallel::for_each_chunk(tokens, TOKENS, |chunk| {
        let mut scores = scratch::take::<f32>(experts);
        for token in chunk {
            let row = token * experts..(token + 1) * experts;
            // SAFETY: each task owns its tokens.
            let d = unsafe { dlogits.slice(row.clone()) };
            softmax(isa, &logits[row], &mut scores);
            let chosen = &indices[token * top_k..(token + 1) * top_k];
            let dweights = &dweights[token * top_k..(token + 1) * top_k];
            let (mut sum, mut along) = (0.0f32, 0.0f32);
            for (i, dweight) in chosen.iter().zip(dweights) {
                sum += scores[expert(i)];
                along += scores[expert(i)] * dweight;
            }
            let divisor = if dims.norm_topk_prob { sum + SUM_EPS } else { 1.0 };
            let pull = if dims.norm_topk_prob { along / divisor } else { 0.0 };
            d.fill(0.0);
            for (i, dweight) in chosen.iter().zip(dweights) {
                d[expert(i)] += dims.routed_scaling_factor * (dweight - pull) / divisor;
            }
            let mean: f32 = chosen.iter().map(|i| d[expert(i)] * scores[expert(i)]).sum();
            for (d, score) in d.iter_mut().zip(&scores[..]) {
                *d = score * (*d - mean);
            }
        }
    });
}
