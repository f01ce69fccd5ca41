//! Language model head with cross entropy, without the logits of all tokens.
use crate::element::{Element, Index};
use crate::gemm::{LinearDims, linear, linear_backward_input, linear_backward_weight};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::scratch;
use crate::vector::{LANES, exp, per_isa, sum_by};

/// The label of tokens that carry no loss.
pub const IGNORE_INDEX: i64 = -100;

/// Logits kept at a time, in elements (128 MiB of `f32`): every block of rows reads and packs the head, and adds to its
/// gradient, once more.
const LOGITS: usize = 1 << 25;

/// Inputs of [`linear_cross_entropy`].
#[derive(Clone, Copy, Debug)]
pub struct LinearCrossEntropy<'a, X, W, I> {
    /// Hidden states, `[T, D]`.
    pub hidden: &'a [X],
    /// Head weight, `[V, D]`.
    pub lm_head: &'a [W],
    /// Labels, `[T]`, each in `0..V` or [`IGNORE_INDEX`].
    pub labels: &'a [I],
    /// V.
    pub vocab: usize,
    /// D.
    pub width: usize,
    /// Coefficient of the squared log-sum-exp of each labelled token's logits, which joins its loss; 0: none.
    pub z_loss: f32,
    /// Factor on the gradients: one over a number of tokens makes them those of a mean.
    pub grad_scale: f32,
}

/// Where [`linear_cross_entropy`] writes gradients of the summed loss, that of the log-sum-exps included, times
/// `grad_scale`; those that are `None` are not computed.
#[derive(Debug)]
pub struct LinearCrossEntropyGrads<'a, X, W> {
    /// Gradient of the hidden states, `[T, D]`.
    pub hidden: Option<&'a mut [X]>,
    /// Gradient of the head, `[V, D]`.
    pub lm_head: Option<&'a mut [W]>,
}

/// Loss of [`linear_cross_entropy`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossSum {
    /// Sum of the negative log-likelihoods.
    pub loss: f64,
    /// Sum of the squared log-sum-exps, times their coefficient.
    pub z_loss: f64,
    /// Tokens that carry loss.
    pub count: usize,
}

