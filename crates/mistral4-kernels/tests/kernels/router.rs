//! Routing against its plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison};
use mistral4_kernels::{RouterDims, Routing, RoutingGrads, reference, route, route_backward};

const PLAIN: RouterDims = RouterDims {
    tokens: 50,
    experts: 8,
    top_k: 2,
    n_group: 1,
    topk_group: 1,
    norm_topk_prob: true,
    routed_scaling_factor: 1.5,
};

type Run = fn(RouterDims, &[f32], &[f32], Routing<'_>);

fn run(kernel: Run, dims: RouterDims, logits: &[f32], bias: &[f32]) -> (Vec<i32>, Vec<f32>, Vec<f32>) {
    let mut indices = vec![-1; dims.tokens * dims.top_k];
    let (mut weights, mut scores) = (poison(indices.len()), poison(logits.len()));
    let out = Routing { indices: &mut indices, weights: &mut weights, scores: &mut scores };
    kernel(dims, logits, bias, out);
    (indices, weights, scores)
}

#[test]
fn routes_and_gradients() {
    let variants = [
        PLAIN,
        RouterDims { experts: 1, top_k: 1, ..PLAIN },
        RouterDims { experts: 67, top_k: 5, norm_topk_prob: false, ..PLAIN },
        RouterDims { experts: 12, top_k: 1, ..PLAIN },
        RouterDims { experts: 12, top_k: 3, n_group: 4, topk_group: 2, ..PLAIN },
        RouterDims { experts: 6, top_k: 3, n_group: 6, topk_group: 4, ..PLAIN },
    ];
    on_each_isa(|_| {
        for dims in variants {
            let mut random = Random::new(dims.experts as u64);
            let logits = random.values::<f32>(dims.tokens * dims.experts, 2.0);
            let bias = random.values::<f32>(dims.experts, 0.2);
            let got = run(route, dims, &logits, &bias);
            let want = run(reference::route, dims, &logits, &bias);
            assert_eq!(got.0, want.0);
            assert_close("weights", &got.1, &want.1, 2e-6);
            assert_close("scores", &got.2, &want.2, 2e-6);

            let dweights = random.values::<f32>(got.1.len(), 1.0);
            let extra = random.values::<f32>(logits.len(), 1.0);
            for dscores in [None, Some(&extra[..])] {
                let saved = RoutingGrads { indices: &got.0, scores: &got.2, dweights: &dweights, dscores };
                let (mut d, mut want_d) = (poison::<f32>(logits.len()), poison::<f32>(logits.len()));
                route_backward(dims, saved, &mut d);
                reference::route_backward(dims, saved, &mut want_d);
                // With one chosen expert and normalised weights the exact gradient is zero.
                let both: Vec<f32> = d.iter().zip(&want_d).map(|(d, w)| d - w).collect();
                assert!(both.iter().all(|d| d.abs() < 2e-6), "{dims:?}");
            }
        }
    });
}

#[test]
fn ties_go_to_the_lowest_index() {
    let dims = RouterDims { tokens: 1, top_k: 3, ..PLAIN };
    let (indices, weights, _) = run(route, dims, &[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], &[0.0; 8]);
    assert_eq!(indices, [1, 3, 0]);
    assert!((weights.iter().sum::<f32>() - 1.5).abs() < 1e-6);
}

/// The bias decides who is chosen, and never the weight.
#[test]
fn bias_chooses_but_does_not_weigh() {
    let dims = RouterDims { tokens: 1, top_k: 1, norm_topk_prob: false, routed_scaling_factor: 1.0, ..PLAIN };
    let mut bias = [0.0; 8];
    bias[5] = 2.0;
    let (indices, weights, scores) = run(route, dims, &[0.5; 8], &bias);
    assert_eq!(indices, [5]);
    assert_eq!(weights[0], scores[5]);
}
