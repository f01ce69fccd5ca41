//! The operations that decide the speed of the model.
//!
//! Every operation has two bodies: a [`composite`] one in Burn tensor calls, which runs and differentiates on every
//! backend, and a fused one in `mistral4-kernels`, which the CPU backend takes. Tests compare the two.

pub mod activation;
#[cfg(feature = "flex")]
mod autodiff;
pub mod collective;
pub mod composite;
mod deferral;
#[cfg(feature = "flex")]
mod extension;
#[cfg(feature = "flex")]
mod flex;
pub mod packed;
pub mod quantized;
#[cfg(feature = "flex")]
mod saved;

#[cfg(all(test, feature = "flex"))]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Device, Int, Tensor};
use mistral4_checkpoint::config::Activation;
pub use mistral4_kernels::{RouterDims, Segment};

pub use self::collective::Group;
pub use self::deferral::{Deferral, DeferredGradient, ExpertGradients};

static COMPOSITE_ONLY: AtomicBool = AtomicBool::new(false);

/// Makes every operation of this process run its composite body, for comparing the two.
pub fn force_composite(on: bool) {
    COMPOSITE_ONLY.store(on, Ordering::Relaxed);
}

/// Whether tensors on `device` take the fused kernels.
pub fn is_fused(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    {
        use burn::backend::DispatchDevice;
        let device = device.clone().without_autodiff();
        !COMPOSITE_ONLY.load(Ordering::Relaxed) && matches!(device.as_dispatch(), DispatchDevice::Flex(_))
    }
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

/// Which keys each query row sees, and the factor on the scores.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// Factor on `q . k`.
    pub scale: f64,
    /// Disjoint runs of query rows in rising order, each with its run of key rows. Query rows outside every
    /// segment give zeros.
    pub segments: Arc<[Segment]>,
}

/// A linear map `y = x W^T`.
///
/// # Shapes
/// - `x`: `[rows, in]`, `weight`: `[out, in]`, output: `[rows, out]`
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::linear(x, weight);
    }
    composite::linear(x, weight)
}

/// A linear map with f32 results, whatever `x` and `weight` are in: the router's.
///
/// # Shapes
/// - `x`: `[rows, in]`, `weight`: `[out, in]`, output: `[rows, out]`
pub fn linear_f32(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::linear_f32(x, weight);
    }
    composite::linear(x.cast(DType::F32), weight.cast(DType::F32))
}

/// Weights of the experts chosen for each token: their `softmax(logits)`, divided by its sum over the token's choice if
/// `dims` says so, times the factor there.
///
/// # Shapes
/// - `logits`: `[T, E]` f32; `indices`, output: `[T, K]`
pub fn routing_weights(logits: Tensor<2>, indices: Tensor<2, Int>, dims: RouterDims) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&logits.device()) {
        return extension::routing_weights(logits, indices, dims);
    }
    composite::routing_weights(logits, indices, dims)
}

/// Root-mean-square norm: `x / sqrt(mean(x^2) + eps)`, computed in f32 and rounded once, times `weight`.
///
/// Source: Zhang and Sennrich 2019, `Mistral4RMSNorm` in transformers.
///
/// # Shapes
/// - `x`: `[rows, D]`, `weight`: `[D]`, output: `[rows, D]`
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::rms_norm(x, weight, eps);
    }
    composite::rms_norm(x, weight, eps)
}

/// Which part of a head is rotated, how its pairs lie, and how the head is scaled.
#[derive(Debug, Clone)]
pub struct RopeSpec {
    /// First rotated entry of the head.
    pub offset: usize,
    /// Pairs `(x0, x1), (x2, x3), ...` instead of halves; either way the result lies in halves.
    pub interleaved: bool,
    /// Factor on the whole head, `[T]`; `None`: 1.
    pub scale: Option<Arc<[f32]>>,
}

/// Rotary embedding of the `2 * pairs` entries of each head that begin at `spec.offset`; then the whole head is
/// multiplied by the token's scale.
///
/// Source: Su et al. 2021; `apply_rotary_pos_emb_interleave` in transformers for the layout.
///
/// # Shapes
/// - `x`: `[T, N, H]`, `cos`, `sin`: `[T, pairs]` f32, output: `[T, N, H]`
pub fn rope(x: Tensor<3>, cos: Tensor<2>, sin: Tensor<2>, spec: RopeSpec) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::rope(x, cos, sin, spec);
    }
    composite::rope(x, cos, sin, spec)
}

/// Scaled dot-product attention over segments of rows.
///
/// Heads of `k` and `v` may be fewer than those of `q`; each serves a run of neighbouring query heads.
///
/// # Shapes
/// - `q`: `[Tq, N, H]`, `k`: `[Tk, Nkv, H]`, `v`: `[Tk, Nkv, Hv]`, output: `[Tq, N, Hv]`
pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, spec: AttentionSpec) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if is_fused(&q.device()) {
        return extension::attention(q, k, v, spec);
    }
    composite::attention(q, k, v, spec)
}

/// Sizes and mask of multi-head latent attention.
#[derive(Debug, Clone)]
pub struct MlaSpec {
    /// Scale and segments.
    pub attention: AttentionSpec,
    /// Entries of a query that are not rotated; the rotated part follows them.
    pub nope: usize,
    /// Entries of a head's output.
    pub value_dim: usize,
}

