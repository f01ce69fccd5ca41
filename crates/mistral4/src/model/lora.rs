//! Low-rank adapters: a frozen matrix W is used as `W + scale * B A`, and A and B are trained in its place.
//!
//! Source: Hu et al. 2021 (LoRA); Liu et al. 2024 (DoRA); `LinearLoRA` and `GroupedExpertsLoRA` in NeMo AutoModel.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::model::dropout::{Dropout, DropoutPosition};
use crate::model::linear::Linear;
use crate::ops::collective::{copy_to_group, reduce_from_group};
use crate::ops::{self, Group, TokenLoss, TokenLossScale, composite};

/// The adapter of a linear map.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[r, in]`
    pub a: Param<Tensor<2>>,
    /// `[out, r]`
    pub b: Param<Tensor<2>>,
    /// Lengths of the adapted weight's rows, `[out]`: with it, A and B change directions only (DoRA).
    pub magnitude: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(crate) scale: f64,
    #[module(skip)]
    pub(crate) dropout: Option<Dropout>,
    #[module(skip)]
    pub(crate) divided: Divided,
}

/// The adapters of one stacked projection of all experts.
#[derive(Module, Debug)]
pub struct ExpertLora {
    /// `[E, r, in]`
    pub a: Param<Tensor<3>>,
    /// `[E, out, r]`
    pub b: Param<Tensor<3>>,
    #[module(skip)]
    pub(crate) scale: f64,
    #[module(skip)]
    pub(crate) divided: Divided,
}

/// The ranks that hold other parts of an adapted weight, by the axis that is divided; what is not divided along with it is
/// the same on all of them, and its gradient is the sum of theirs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Divided {
    /// Each rank has some outputs: rows of B, and all of A.
    pub(crate) outputs: Option<Arc<dyn Group>>,
    /// Each rank has some inputs: columns of A, and all of B; the outputs are sums over the ranks.
    pub(crate) inputs: Option<Arc<dyn Group>>,
}

impl Lora {
    /// The adapted output.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`; `y`: `x W^T`, `[rows, out]`; `weight`: gives W, `[out, in]`, which DoRA alone asks for
    ///   (of a divided weight: this rank's part)
    /// - output: `[rows, out]`
    pub fn forward(&self, x: Tensor<2>, y: Tensor<2>, weight: impl FnOnce() -> Tensor<2>) -> Tensor<2> {
        let dropout = self.dropout.as_ref().filter(|dropout| dropout.is_on());
        let before = dropout.filter(|dropout| dropout.position == DropoutPosition::Pre);
        let after = dropout.filter(|dropout| dropout.position == DropoutPosition::Post);
        let dropped = before.map_or_else(|| x.clone(), |dropout| dropout.apply(x.clone()));
        let change = self.change(dropped.clone());
        let change = after.map_or_else(|| change.clone(), |dropout| dropout.apply(change.clone()));
        let Some(magnitude) = &self.magnitude else { return y + change };
        let weight = weight();
        let magnitude = copy_to_group(magnitude.val(), &self.divided.inputs).cast(DType::F32);
        let factor = (magnitude / self.row_norms(&weight)).cast(y.dtype());
        let factor = factor.unsqueeze_dim::<2>(0);
        let base = if before.is_some() { ops::linear(dropped, weight) } else { y.clone() };
        y + (factor.clone() - 1.0) * base + factor * change
    }

    /// The weight that the adapted map amounts to, dropout left out.
    ///
    /// # Shapes
    /// - `weight`, output: `[out, in]`
    pub fn merged(&self, weight: Tensor<2>) -> Tensor<2> {
        let dtype = weight.dtype();
        let sum = weight.clone().cast(DType::F32) + self.product();
        let sum = match &self.magnitude {
            Some(magnitude) => {
                let factor = magnitude.val().cast(DType::F32) / self.row_norms(&weight);
                sum * factor.unsqueeze_dim::<2>(1)
            }
            None => sum,
        };
        sum.cast(dtype)
    }

    /// `scale * B A x`.
    fn change(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = x.dtype();
        let a = copy_to_group(self.a.val(), &self.divided.outputs);
        let b = copy_to_group(self.b.val(), &self.divided.inputs);
        let narrow = ops::linear(x, a.cast(dtype)) * self.scale;
        ops::linear(narrow, b.cast(dtype))
    }

    /// `scale * B A` in f32, `[out, in]`.
    fn product(&self) -> Tensor<2> {
        self.b.val().cast(DType::F32).matmul(self.a.val().cast(DType::F32)) * self.scale
    }

    /// Lengths of the rows of `W + scale * B A`, `[out]` f32, taken as constants.
    ///
    /// Source: Liu et al. 2024, section 4.3: no gradient flows through the norm.
    fn row_norms(&self, weight: &Tensor<2>) -> Tensor<1> {
        let [outputs, _] = weight.dims();
        let sum = weight.clone().cast(DType::F32).detach() + self.product().detach();
        reduce_from_group(sum.square().sum_dim(1), &self.divided.inputs).sqrt().reshape([outputs])
    }
}

