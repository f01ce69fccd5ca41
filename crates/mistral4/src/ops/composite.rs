//! The operations in Burn tensor calls: portable, differentiable, and the reference for the fused kernels.

use burn::tensor::{
    Bool, DType, Device, IndexingUpdateOp, Int, Tensor, TensorData,
    activation::{log_softmax, softmax},
};
use mistral4_checkpoint::config::Activation;

use super::{AttentionSpec, MlaSpec, RopeSpec, RouterDims, TokenLoss, TokenLossScale, activation};

/// See [`super::linear`].
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// See [`super::routing_weights`].
pub fn routing_weights(logits: Tensor<2>, indices: Tensor<2, Int>, dims: RouterDims) -> Tensor<2> {
    let weights = softmax(logits, 1).gather(1, indices);
    let weights = if dims.norm_topk_prob { weights.clone() / (weights.sum_dim(1) + 1e-20) } else { weights };
    weights * dims.routed_scaling_factor
}

/// See [`super::rms_norm`].
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let mean_square = x.clone().square().mean_dim(1);
    let normed = x * (mean_square + eps).sqrt().recip();
    normed.cast(dtype) * weight.unsqueeze()
}

/// See [`super::rope`].
pub fn rope(x: Tensor<3>, cos: Tensor<2>, sin: Tensor<2>, spec: RopeSpec) -> Tensor<3> {
    let [tokens, heads, width] = x.dims();
    let pairs = cos.dims()[1];
    let end = spec.offset + 2 * pairs;
    assert!(end <= width, "rope: entries {}..{end} of a head of {width}", spec.offset);
    let dtype = x.dtype();
    let rotated = x.clone().slice_dim(2, spec.offset..end).cast(DType::F32);
    let (first, second) = if spec.interleaved {
        let paired = rotated.reshape([tokens, heads, pairs, 2]);
        let part = |i: usize| paired.clone().slice_dim(3, i..i + 1).reshape([tokens, heads, pairs]);
        (part(0), part(1))
    } else {
        (rotated.clone().slice_dim(2, 0..pairs), rotated.slice_dim(2, pairs..2 * pairs))
    };
    let cos: Tensor<3> = cos.unsqueeze_dim(1);
    let sin: Tensor<3> = sin.unsqueeze_dim(1);
    let low = first.clone() * cos.clone() - second.clone() * sin.clone();
    let high = second * cos + first * sin;
    let mut parts = vec![low.cast(dtype), high.cast(dtype)];
    if spec.offset > 0 {
        parts.insert(0, x.clone().slice_dim(2, 0..spec.offset));
    }
    if end < width {
        parts.push(x.slice_dim(2, end..width));
    }
    let rotated = Tensor::cat(parts, 2);
    match spec.scale {
        Some(scale) => {
            let device = rotated.device().without_autodiff();
            let scale = Tensor::<3>::from_data(TensorData::new(scale.to_vec(), [tokens, 1, 1]), &device);
            rotated * scale.cast(dtype)
        }
        None => rotated,
    }
}

