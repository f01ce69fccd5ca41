//! Plain language model head with cross entropy.
use crate::{Element, IGNORE_INDEX, Index, LinearCrossEntropy, LinearCrossEntropyGrads, LossSum};

/// See [`crate::linear_cross_entropy`].
pub fn linear_cross_entropy<X: Element, W: Element, I: Index>(
    input: &LinearCrossEntropy<'_, X, W, I>,
    grads: LinearCrossEntropyGrads<'_, X, W>,
) -> LossSum {
    let LinearCrossEntropy { hidden, lm_head, labels, vocab, width, z_loss, grad_scale } = *input;
    let (z, scale) = (f64::from(z_loss), f64::from(grad_scale));
    let mut dhidden = vec![0.0f64; hidden.len()];
    let mut dlm_head = vec![0.0f64; lm_head.len()];
    let mut total = LossSum { loss: 0.0, z_loss: 0.0, count: 0 };
    for (t, label) in labels.iter().enumerate().filter(|(_, label)| label.to_i64() != IGNORE_INDEX) {
        let label = usize::try_from(label.to_i64()).expect("a label in the vocabulary");
        let h: Vec<f64> = hidden[t * width..(t + 1) * width].iter().map(|x| f64::from(x.to_f32())).collect();
        let w = |v: usize, d: usize| f64::from(lm_head[v * width + d].to_f32());
        let logits: Vec<f64> = (0..vocab).map(|v| (0..width).map(|d| w(v, d) * h[d]).sum()).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        total.loss += lse - logits[label];
        total.z_loss += z * lse * lse;
        total.count += 1;
        for (v, logit) in logits.iter().enumerate() {
            let g = (logit - lse).exp() * (1.0 + 2.0 * z * lse) - if v == label { 1.0 } else { 0.0 };
            let g = scale * g;
            for (d, h) in h.iter().enumerate() {
                dhidden[t * width + d] += g * w(v, d);
                dlm_head[v * width + d] += g * h;
            }
        }
    }
    if let Some(target) = grads.hidden {
        target.iter_mut().zip(dhidden).for_each(|(t, g)| *t = X::from_f32(g as f32));
    }
    if let Some(target) = grads.lm_head {
        target.iter_mut().zip(dlm_head).for_each(|(t, g)| *t = W::from_f32(g as f32));
    }
    total
}
