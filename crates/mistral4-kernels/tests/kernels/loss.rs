//! Cross entropy of the language model head against its plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Element, LinearCrossEntropy, LinearCrossEntropyGrads, LossSum, bf16, linear_cross_entropy, reference,
};

fn losses<X: Element, W: Element>(z_loss: f32, grad_scale: f32) {
    for (tokens, vocab, width) in [(1, 1, 1), (5, 33, 7), (70, 130, 40)] {
        let mut random = Random::new(vocab as u64);
        let hidden = random.values::<X>(tokens * width, 1.0);
        let lm_head = random.values::<W>(vocab * width, 1.0);
        let labels: Vec<i64> =
            (0..tokens).map(|t| if t % 4 == 3 { -100 } else { random.below(vocab) as i64 }).collect();
        let input = LinearCrossEntropy {
            hidden: &hidden,
            lm_head: &lm_head,
            labels: &labels,
            vocab,
            width,
            z_loss,
            grad_scale,
        };
        let (mut dh, mut want_dh) = (poison::<X>(hidden.len()), poison::<X>(hidden.len()));
        let (mut dw, mut want_dw) = (poison::<W>(lm_head.len()), poison::<W>(lm_head.len()));
        let got = linear_cross_entropy(
            &input,
            LinearCrossEntropyGrads { hidden: Some(&mut dh), lm_head: Some(&mut dw) },
        );
        let want = reference::linear_cross_entropy(
            &input,
            LinearCrossEntropyGrads { hidden: Some(&mut want_dh), lm_head: Some(&mut want_dw) },
        );
        assert_eq!(got.count, want.count);
        for (got, want) in [(got.loss, want.loss), (got.z_loss, want.z_loss)] {
            assert!((got - want).abs() <= 1e-5 * want.abs() + 1e-6, "{got:?} {want:?}");
        }
        assert_eq!(got.z_loss > 0.0, z_loss > 0.0);
        assert_close("dhidden", &dh, &want_dh, tolerance::<X>());
        assert_close("dlm_head", &dw, &want_dw, tolerance::<W>().max(tolerance::<X>()));

        let alone = linear_cross_entropy(&input, LinearCrossEntropyGrads { hidden: None, lm_head: None });
        assert_eq!(alone, got);
    }
}

#[test]
fn cross_entropies() {
    on_each_isa(|_| {
        for (z_loss, grad_scale) in [(0.0, 1.0), (0.3, 1.0), (0.3, 0.01)] {
            losses::<f32, f32>(z_loss, grad_scale);
            losses::<bf16, bf16>(z_loss, grad_scale);
        }
    });
}

/// The gradient of the z-loss by finite differences of the loss itself.
#[test]
fn z_loss_gradients_are_those_of_the_loss() {
    let (tokens, vocab, width, step) = (3, 11, 5, 1e-2f32);
    let mut random = Random::new(8);
    let hidden = random.values::<f32>(tokens * width, 1.0);
    let lm_head = random.values::<f32>(vocab * width, 1.0);
    let labels = [4i64, -100, 7];
    let input = |hidden: &[f32], grads: LinearCrossEntropyGrads<'_, f32, f32>| {
        let input = LinearCrossEntropy {
            hidden,
            lm_head: &lm_head,
            labels: &labels,
            vocab,
            width,
            z_loss: 0.5,
            grad_scale: 1.0,
        };
        linear_cross_entropy(&input, grads)
    };
    let mut dh = poison::<f32>(hidden.len());
    let LossSum { loss, z_loss, count } =
        input(&hidden, LinearCrossEntropyGrads { hidden: Some(&mut dh), lm_head: None });
    assert!(loss > 0.0 && z_loss > 0.0 && count == 2);
    for i in 0..hidden.len() {
        let at = |by: f32| {
            let mut moved = hidden.clone();
            moved[i] += by;
            let sum = input(&moved, LinearCrossEntropyGrads { hidden: None, lm_head: None });
            sum.loss + sum.z_loss
        };
        let slope = (at(step) - at(-step)) / (2.0 * f64::from(step));
        assert!((slope - f64::from(dh[i])).abs() < 2e-3, "{i}: {slope} is not {}", dh[i]);
    }
}

#[test]
fn no_labels_give_zero() {
    let (hidden, lm_head, labels) = (vec![1.0f32; 6], vec![1.0f32; 9], vec![-100i32; 2]);
    let input = LinearCrossEntropy {
        hidden: &hidden,
        lm_head: &lm_head,
        labels: &labels,
        vocab: 3,
        width: 3,
        z_loss: 1.0,
        grad_scale: 1.0,
    };
    let (mut dh, mut dw) = (poison::<f32>(6), poison::<f32>(9));
    let got = linear_cross_entropy(
        &input,
        LinearCrossEntropyGrads { hidden: Some(&mut dh), lm_head: Some(&mut dw) },
    );
    assert_eq!(got, LossSum { loss: 0.0, z_loss: 0.0, count: 0 });
    assert!(dh.iter().chain(&dw).all(|g| *g == 0.0));
}

/// More tokens than one block holds: blocks add up.
#[test]
fn blocks_add_up() {
    let (vocab, width) = (1 << 20, 1);
    let mut random = Random::new(3);
    let hidden = random.values::<f32>(40, 1.0);
    let lm_head = random.values::<f32>(vocab, 1.0);
    let labels: Vec<i32> = (0..40).map(|_| random.below(vocab) as i32).collect();
    let run = |tokens: std::ops::Range<usize>| {
        let input = LinearCrossEntropy {
            hidden: &hidden[tokens.clone()],
            lm_head: &lm_head,
            labels: &labels[tokens],
            vocab,
            width,
            z_loss: 0.0,
            grad_scale: 1.0,
        };
        let mut dw = poison::<f32>(vocab);
        let grads = LinearCrossEntropyGrads { hidden: None, lm_head: Some(&mut dw) };
        (linear_cross_entropy(&input, grads), dw)
    };
    let (whole, dw) = run(0..40);
    let parts = [run(0..16), run(16..40)];
    assert!((whole.loss - parts[0].0.loss - parts[1].0.loss).abs() < 1e-6 * whole.loss);
    let sum: Vec<f32> = parts[0].1.iter().zip(&parts[1].1).map(|(a, b)| a + b).collect();
    assert_close("dlm_head", &dw, &sum, 1e-6);
}