/// See [`super::attention`].
pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, spec: AttentionSpec) -> Tensor<3> {
    let [rows, heads, _] = q.dims();
    let v_width = v.dims()[2];
    let device = q.device();
    let dtype = q.dtype();
    let zeros = |n: usize| Tensor::<3>::zeros([n, heads, v_width], (&device, dtype));
    let mut parts = Vec::new();
    let mut next = 0;
    for segment in spec.segments.iter() {
        assert!(
            segment.q.start >= next,
            "attention: segments overlap or go backwards at query row {}",
            segment.q.start
        );
        if segment.q.start > next {
            parts.push(zeros(segment.q.start - next));
        }
        next = segment.q.end;
        if segment.q.is_empty() {
            continue;
        }
        if segment.k.is_empty() {
            parts.push(zeros(segment.q.len()));
            continue;
        }
        let q = q.clone().slice_dim(0, segment.q.clone()).swap_dims(0, 1);
        let k = repeat_heads(k.clone().slice_dim(0, segment.k.clone()).swap_dims(0, 1), heads);
        let v = repeat_heads(v.clone().slice_dim(0, segment.k.clone()).swap_dims(0, 1), heads);
        let mut scores = q.matmul(k.transpose()).cast(DType::F32) * spec.scale;
        if let Some(offset) = segment.causal {
            assert!(offset >= 0, "attention: a causal segment whose first query row sees no key");
            let hidden = hidden_keys(segment.q.len(), segment.k.len(), offset, &scores.device());
            scores = scores.mask_fill(hidden.unsqueeze(), f32::NEG_INFINITY);
        }
        let out = softmax(scores, 2).cast(dtype).matmul(v);
        parts.push(out.swap_dims(0, 1));
    }
    if next < rows {
        parts.push(zeros(rows - next));
    }
    Tensor::cat(parts, 0)
}

/// See [`super::mla_attention`].
pub fn mla_attention(q: Tensor<3>, kv: Tensor<3>, k_pe: Tensor<2>, spec: MlaSpec) -> Tensor<3> {
    let (k, v) = expand(kv, k_pe, spec.nope);
    super::attention(q, k, v, spec.attention)
}

/// Keys `[T, N, nope + rope]` and values `[T, N, v]` of all heads.
///
/// # Shapes
/// - `kv`: `[T, N, nope + v]`, `k_pe`: `[T, rope]`
pub fn expand(kv: Tensor<3>, k_pe: Tensor<2>, nope: usize) -> (Tensor<3>, Tensor<3>) {
    let [tokens, heads, width] = kv.dims();
    let rope = k_pe.dims()[1];
    let k_nope = kv.clone().slice_dim(2, 0..nope);
    let v = kv.slice_dim(2, nope..width);
    let k_pe = k_pe.reshape([tokens, 1, rope]).expand([tokens, heads, rope]);
    (Tensor::cat(vec![k_nope, k_pe], 2), v)
}

/// See [`super::latent_attention`].
pub fn latent_attention(q: Tensor<3>, latents: Tensor<2>, kv_b: Tensor<2>, spec: MlaSpec) -> Tensor<3> {
    let [_, heads, head_dim] = q.dims();
    let [slots, width] = latents.dims();
    let rank = kv_b.dims()[1];
    let (nope, value_dim) = (spec.nope, spec.value_dim);
    let kv_b = kv_b.reshape([heads, nope + value_dim, rank]);
    let to_key = kv_b.clone().slice_dim(1, 0..nope);
    let to_value = kv_b.slice_dim(1, nope..nope + value_dim);

    let q_nope = q.clone().slice_dim(2, 0..nope).swap_dims(0, 1).matmul(to_key).swap_dims(0, 1);
    let q = Tensor::cat(vec![q_nope, q.slice_dim(2, nope..head_dim)], 2);
    let k = latents.reshape([slots, 1, width]);
    let v = k.clone().slice_dim(2, 0..rank);
    let out = super::attention(q, k, v, spec.attention);
    out.swap_dims(0, 1).matmul(to_value.transpose()).swap_dims(0, 1)
}

/// See [`super::gated`].
pub fn gated(gate: Tensor<2>, up: Tensor<2>, act: Activation) -> Tensor<2> {
    activation::apply(act, gate) * up
}

