//! Routing against its plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison};
use mistral4_kernels::{RouterDims, choose_experts, reference, routing_weights, routing_weights_backward};

const PLAIN: RouterDims = RouterDims {
    tokens: 50,
    experts: 8,
    top_k: 2,
    n_group: 1,
    topk_group: 1,
    norm_topk_prob: true,
    routed_scaling_factor: 1.5,
};

fn choose(dims: RouterDims, logits: &[f32], bias: &[f32]) -> Vec<i32> {
    let mut indices = vec![-1; dims.tokens * dims.top_k];
    choose_experts(dims, logits, bias, &mut indices);
    indices
}

fn weigh(dims: RouterDims, logits: &[f32], indices: &[i32]) -> Vec<f32> {
    let mut weights = poison(indices.len());
    routing_weights(dims, logits, indices, &mut weights);
    weights
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
            let indices = choose(dims, &logits, &bias);
            let mut want = vec![-1; indices.len()];
            reference::choose_experts(dims, &logits, &bias, &mut want);
            assert_eq!(indices, want);
            let (weights, mut want) = (weigh(dims, &logits, &indices), poison::<f32>(indices.len()));
            reference::routing_weights(dims, &logits, &indices, &mut want);
            assert_close("weights", &weights, &want, 2e-6);

            let dweights = random.values::<f32>(indices.len(), 1.0);
            let (mut d, mut want) = (poison::<f32>(logits.len()), poison::<f32>(logits.len()));
            routing_weights_backward(dims, &logits, &indices, &dweights, &mut d);
            reference::routing_weights_backward(dims, &logits, &indices, &dweights, &mut want);
            // With one chosen expert and normalised weights the exact gradient is zero.
            assert!(d.iter().zip(&want).all(|(d, w)| (d - w).abs() < 2e-6), "{dims:?}");
        }
    });
}

#[test]
fn ties_go_to_the_lowest_index() {
    let dims = RouterDims { tokens: 1, top_k: 3, ..PLAIN };
    let logits = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
    let indices = choose(dims, &logits, &[0.0; 8]);
    assert_eq!(indices, [1, 3, 0]);
    let weights = weigh(dims, &logits, &indices);
    assert!((weights.iter().sum::<f32>() - 1.5).abs() < 1e-6);
}

/// The bias decides who is chosen, and never the weight.
#[test]
fn bias_chooses_but_does_not_weigh() {
    let dims = RouterDims { tokens: 1, top_k: 1, norm_topk_prob: false, routed_scaling_factor: 1.0, ..PLAIN };
    let mut bias = [0.0; 8];
    bias[5] = 2.0;
    let indices = choose(dims, &[0.5; 8], &bias);
    assert_eq!(indices, [5]);
    assert_eq!(weigh(dims, &[0.5; 8], &indices), [0.125]);
}