/// Sum of the cross entropy of an adapted map's output with labels and of the z-loss, a block of rows at a time.
///
/// The gradients of a block are computed with its loss, so that the logits of one block are in memory at once; they wait
/// as factors of terms that are zero.
///
/// # Shapes
/// - `x`: `[T, in]`, `labels`: `[T]`
pub(crate) fn cross_entropy(
    linear: &Linear,
    x: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: TokenLossScale,
) -> TokenLoss {
    let [tokens, _] = x.dims();
    let starts = (0..tokens).step_by(composite::LOSS_ROWS);
    let blocks = starts.map(|start| {
        let rows = start..(start + composite::LOSS_ROWS).min(tokens);
        block_loss(linear, x.clone().slice_dim(0, rows.clone()), labels.clone().slice_dim(0, rows), scale)
    });
    blocks.reduce(TokenLoss::add).unwrap_or_else(|| TokenLoss::zero(&x.device()))
}

fn block_loss(linear: &Linear, x: Tensor<2>, labels: Tensor<1, Int>, scale: TokenLossScale) -> TokenLoss {
    if !x.device().is_autodiff() {
        return composite::cross_entropy(linear.forward(x), labels, scale);
    }
    let leaf = linear.valid().train();
    let input = x.clone().inner().autodiff().require_grad();
    let loss = composite::cross_entropy(leaf.forward(input.clone()), labels, scale);
    let mut gradients = loss.total.backward();
    let mut total = loss.total.inner().autodiff();
    if let Some(gradient) = input.grad_remove(&mut gradients) {
        total = total + ops::zero_with_gradient(x, gradient);
    }
    if let (Some(lora), Some(leaf)) = (&linear.lora, &leaf.lora) {
        let matrices = [(&lora.a, &leaf.a), (&lora.b, &leaf.b)];
        for (ours, leaf) in matrices {
            if let Some(gradient) = leaf.val().grad_remove(&mut gradients) {
                total = total + ops::zero_with_gradient(ours.val(), gradient);
            }
        }
        if let (Some(ours), Some(leaf)) = (&lora.magnitude, &leaf.magnitude)
            && let Some(gradient) = leaf.val().grad_remove(&mut gradients)
        {
            total = total + ops::zero_with_gradient(ours.val(), gradient);
        }
    }
    TokenLoss { total, ..loss }
}

impl ExpertLora {
    /// `scale * B[e] A[e] x` of each row, rows sorted by expert.
    ///
    /// # Shapes
    /// - `x`: `[M, in]`, `offsets`: `[E + 1]`, output: `[M, out]`
    pub fn change(&self, x: Tensor<2>, offsets: &Arc<[usize]>) -> Tensor<2> {
        let dtype = x.dtype();
        let a = copy_to_group(self.a.val(), &self.divided.outputs);
        let b = copy_to_group(self.b.val(), &self.divided.inputs);
        let narrow = ops::grouped_linear(x, a.cast(dtype), offsets.clone()) * self.scale;
        ops::grouped_linear(narrow, b.cast(dtype), offsets.clone())
    }
}

/// The choices of all tokens, sorted by expert: what adapted experts work on.
pub(crate) struct ExpertOrder {
    /// First sorted row of each expert, and their number, `[E + 1]`.
    pub(crate) offsets: Arc<[usize]>,
    /// Token of each sorted row, `[T * K]`.
    tokens: Tensor<1, Int>,
    /// Sorted row of each choice, `[T * K]`.
    rows: Tensor<1, Int>,
}

impl ExpertOrder {
    /// Sorts choices by expert; those of one expert stay in the order of tokens.
    ///
    /// # Shapes
    /// - `indices`: `[T, K]`
    pub(crate) fn new(indices: Tensor<2, Int>, experts: usize) -> Self {
        let [tokens, top_k] = indices.dims();
        let device = indices.device().without_autodiff();
        let choice = indices.into_data_as::<i64>().try_into_vec::<i64>();
        let choice = choice.expect("indices were just converted to i64");
        let mut offsets = vec![0usize; experts + 1];
        choice.iter().for_each(|&expert| offsets[expert as usize + 1] += 1);
        (0..experts).for_each(|expert| offsets[expert + 1] += offsets[expert]);
        let mut next = offsets.clone();
        let (mut token_of, mut row_of) = (vec![0i64; choice.len()], vec![0i64; choice.len()]);
        for (slot, &expert) in choice.iter().enumerate() {
            let row = &mut next[expert as usize];
            token_of[*row] = (slot / top_k) as i64;
            row_of[slot] = *row as i64;
            *row += 1;
        }
        let on_device = |values| Tensor::from_data(TensorData::new(values, [tokens * top_k]), &device);
        Self { offsets: offsets.into(), tokens: on_device(token_of), rows: on_device(row_of) }
    }

    /// The token of each sorted row.
    ///
    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T * K, D]`
    pub(crate) fn gather(&self, x: Tensor<2>) -> Tensor<2> {
        x.select(0, self.tokens.clone())
    }

    /// The weighted sum of each token's rows, summed in f32.
    ///
    /// # Shapes
    /// - `y`: `[T * K, D]` sorted, `weights`: `[T, K]`, output: `[T, D]`
    pub(crate) fn combine(&self, y: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        let [tokens, top_k] = weights.dims();
        let [_, hidden] = y.dims();
        let dtype = y.dtype();
        let y = y.select(0, self.rows.clone()).cast(DType::F32).reshape([tokens, top_k, hidden]);
        let weighted = y * weights.cast(DType::F32).unsqueeze_dim::<3>(2);
        weighted.sum_dim(1).reshape([tokens, hidden]).cast(dtype)
    }
}
