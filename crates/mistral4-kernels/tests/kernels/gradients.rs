//! The plain twins' gradients against finite differences of their forward passes.
use crate::support::Random;
use mistral4_kernels::{
    Activation, Attention, AttentionDims, AttentionGrads, ExpertDims, ExpertGrads, Experts, RmsNormSaved,
    RouterDims, Segment, reference,
};

/// Checks `gradient` at every input of `loss` by central differences.
fn check(what: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    let step = 1e-2f32;
    for i in 0..x.len() {
        let mut moved = x.to_vec();
        moved[i] = x[i] + step;
        let up = loss(&moved);
        moved[i] = x[i] - step;
        let slope = (up - loss(&moved)) / f64::from(2.0 * step);
        assert!((slope - f64::from(gradient[i])).abs() < 2e-3, "{what}[{i}]: {} is not {slope}", gradient[i]);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[test]
fn expert_gradients() {
    let dims = ExpertDims { tokens: 3, top_k: 2, experts: 3, hidden: 4, inter: 3 };
    let mut random = Random::new(1);
    let x = random.values::<f32>(12, 1.0);
    let weights = random.values::<f32>(6, 1.0);
    let (gate_up, down) = (random.values::<f32>(72, 0.7), random.values::<f32>(36, 0.7));
    let dout = random.values::<f32>(12, 1.0);
    let indices = [0, 2, 2, 1, 0, 1];
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        let loss = |x: &[f32], weights: &[f32], gate_up: &[f32], down: &[f32]| {
            let mut out = [0.0f32; 12];
            let input = Experts { dims, activation, x, indices: &indices, weights, gate_up, down };
            reference::moe_experts(&input, &mut out);
            dot(&out, &dout)
        };
        let (mut dx, mut dweights, mut dgate_up, mut ddown) = ([0.0; 12], [0.0; 6], [0.0; 72], [0.0; 36]);
        let input = Experts {
            dims,
            activation,
            x: &x[..],
            indices: &indices,
            weights: &weights,
            gate_up: &gate_up[..],
            down: &down,
        };
        let grads = ExpertGrads {
            x: Some(&mut dx[..]),
            weights: Some(&mut dweights),
            gate_up: Some(&mut dgate_up[..]),
            down: Some(&mut ddown),
        };
        reference::moe_experts_backward(&input, &dout, grads);
        check("dx", &x, &dx, |x| loss(x, &weights, &gate_up, &down));
        check("dweights", &weights, &dweights, |w| loss(&x, w, &gate_up, &down));
        check("dgate_up", &gate_up, &dgate_up, |g| loss(&x, &weights, g, &down));
        check("ddown", &down, &ddown, |d| loss(&x, &weights, &gate_up, d));
    }
}

#[test]
fn attention_gradients() {
    let dims = AttentionDims::contiguous(4, 2, 3, 2);
    let segments =
        [Segment { q: 0..2, k: 0..3, causal: Some(1) }, Segment { q: 2..4, k: 1..5, causal: None }];
    let mut random = Random::new(2);
    let (q, k, v) =
        (random.values::<f32>(48, 1.0), random.values::<f32>(30, 1.0), random.values::<f32>(20, 1.0));
    let dout = random.values::<f32>(32, 1.0);
    let base = Attention { dims, q: &q[..], k: &k[..], v: &v[..], segments: &segments, scale: 0.9 };
    let loss = |q: &[f32], k: &[f32], v: &[f32]| {
        let (mut out, mut lse) = ([0.0f32; 32], [0.0; 16]);
        reference::attention(&Attention { q, k, v, ..base }, &mut out, &mut lse);
        dot(&out, &dout)
    };
    let (mut dq, mut dk, mut dv) = ([0.0; 48], [0.0; 30], [0.0; 20]);
    let grads = AttentionGrads { q: &mut dq, k: &mut dk, v: &mut dv };
    reference::attention_backward(&base, &dout, grads);
    check("dq", &q, &dq, |q| loss(q, &k, &v));
    check("dk", &k, &dk, |k| loss(&q, k, &v));
    check("dv", &v, &dv, |v| loss(&q, &k, v));
}

#[test]
fn norm_gradients() {
    let mut random = Random::new(3);
    let (x, weight) = (random.values::<f32>(15, 2.0), random.values::<f32>(5, 1.0));
    let dy = random.values::<f32>(15, 1.0);
    let forward = |x: &[f32], weight: &[f32]| {
        let (mut y, mut rstd) = ([0.0f32; 15], [0.0f32; 3]);
        reference::rms_norm(x, weight, 1e-3, &mut y, &mut rstd);
        (dot(&y, &dy), rstd)
    };
    let rstd = forward(&x, &weight).1;
    let (mut dx, mut dweight) = ([0.0f32; 15], [0.0f32; 5]);
    let saved = RmsNormSaved { x: &x[..], weight: &weight[..], rstd: &rstd };
    reference::rms_norm_backward(saved, &dy, &mut dx, &mut dweight);
    check("dx", &x, &dx, |x| forward(x, &weight).0);
    check("dweight", &weight, &dweight, |w| forward(&x, w).0);
}

#[test]
fn router_gradients() {
    for norm_topk_prob in [false, true] {
        let dims = RouterDims {
            tokens: 2,
            experts: 5,
            top_k: 3,
            n_group: 1,
            topk_group: 1,
            norm_topk_prob,
            routed_scaling_factor: 1.3,
        };
        let logits = [0.1, 0.9, -0.4, 0.5, -0.8, -0.3, 0.2, 0.7, -0.6, 1.1];
        let dweights = Random::new(4).values::<f32>(6, 1.0);
        let mut indices = [0; 6];
        reference::choose_experts(dims, &logits, &[0.0; 5], &mut indices);
        let forward = |logits: &[f32]| {
            let mut weights = [0.0f32; 6];
            reference::routing_weights(dims, logits, &indices, &mut weights);
            dot(&weights, &dweights)
        };
        let mut dlogits = [0.0f32; 10];
        reference::routing_weights_backward(dims, &logits, &indices, &dweights, &mut dlogits);
        check("dlogits", &logits, &dlogits, forward);
    }
}