/// Summed cross entropy of `hidden lm_head^T` and its gradients, a block of tokens at a time.
///
/// Only tokens with a label cost anything.
///
/// Source: Chowdhery et al. 2022 (PaLM), section 5, for the z-loss.
///
/// # Panics
/// When a slice has the wrong length or a label is neither in `0..V` nor [`IGNORE_INDEX`].
pub fn linear_cross_entropy<X: Element, W: Element, I: Index>(
    input: &LinearCrossEntropy<'_, X, W, I>,
    grads: LinearCrossEntropyGrads<'_, X, W>,
) -> LossSum {
    let LinearCrossEntropy { hidden, lm_head, labels, vocab, width, z_loss, grad_scale } = *input;
    assert_eq!(hidden.len(), labels.len() * width, "hidden is [T, D]");
    assert_eq!(lm_head.len(), vocab * width, "lm_head is [V, D]");
    let LinearCrossEntropyGrads { hidden: mut dhidden, lm_head: mut dlm_head } = grads;
    if let Some(dhidden) = &mut dhidden {
        assert_eq!(dhidden.len(), hidden.len(), "dhidden is [T, D]");
        dhidden.fill(X::default());
    }
    if let Some(dlm_head) = &dlm_head {
        assert_eq!(dlm_head.len(), lm_head.len(), "dlm_head is [V, D]");
    }
    let isa = Isa::active();
    let targets: Vec<(usize, usize)> = labels
        .iter()
        .enumerate()
        .filter(|(_, label)| label.to_i64() != IGNORE_INDEX)
        .map(|(token, label)| {
            let target = usize::try_from(label.to_i64()).unwrap_or(usize::MAX);
            assert!(target < vocab, "label {label:?} is neither in 0..{vocab} nor {IGNORE_INDEX}");
            (token, target)
        })
        .collect();
    let want_grads = dhidden.is_some() || dlm_head.is_some();
    let mut total = LossSum { loss: 0.0, z_loss: 0.0, count: targets.len() };
    let block_rows = (LOGITS / vocab.max(1)).clamp(16, 4096);
    for (block, targets) in targets.chunks(block_rows).enumerate() {
        let rows = targets.len();
        let dims = LinearDims { rows, inputs: width, outputs: vocab };
        let mut x = scratch::take::<X>(rows * width);
        for (x, (token, _)) in x.chunks_exact_mut(width.max(1)).zip(targets) {
            x.copy_from_slice(&hidden[token * width..(token + 1) * width]);
        }
        let mut logits = scratch::take::<f32>(rows * vocab);
        linear(dims, &x, lm_head, &mut logits);
        // The gradient of the logits, in the type that the products with it run in.
        let mut dlogits = scratch::take::<X>(if want_grads { rows * vocab } else { 0 });
        let mut losses = vec![[0.0f64; 2]; rows];
        let (shared, dshared) = (Shared::new(&mut losses), Shared::new(&mut dlogits));
        let logits = &*logits;
        parallel::for_each(rows, |row| {
            let logits = &logits[row * vocab..(row + 1) * vocab];
            // SAFETY: each task owns its row.
            let loss = unsafe { &mut shared.slice(row..row + 1)[0] };
            let (max, sum) = max_and_sum(isa, logits);
            let target = targets[row].1;
            let over_max = f64::from(sum).ln();
            let lse = over_max + f64::from(max);
            *loss = [over_max + f64::from(max - logits[target]), f64::from(z_loss) * lse * lse];
            if want_grads {
                // SAFETY: each task owns its row.
                let dlogits = unsafe { dshared.slice(row * vocab..(row + 1) * vocab) };
                // The derivative of `z lse^2` is `2 z lse` times the softmax.
                let factor = 1.0 + 2.0 * z_loss * lse as f32;
                softmax(isa, logits, max, grad_scale * factor / sum, dlogits);
                let p = (logits[target] - max).exp() / sum;
                dlogits[target] = X::from_f32(grad_scale * (p * factor - 1.0));
            }
        });
        total.loss += losses.iter().map(|[loss, _]| loss).sum::<f64>();
        total.z_loss += losses.iter().map(|[_, z_loss]| z_loss).sum::<f64>();
        if let Some(dhidden) = &mut dhidden {
            let mut dx = scratch::take::<X>(rows * width);
            linear_backward_input(dims, &dlogits, lm_head, &mut dx, false);
            for (dx, (token, _)) in dx.chunks_exact(width.max(1)).zip(targets) {
                dhidden[token * width..(token + 1) * width].copy_from_slice(dx);
            }
        }
        if let Some(dlm_head) = &mut dlm_head {
            linear_backward_weight(dims, &dlogits, &x, dlm_head, block > 0);
        }
    }
    if targets.is_empty()
        && let Some(dlm_head) = dlm_head
    {
        dlm_head.fill(W::default());
    }
    total
}

per_isa! {
    /// Largest logit and the sum of exponentials relative to it.
    fn max_and_sum(logits: &[f32]) -> (f32, f32) = max_and_sum_body;
}

#[inline(always)]
fn max_and_sum_body<const FMA: bool>(logits: &[f32]) -> (f32, f32) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (max, x) in lanes.iter_mut().zip(chunk) {
            *max = if *x > *max { *x } else { *max };
        }
    }
    let max = lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max);
    // Blocks bound the rounding error of long sums.
    let mut total = 0.0f32;
    for block in logits.chunks(LANES * 128) {
        total += sum_by(block, |x, sum| sum + exp::<FMA>(*x - max));
    }
    (max, total)
}

per_isa! {
    fn softmax<X: Element>(logits: &[f32], max: f32, factor: f32, out: &mut [X]) = softmax_body;
}

#[inline(always)]
fn softmax_body<X: Element, const FMA: bool>(logits: &[f32], max: f32, factor: f32, out: &mut [X]) {
    for (out, x) in out.iter_mut().zip(logits) {
        *out = X::from_f32(exp::<FMA>(*x - max) * factor);
    }
}
