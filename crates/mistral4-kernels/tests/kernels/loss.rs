//! Cross entropy of the language model head against its plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Element, LinearCrossEntropy, LinearCrossEntropyGrads, bf16, linear_cross_entropy, reference,
};

fn losses<X: Element, W: Element>() {
    for (tokens, vocab, width) in [(1, 1, 1), (5, 33, 7), (70, 130, 40)] {
        let mut random = Random::new(vocab as u64);
        let hidden = random.values::<X>(tokens * width, 1.0);
        let lm_head = random.values::<W>(vocab * width, 1.0);
        let labels: Vec<i64> =
            (0..tokens).map(|t| if t % 4 == 3 { -100 } else { random.below(vocab) as i64 }).collect();
        let input = LinearCrossEntropy { hidden: &hidden, lm_head: &lm_head, labels: &labels, vocab, width };
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
        assert!((got.loss - want.loss).abs() <= 1e-5 * want.loss.abs() + 1e-6, "{got:?} {want:?}");
        assert_close("dhidden", &dh, &want_dh, tolerance::<X>());
        assert_close("dlm_head", &dw, &want_dw, tolerance::<W>().max(tolerance::<X>()));

        let alone = linear_cross_entropy(&input, LinearCrossEntropyGrads { hidden: None, lm_head: None });
        assert_eq!(alone, got);
    }
}

#[test]
fn cross_entropies() {
    on_each_isa(|_| {
        losses::<f32, f32>();
        losses::<bf16, bf16>();
    });
}

#[test]
fn no_labels_give_zero() {
    let (hidden, lm_head, labels) = (vec![1.0f32; 6], vec![1.0f32; 9], vec![-100i32; 2]);
    let input =
        LinearCrossEntropy { hidden: &hidden, lm_head: &lm_head, labels: &labels, vocab: 3, width: 3 };
    let (mut dh, mut dw) = (poison::<f32>(6), poison::<f32>(9));
    let got = linear_cross_entropy(
        &input,
        LinearCrossEntropyGrads { hidden: Some(&mut dh), lm_head: Some(&mut dw) },
    );
    assert_eq!((got.loss, got.count), (0.0, 0));
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
