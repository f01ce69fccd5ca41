//! The fused operations as an extension of Burn's CPU backend, and the calls that reach them from tensors.

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{Int, Tensor};
use mistral4_checkpoint::config::Activation;
use mistral4_kernels::RouterDims;

use super::packed::PackedWeight;
use super::{AttentionSpec, Deferral, MlaSpec, RopeSpec, TokenLoss, TokenLossScale};

/// Operations with kernels of their own; see the functions of the same names in [`super`].
#[backend_extension(Flex, Autodiff)]
pub(super) trait FusedOps: Backend {
    /// See [`super::linear`].
    fn linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::linear_f32`].
    fn linear_f32(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::packed::packed_linear`].
    fn packed_linear(x: FloatTensor<Self>, weight: PackedWeight) -> FloatTensor<Self>;

    /// See [`super::packed::packed_experts`].
    fn packed_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        experts: [PackedWeight; 2],
        activation: Activation,
    ) -> FloatTensor<Self>;

    /// See [`super::routing_weights`].
    fn routing_weights(
        logits: FloatTensor<Self>,
        indices: IntTensor<Self>,
        dims: RouterDims,
    ) -> FloatTensor<Self>;

    /// See [`super::rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;

    /// See [`super::rope`].
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RopeSpec,
    ) -> FloatTensor<Self>;

    /// See [`super::attention`].
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self>;

    /// See [`super::mla_attention`].
    fn mla_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        spec: MlaSpec,
    ) -> FloatTensor<Self>;

    /// See [`super::latent_attention`].
    fn latent_attention(
        q: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        spec: MlaSpec,
    ) -> FloatTensor<Self>;

    /// See [`super::gated`].
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;

    /// See [`super::add`].
    fn add(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::moe_experts`].
    fn moe_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        activation: Activation,
        deferral: Deferral,
    ) -> FloatTensor<Self>;

    /// See [`super::grouped_linear`].
    fn grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: Arc<[usize]>,
    ) -> FloatTensor<Self>;

    /// See [`super::linear_cross_entropy`]: total, cross entropy and z-loss, `[3]`, of which only the total is
    /// differentiated; `want` says which gradients (of `h`, of `lm_head`) will be asked for.
    fn linear_cross_entropy(
        h: FloatTensor<Self>,
        lm_head: FloatTensor<Self>,
        labels: IntTensor<Self>,
        scale: TokenLossScale,
        want: (bool, bool),
    ) -> FloatTensor<Self>;

    /// See [`super::zero_with_gradient`].
    fn zero_with_gradient(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
}

pub(super) fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::linear(x.into_dispatch(), weight.into_dispatch()))
}

pub(super) fn linear_f32(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::linear_f32(x.into_dispatch(), weight.into_dispatch()))
}

pub(super) fn packed_linear(x: Tensor<2>, weight: PackedWeight) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::packed_linear(x.into_dispatch(), weight))
}

pub(super) fn packed_experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    experts: [PackedWeight; 2],
    activation: Activation,
) -> Tensor<2> {
    let (x, indices, weights) = (x.into_dispatch(), indices.into_dispatch(), weights.into_dispatch());
    Tensor::from_dispatch(Dispatch::packed_experts(x, indices, weights, experts, activation))
}

pub(super) fn routing_weights(logits: Tensor<2>, indices: Tensor<2, Int>, dims: RouterDims) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::routing_weights(logits.into_dispatch(), indices.into_dispatch(), dims))
}

pub(super) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
}

pub(super) fn rope(x: Tensor<3>, cos: Tensor<2>, sin: Tensor<2>, spec: RopeSpec) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::rope(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch(), spec))
}

pub(super) fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, spec: AttentionSpec) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        spec,
    ))
}

pub(super) fn mla_attention(q: Tensor<3>, kv: Tensor<3>, k_pe: Tensor<2>, spec: MlaSpec) -> Tensor<3> {
    let [q, kv, k_pe] = [q.into_dispatch(), kv.into_dispatch(), k_pe.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::mla_attention(q, kv, k_pe, spec))
}

pub(super) fn latent_attention(
    q: Tensor<3>,
    latents: Tensor<2>,
    kv_b: Tensor<2>,
    spec: MlaSpec,
) -> Tensor<3> {
    let [q, latents, kv_b] = [q.into_dispatch(), latents.into_dispatch(), kv_b.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as FusedOps>::latent_attention(q, latents, kv_b, spec))
}

pub(super) fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), activation))
}

pub(super) fn add(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::add(a.into_dispatch(), b.into_dispatch()))
}

pub(super) fn moe_experts(
    x: Tensor<2>,
    indices: Tensor<2, Int>,
    weights: Tensor<2>,
    gate_up: Tensor<3>,
    down: Tensor<3>,
    activation: Activation,
    deferral: Deferral,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::moe_experts(
        x.into_dispatch(),
        indices.into_dispatch(),
        weights.into_dispatch(),
        gate_up.into_dispatch(),
        down.into_dispatch(),
        activation,
        deferral,
    ))
}

pub(super) fn grouped_linear(x: Tensor<2>, weight: Tensor<3>, offsets: Arc<[usize]>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::grouped_linear(x.into_dispatch(), weight.into_dispatch(), offsets))
}

pub(super) fn linear_cross_entropy(
    h: Tensor<2>,
    lm_head: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: TokenLossScale,
) -> TokenLoss {
    let want = (h.is_tracked(), lm_head.is_tracked());
    let all: Tensor<1> = Tensor::from_dispatch(Dispatch::linear_cross_entropy(
        h.into_dispatch(),
        lm_head.into_dispatch(),
        labels.into_dispatch(),
        scale,
        want,
    ));
    let measured = all.clone().detach();
    TokenLoss {
        total: all.slice_dim(0, 0..1),
        cross_entropy: measured.clone().slice_dim(0, 1..2),
        z_loss: measured.slice_dim(0, 2..3),
    }
}

pub(super) fn zero_with_gradient<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    let gradient = if x.device().is_autodiff() { gradient.autodiff() } else { gradient };
    Tensor::from_dispatch(Dispatch::zero_with_gradient(x.into_dispatch(), gradient.into_dispatch()))
}
