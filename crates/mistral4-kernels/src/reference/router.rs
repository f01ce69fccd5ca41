//! Plain routing.
use crate::{Index, RouterDims, Routing, RoutingGrads};

/// Positions of the `count` largest values, best first, lowest position first among equals.
fn top(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order
}

/// See [`crate::route`].
pub fn route(dims: RouterDims, logits: &[f32], bias: &[f32], out: Routing<'_>) {
    let RouterDims { experts, top_k, n_group, .. } = dims;
    for t in 0..dims.tokens {
        let logits = &logits[t * experts..(t + 1) * experts];
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f64> = logits.iter().map(|l| f64::from(l - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let scores: Vec<f64> = exps.iter().map(|e| e / sum).collect();
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
        let chosen = top(&choice, top_k);
        let total: f64 = chosen.iter().map(|e| scores[*e]).sum::<f64>() + 1e-20;
        for (k, e) in chosen.iter().enumerate() {
            let weight = if dims.norm_topk_prob { scores[*e] / total } else { scores[*e] };
            out.indices[t * top_k + k] = i32::try_from(*e).expect("a small expert index");
            out.weights[t * top_k + k] = (weight * f64::from(dims.routed_scaling_factor)) as f32;
        }
        for (out, score) in out.scores[t * experts..].iter_mut().zip(&scores) {
            *out = *score as f32;
        }
    }
}

/// See [`crate::route_backward`]; goes through the Jacobians of normalisation and softmax entry by entry.
pub fn route_backward<I: Index>(dims: RouterDims, saved: RoutingGrads<'_, I>, dlogits: &mut [f32]) {
    let RouterDims { experts, top_k, .. } = dims;
    for t in 0..dims.tokens {
        let scores: Vec<f64> = saved.scores[t * experts..][..experts].iter().map(|s| f64::from(*s)).collect();
        let chosen: Vec<usize> =
            saved.indices[t * top_k..][..top_k].iter().map(|i| i.to_i64() as usize).collect();
        let mut dscores = vec![0.0f64; experts];
        if let Some(extra) = saved.dscores {
            dscores.iter_mut().zip(&extra[t * experts..]).for_each(|(d, e)| *d = f64::from(*e));
        }
        let total: f64 = chosen.iter().map(|e| scores[*e]).sum::<f64>() + 1e-20;
        for (j, dweight) in saved.dweights[t * top_k..][..top_k].iter().enumerate() {
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
