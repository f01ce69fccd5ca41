//! Plain routed experts.
use crate::{Activation, Element, ExpertDims, ExpertGrads, Experts, Index};

/// Value and derivative of an activation.
pub(super) fn activate(activation: Activation, x: f64) -> (f64, f64) {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};
    match activation {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s + x * s * (1.0 - s))
        }
        Activation::Gelu => {
            let cdf = 0.5 * (1.0 + super::erf(x * FRAC_1_SQRT_2));
            (x * cdf, cdf + x * (-0.5 * x * x).exp() / (2.0 * PI).sqrt())
        }
        Activation::GeluTanh => {
            let c = FRAC_2_PI.sqrt();
            let t = (c * (x + 0.044715 * x.powi(3))).tanh();
            let slope = c * (1.0 + 3.0 * 0.044715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
        }
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
    }
}

/// See [`crate::gated`].
pub fn gated<T: Element>(activation: Activation, gate: &[T], up: &[T], out: &mut [T]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        let (value, _) = activate(activation, f64::from(gate.to_f32()));
        *out = T::from_f32((value * f64::from(up.to_f32())) as f32);
    }
}

/// See [`crate::gated_backward`].
pub fn gated_backward<T: Element>(
    activation: Activation,
    [gate, up, dout]: [&[T]; 3],
    [dgate, dup]: [&mut [T]; 2],
) {
    for (i, dout) in dout.iter().enumerate() {
        let (value, slope) = activate(activation, f64::from(gate[i].to_f32()));
        let dout = f64::from(dout.to_f32());
        dgate[i] = T::from_f32((dout * f64::from(up[i].to_f32()) * slope) as f32);
        dup[i] = T::from_f32((dout * value) as f32);
    }
}

fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
}

fn add<A: Element>(sum: &mut [f64], scale: f64, a: &[A]) {
    for (sum, a) in sum.iter_mut().zip(a) {
        *sum += scale * f64::from(a.to_f32());
    }
}

fn store<T: Element>(target: Option<&mut [T]>, sums: &[f64]) {
    if let Some(target) = target {
        for (target, sum) in target.iter_mut().zip(sums) {
            *target = T::from_f32(*sum as f32);
        }
    }
}

/// See [`crate::moe_experts`].
pub fn moe_experts<X: Element, W: Element, I: Index>(input: &Experts<'_, X, W, I>, out: &mut [X]) {
    let mut sums = vec![0.0; out.len()];
    for_each_slot(input, |slot| {
        let weight = f64::from(input.weights[slot.index]);
        for d in 0..input.dims.hidden {
            sums[slot.token * input.dims.hidden + d] +=
                weight * dot_f64(slot.down_row(input, d), &slot.inner);
        }
    });
    store(Some(out), &sums);
}

/// See [`crate::moe_experts_backward`].
pub fn moe_experts_backward<X: Element, W: Element, I: Index>(
    input: &Experts<'_, X, W, I>,
    dout: &[X],
    grads: ExpertGrads<'_, X, W>,
) {
    let ExpertDims { hidden, inter, .. } = input.dims;
    let mut dx = vec![0.0; input.x.len()];
    let mut dweights = vec![0.0; input.weights.len()];
    let mut dgate_up = vec![0.0; input.gate_up.len()];
    let mut ddown = vec![0.0; input.down.len()];
    for_each_slot(input, |slot| {
        let x = &input.x[slot.token * hidden..][..hidden];
        let dout = &dout[slot.token * hidden..][..hidden];
        let weight = f64::from(input.weights[slot.index]);
        let mut dinner = vec![0.0; inter];
        for (d, dy) in dout.iter().enumerate() {
            let dy = f64::from(dy.to_f32());
            dweights[slot.index] += dy * dot_f64(slot.down_row(input, d), &slot.inner);
            add(&mut dinner, weight * dy, slot.down_row(input, d));
            let start = (slot.expert * hidden + d) * inter;
            for (g, inner) in ddown[start..start + inter].iter_mut().zip(&slot.inner) {
                *g += weight * dy * inner;
            }
        }
        for (f, dinner) in dinner.iter().enumerate() {
            let (value, slope) = activate(input.activation, slot.gate[f]);
            for (row, gradient) in [(f, dinner * slot.up[f] * slope), (inter + f, dinner * value)] {
                let start = (slot.expert * 2 * inter + row) * hidden;
                add(
                    &mut dx[slot.token * hidden..][..hidden],
                    gradient,
                    &input.gate_up[start..start + hidden],
                );
                add(&mut dgate_up[start..start + hidden], gradient, x);
            }
        }
    });
    store(grads.x, &dx);
    store(grads.weights, &dweights);
    store(grads.gate_up, &dgate_up);
    store(grads.down, &ddown);
}

struct Slot {
    index: usize,
    token: usize,
    expert: usize,
    gate: Vec<f64>,
    up: Vec<f64>,
    inner: Vec<f64>,
}

impl Slot {
    fn down_row<'a, X, W, I>(&self, input: &Experts<'a, X, W, I>, d: usize) -> &'a [W] {
        &input.down[(self.expert * input.dims.hidden + d) * input.dims.inter..][..input.dims.inter]
    }
}

fn dot_f64<A: Element>(a: &[A], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * b).sum()
}

fn for_each_slot<X: Element, W: Element, I: Index>(
    input: &Experts<'_, X, W, I>,
    mut visit: impl FnMut(Slot),
) {
    let ExpertDims { tokens, top_k, hidden, inter, .. } = input.dims;
    for index in 0..tokens * top_k {
        let token = index / top_k;
        let expert = usize::try_from(input.indices[index].to_i64()).expect("a valid expert index");
        let x = &input.x[token * hidden..][..hidden];
        let project = |row: usize| dot(&input.gate_up[(expert * 2 * inter + row) * hidden..][..hidden], x);
        let gate: Vec<f64> = (0..inter).map(project).collect();
        let up: Vec<f64> = (inter..2 * inter).map(project).collect();
        let inner = gate.iter().zip(&up).map(|(g, u)| activate(input.activation, *g).0 * u).collect();
        visit(Slot { index, token, expert, gate, up, inner });
    }
}