/// Attention with an explicit additive mask, for callers that bring their own.
///
/// # Shapes
/// - `q`: `[B * S, N, H]`, `k`: `[B * S, Nkv, H]`, `v`: `[B * S, Nkv, Hv]`
/// - `mask`: `[B, 1 or N, S, S]`, added to the scaled scores
/// - output: `[B * S, N, Hv]`
pub fn attention_with_mask(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    mask: Tensor<4>,
    scale: f64,
) -> Tensor<3> {
    let [tokens, heads, width] = q.dims();
    let [batch, _, rows, _] = mask.dims();
    let v_width = v.dims()[2];
    let dtype = q.dtype();
    let split = |x: Tensor<3>| {
        let [_, heads, width] = x.dims();
        x.reshape([batch, rows, heads, width]).swap_dims(1, 2)
    };
    assert_eq!(tokens, batch * rows, "attention: the mask's batch and rows do not give the tokens");
    let repeat = heads / k.dims()[1];
    let q = q.reshape([batch, rows, heads, width]).swap_dims(1, 2);
    let (mut k, mut v) = (split(k), split(v));
    if repeat > 1 {
        k = k.repeat_dim(1, repeat);
        v = v.repeat_dim(1, repeat);
    }
    let scores = q.matmul(k.transpose()).cast(DType::F32) * scale + mask.cast(DType::F32);
    let out = softmax(scores, 3).cast(dtype).matmul(v);
    out.swap_dims(1, 2).reshape([tokens, heads, v_width])
}

/// `true` where key `j` lies after query `i`, that is `j > i + offset`.
fn hidden_keys(queries: usize, keys: usize, offset: isize, device: &Device) -> Tensor<2, Bool> {
    let row =
        Tensor::<1, Int>::arange(0..queries as i64, device).add_scalar(offset as i64).unsqueeze_dim::<2>(1);
    let column = Tensor::<1, Int>::arange(0..keys as i64, device).unsqueeze_dim::<2>(0);
    column.expand([queries, keys]).greater(row.expand([queries, keys]))
}

/// `[Nkv, T, H]` to `[N, T, H]`, each head repeated for the query heads it serves.
fn repeat_heads(x: Tensor<3>, heads: usize) -> Tensor<3> {
    let [kv_heads, rows, width] = x.dims();
    if kv_heads == heads {
        return x;
    }
    let repeat = heads / kv_heads;
    x.unsqueeze_dim::<4>(1).expand([kv_heads, repeat, rows, width]).reshape([heads, rows, width])
}

/// See [`super::moe_experts`].
pub fn moe_experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    gate_up: Tensor<3>,
    down: Tensor<3>,
    act: Activation,
) -> Tensor<2> {
    let [experts, inter2, hidden] = gate_up.dims();
    let inter = inter2 / 2;
    let [tokens, top_k] = indices.dims();
    let device = x.device();
    let dtype = x.dtype();
    let choice =
        indices.into_data_as::<i64>().try_into_vec::<i64>().expect("indices were just converted to i64");
    let mut slots = vec![Vec::new(); experts];
    for (slot, &expert) in choice.iter().enumerate() {
        slots[expert as usize].push(slot as i64);
    }
    let flat_weights = weights.reshape([tokens * top_k]);
    let mut out = Tensor::<2>::zeros([tokens, hidden], (&device, DType::F32));
    for (expert, slots) in slots.into_iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
        let rows: Vec<i64> = slots.iter().map(|slot| slot / top_k as i64).collect();
        let count = rows.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &device);
        let slots = Tensor::<1, Int>::from_data(TensorData::new(slots, [count]), &device);
        let matrix = |w: &Tensor<3>| {
            let [_, rows, cols] = w.dims();
            w.clone().slice_dim(0, expert..expert + 1).reshape([rows, cols])
        };
        let hidden_states = x.clone().select(0, rows.clone());
        let both = linear(hidden_states, matrix(&gate_up));
        let gate = both.clone().slice_dim(1, 0..inter);
        let up = both.slice_dim(1, inter..inter2);
        let y = linear(activation::apply(act, gate) * up, matrix(&down));
        let weight = flat_weights.clone().select(0, slots).unsqueeze_dim::<2>(1);
        out = out.select_assign(0, rows, y.cast(DType::F32) * weight.cast(DType::F32), IndexingUpdateOp::Add);
    }
    out.cast(dtype)
}