/// Multi-head latent attention with keys and values expanded by `kv_b_proj`: among the tokens of one pass, or over the
/// slots of a cache, which is for inference (the fused body then has no gradient).
///
/// # Shapes
/// - `q`: `[T, N, nope + rope]`, `kv`: `[slots, N, nope + v]`, `k_pe`: `[slots, rope]`
/// - output: `[T, N, v]`
pub fn mla_attention(q: Tensor<3>, kv: Tensor<3>, k_pe: Tensor<2>, spec: MlaSpec) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if is_fused(&q.device()) {
        return extension::mla_attention(q, kv, k_pe, spec);
    }
    composite::mla_attention(q, kv, k_pe, spec)
}

/// Multi-head latent attention over cached latents in the absorbed form: `kv_b` is applied to queries and outputs.
///
/// For inference: the fused body has no gradient, so tensors that ask for one take the composite body.
///
/// Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.2.
///
/// # Shapes
/// - `q`: `[T, N, nope + rope]`, `latents`: `[slots, R + rope]`, `kv_b`: `[N * (nope + v), R]`
/// - output: `[T, N, v]`
pub fn latent_attention(q: Tensor<3>, latents: Tensor<2>, kv_b: Tensor<2>, spec: MlaSpec) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if is_fused(&q.device()) && !q.is_tracked() && !latents.is_tracked() && !kv_b.is_tracked() {
        return extension::latent_attention(q, latents, kv_b, spec);
    }
    composite::latent_attention(q, latents, kv_b, spec)
}

/// `act(gate) * up`.
///
/// # Shapes
/// - `gate`, `up`, output: `[rows, F]`
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&gate.device()) {
        return extension::gated(gate, up, activation);
    }
    composite::gated(gate, up, activation)
}

/// `a + b`, as on the residual stream.
///
/// # Shapes
/// - `a`, `b`, output: `[rows, D]`
pub fn add(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&a.device()) {
        return extension::add(a, b);
    }
    a + b
}

/// Routed gated feed-forward: each token goes through its K experts, weighted and summed.
///
/// While `deferral` is open, the gradients of the weights leave the backward pass there.
///
/// # Shapes
/// - `x`: `[T, D]`; `indices`, `weights`: `[T, K]`
/// - `gate_up`: `[E, 2F, D]` (gate rows first), `down`: `[E, D, F]`
/// - output: `[T, D]`
pub fn moe_experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    gate_up: Tensor<3>,
    down: Tensor<3>,
    activation: Activation,
    deferral: &Deferral,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::moe_experts(x, indices, weights, gate_up, down, activation, deferral.clone());
    }
    let _ = deferral;
    composite::moe_experts(x, indices, weights, gate_up, down, activation)
}

/// One linear map an expert: `y[rows of e] = x[rows of e] weight[e]^T`, rows sorted by expert.
///
/// # Shapes
/// - `x`: `[M, in]`, `weight`: `[E, out, in]`, output: `[M, out]`
/// - `offsets`: `[E + 1]`, the rows of expert `e` are `offsets[e]..offsets[e + 1]`
pub fn grouped_linear(x: Tensor<2>, weight: Tensor<3>, offsets: Arc<[usize]>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::grouped_linear(x, weight, offsets);
    }
    composite::grouped_linear(x, weight, &offsets)
}

/// Factors on the loss of labelled tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLossScale {
    /// On the loss of each labelled token: one over their number makes the sum a mean.
    pub per_token: f64,
    /// On the squared log-sum-exp of its logits, beside its cross entropy.
    pub z_loss: f64,
}

/// The loss of labelled tokens, summed.
#[derive(Debug, Clone)]
pub struct TokenLoss {
    /// Cross entropy and z-loss together, times the factor per token: what gradients come from, `[1]` f32.
    pub total: Tensor<1>,
    /// The cross entropy without that factor, a measurement without gradient, `[1]` f32.
    pub cross_entropy: Tensor<1>,
    /// The z-loss without it, a measurement without gradient, `[1]` f32.
    pub z_loss: Tensor<1>,
}

/// Sum over labelled tokens of the cross entropy of `h W^T` with the labels, and of `scale.z_loss` times the squared
/// log-sum-exp of the token's logits; -100 marks tokens without a label.
///
/// Source: Chowdhery et al. 2022 (PaLM), section 5, for the z-loss, which keeps the log-sum-exps near 0.
///
/// # Shapes
/// - `h`: `[T, D]`, `lm_head`: `[V, D]`, `labels`: `[T]` (already aligned: `labels[t]` is the target of row `t`)
pub fn linear_cross_entropy(
    h: Tensor<2>,
    lm_head: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: TokenLossScale,
) -> TokenLoss {
    #[cfg(feature = "flex")]
    if is_fused(&h.device()) {
        return extension::linear_cross_entropy(h, lm_head, labels, scale);
    }
    composite::linear_cross_entropy(h, lm_head, labels, scale)
}

/// Zero, whose gradient by `x` is `gradient`: where the backward pass begins with a gradient that came from elsewhere.
///
/// # Shapes
/// - `x`, `gradient`: the same; output: `[1]` f32
pub fn zero_with_gradient<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    #[cfg(feature = "flex")]
    if is_fused(&x.device()) {
        return extension::zero_with_gradient(x, gradient);
    }
    composite::zero_with_gradient(x, gradient)
}
