//! Plain Adam and AdamW, and plain 8-bit numbers.
use crate::{AdamW, AdamWState, BLOCK_8BIT, DynamicMap, Element};

/// See [`crate::adamw_step`]; moments are rounded to nearest.
///
/// Source: the single-tensor paths of `torch.optim.Adam` and `torch.optim.AdamW`.
pub fn adamw_step<P: Element, G: Element, S: Element>(
    hyper: &AdamW,
    step: u64,
    state: AdamWState<'_, P, G, S>,
) {
    let correction1 = 1.0 - hyper.beta1.powf(step as f64);
    let correction2 = 1.0 - hyper.beta2.powf(step as f64);
    for i in 0..state.param.len() {
        let mut p = f64::from(state.param[i].to_f32());
        let mut g = f64::from(state.grad[i].to_f32()) * hyper.grad_scale;
        if hyper.decoupled_weight_decay {
            p *= 1.0 - hyper.lr * hyper.weight_decay;
        } else {
            g += hyper.weight_decay * p;
        }
        let m = hyper.beta1 * f64::from(state.exp_avg[i].to_f32()) + (1.0 - hyper.beta1) * g;
        let v = hyper.beta2 * f64::from(state.exp_avg_sq[i].to_f32()) + (1.0 - hyper.beta2) * g * g;
        let denominator = (v / correction2).sqrt() + hyper.eps;
        state.param[i] = P::from_f32((p - hyper.lr / correction1 * m / denominator) as f32);
        state.exp_avg[i] = S::from_f32(m as f32);
        state.exp_avg_sq[i] = S::from_f32(v as f32);
    }
}

/// The fractions of a map, in rising order.
///
/// Source: `create_dynamic_map` of bitsandbytes with 7 exponent bits of 8.
pub fn dynamic_map(map: DynamicMap) -> Vec<f32> {
    let mut fractions = vec![0.0, 1.0];
    for decade in 0..7 {
        let count = if map == DynamicMap::Signed { 1 << decade } else { 2 << decade };
        for index in 0..count {
            let middle = 0.1 + 0.9 * (f64::from(index) + 0.5) / f64::from(count);
            let fraction = (middle * 10f64.powi(decade - 6)) as f32;
            fractions.push(fraction);
            if map == DynamicMap::Signed {
                fractions.push(-fraction);
            }
        }
    }
    fractions.sort_by(f32::total_cmp);
    fractions
}

/// Codes and the largest magnitudes of blocks: for each number the nearest fraction, by trying all.
pub fn quantize(map: DynamicMap, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let fractions = dynamic_map(map);
    let absmax: Vec<f32> = values
        .chunks(BLOCK_8BIT)
        .map(|block| block.iter().fold(0.0f32, |largest, x| largest.max(x.abs())))
        .collect();
    let code = |(i, &x): (usize, &f32)| {
        let x = if absmax[i / BLOCK_8BIT] == 0.0 { 0.0 } else { x / absmax[i / BLOCK_8BIT] };
        let allowed = |&&code: &&usize| map == DynamicMap::Signed || x == 0.0 || fractions[code] != 0.0;
        let distance = |code: usize| (fractions[code] - x).abs();
        let codes: Vec<usize> = (0..256).collect();
        let nearest = codes.iter().filter(allowed).min_by(|&&a, &&b| distance(a).total_cmp(&distance(b)));
        *nearest.expect("there are 256 codes") as u8
    };
    (values.iter().enumerate().map(code).collect(), absmax)
}

/// The numbers that codes stand for.
pub fn dequantize(map: DynamicMap, codes: &[u8], absmax: &[f32]) -> Vec<f32> {
    let fractions = dynamic_map(map);
    codes.iter().enumerate().map(|(i, &code)| fractions[code as usize] * absmax[i / BLOCK_8BIT]).collect()
}