/// See [`super::grouped_linear`].
pub fn grouped_linear(x: Tensor<2>, weight: Tensor<3>, offsets: &[usize]) -> Tensor<2> {
    let [_, outputs, inputs] = weight.dims();
    let used = offsets.windows(2).enumerate().filter(|(_, rows)| rows[0] < rows[1]);
    let parts: Vec<Tensor<2>> = used
        .map(|(expert, rows)| {
            let weight = weight.clone().slice_dim(0, expert..expert + 1).reshape([outputs, inputs]);
            linear(x.clone().slice_dim(0, rows[0]..rows[1]), weight)
        })
        .collect();
    match parts.is_empty() {
        true => Tensor::zeros([0, outputs], (&x.device(), x.dtype())),
        false => Tensor::cat(parts, 0),
    }
}

/// Token rows whose logits are held at once.
pub(crate) const LOSS_ROWS: usize = 1024;

/// See [`super::linear_cross_entropy`].
pub fn linear_cross_entropy(
    h: Tensor<2>,
    lm_head: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: TokenLossScale,
) -> TokenLoss {
    let tokens = h.dims()[0];
    let mut sum = TokenLoss::zero(&h.device());
    for start in (0..tokens).step_by(LOSS_ROWS) {
        let rows = start..(start + LOSS_ROWS).min(tokens);
        let logits = linear(h.clone().slice_dim(0, rows.clone()), lm_head.clone());
        sum = sum.add(cross_entropy(logits, labels.clone().slice_dim(0, rows), scale));
    }
    sum
}

/// Sum over labelled rows of the cross entropy of logits with their labels and of the z-loss; -100 marks rows without a
/// label.
///
/// # Shapes
/// - `logits`: `[T, V]`, `labels`: `[T]`
pub fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>, scale: TokenLossScale) -> TokenLoss {
    let [tokens, _] = logits.dims();
    let ignored = labels.clone().lower_elem(0);
    let target = labels.mask_fill(ignored.clone(), 0).unsqueeze_dim::<2>(1);
    let logits = logits.cast(DType::F32);
    let log_probability = log_softmax(logits.clone(), 1).gather(1, target).reshape([tokens]);
    let cross_entropy = log_probability.mask_fill(ignored.clone(), 0.0).sum().neg();
    if scale.z_loss == 0.0 {
        let z_loss = Tensor::zeros([1], (&cross_entropy.device(), DType::F32));
        let total = cross_entropy.clone() * scale.per_token;
        return TokenLoss { total, cross_entropy: cross_entropy.detach(), z_loss };
    }
    let z_loss = log_sum_exp(logits).square().mask_fill(ignored, 0.0).sum() * scale.z_loss;
    let total = (cross_entropy.clone() + z_loss.clone()) * scale.per_token;
    TokenLoss { total, cross_entropy: cross_entropy.detach(), z_loss: z_loss.detach() }
}

/// See [`super::zero_with_gradient`].
pub fn zero_with_gradient<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    let gradient = if x.device().is_autodiff() { gradient.autodiff() } else { gradient };
    let zero = (x.clone() - x.detach()).cast(DType::F32);
    (zero * gradient.cast(DType::F32)).sum()
}

/// `log(sum(exp(row)))` of every row.
///
/// # Shapes
/// - `x`: `[rows, n]`, output: `[rows]`
pub fn log_sum_exp(x: Tensor<2>) -> Tensor<1> {
    let [rows, _] = x.dims();
    let max = x.clone().detach().max_dim(1);
    ((x - max.clone()).exp().sum_dim(1).log() + max).reshape([rows])
}

impl TokenLoss {
    /// No loss.
    pub(crate) fn zero(device: &Device) -> Self {
        let zero = Tensor::zeros([1], (device, DType::F32));
        Self { total: zero.clone(), cross_entropy: zero.clone(), z_loss: zero }
    }

    /// The loss of both tokens' sums.
    pub(crate) fn add(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            cross_entropy: self.cross_entropy + other.cross_entropy,
            z_loss: self.z_loss + other.z_loss,
        }
    }
}
