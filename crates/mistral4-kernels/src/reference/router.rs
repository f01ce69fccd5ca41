//! Plain routing.
use crate::{Index, RouterDims};

/// Positions of the `count` largest values, best first, lowest position first among equals.
fn top(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = logits.iter().map(|l| f64::from(l - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

/// See [`crate::choose_experts`].
pub fn choose_experts(dims: RouterDims, logits: &[f32], bias: &[f32], indices: &mut [i32]) {
    let RouterDims { experts, top_k, n_group, .. } = dims;
    for t in 0..dims.tokens {
        let scores = softmax(&logits[t * experts..(t + 1) * experts]);
        let mut choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + f64::from(*b)).collect();
        let size = experts / n_group;
        let rating = |group: &[f64]| top(group, 2).iter().map(|i| group[*i]).sum();
        let ratings: Vec<f64> = choice.chunks(size).map(rating).collect();
        let kept = top(&ratings, dims.topk_group);
        for (e, choice) in choice.iter_mut().enumerate() {
            if !kept.contains(&(e / size)) {
                *choice = 0.0;
            }
        }
        for (k, e) in top(&choice, top_k).into_iter().enumerate() {
            indices[t * top_k + k] = i32::try_from(e).expect("a small expert index");
        }
    }
}

fn chosen<I: Index>(dims: RouterDims, indices: &[I], token: usize) -> Vec<usize> {
    indices[token * dims.top_k..][..dims.top_k].iter().map(|i| i.to_i64() as usize).collect()
}

/// See [`crate::routing_weights`].
pub fn routing_weights<I: Index>(dims: RouterDims, logits: &[f32], indices: &[I], weights: &mut [f32]) {
    let RouterDims { experts, top_k, .. } = dims;
    for t in 0..dims.tokens {
        let scores = softmax(&logits[t * experts..(t + 1) * experts]);
        let chosen = chosen(dims, indices, t);
        let total: f64 = chosen.iter().map(|e| scores[*e]).sum::<f64>() + 1e-20;
        for (k, e) in chosen.iter().enumerate() {
            let weight = if dims.norm_topk_prob { scores[*e] / total } else { scores[*e] };
            weights[t * top_k + k] = (weight * f64::from(dims.routed_scaling_factor)) as f32;
        }
    }
}

/// See [`crate::routing_weights_backward`]; goes through the Jacobians of normalisation and softmax entry by entry.
pub fn routing_weights_backward<I: Index>(
    dims: RouterDims,
    logits: &[f32],
    indices: &[I],
    dweights: &[f32],
    dlogits: &mut [f32],
) {
    let RouterDims { experts, top_k, .. } = dims;
    for t in 0..dims.tokens {
        let scores = softmax(&logits[t * experts..(t + 1) * experts]);
        let chosen = chosen(dims, indices, t);
        let mut dscores = vec![0.0f64; experts];
        let total: f64 = chosen.iter().map(|e| scores[*e]).sum::<f64>() + 1e-20;
        for (j, dweight) in dweights[t * top_k..][..top_k].iter().enumerate() {
            let dweight = f64::from(dweight * dims.routed_scaling_factor);
            for (i, e) in chosen.iter().enumerate() {
                let same = if i == j { 1.0 } else { 0.0 };
                let slope = if dims.norm_topk_prob {
                    same / total - scores[chosen[j]] / (total * total)
                } else {
                    same
                };
                dscores[*e] += dweight * slope;
            }
        }
        for a in 0..experts {
            let sum: f64 = (0..experts)
                .map(|b| dscores[b] * scores[b] * (if a == b { 1.0 } else { 0.0 } - scores[a]))
                .sum();
            dlogits[t * experts + a] = sum as f32;
        }
    }
}
