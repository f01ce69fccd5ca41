//! Plain AdamW.
use crate::{AdamW, AdamWState, Element};

/// See [`crate::adamw_step`].
///
/// Source: the single-tensor path of `torch.optim.AdamW`.
pub fn adamw_step<P: Element, G: Element, S: Element>(
    hyper: &AdamW,
    step: u64,
    state: AdamWState<'_, P, G, S>,
) {
    let correction1 = 1.0 - hyper.beta1.powf(step as f64);
    let correction2 = 1.0 - hyper.beta2.powf(step as f64);
    for i in 0..state.param.len() {
        let p = f64::from(state.param[i].to_f32()) * (1.0 - hyper.lr * hyper.weight_decay);
        let g = f64::from(state.grad[i].to_f32()) * hyper.grad_scale;
        let m = hyper.beta1 * f64::from(state.exp_avg[i].to_f32()) + (1.0 - hyper.beta1) * g;
        let v = hyper.beta2 * f64::from(state.exp_avg_sq[i].to_f32()) + (1.0 - hyper.beta2) * g * g;
        let denominator = (v / correction2).sqrt() + hyper.eps;
        state.param[i] = P::from_f32((p - hyper.lr / correction1 * m / denominator) as f32);
        state.exp_avg[i] = S::from_f32(m as f32);
        state.exp_avg_sq[i] = S::from_f32(v as f32);
    }
}
