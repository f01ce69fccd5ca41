//! Backward rules of the fused operations: one node each, which calls the backward kernel.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend};
use mistral4_checkpoint::config::Activation;
use mistral4_kernels::RouterDims;

use super::extension::FusedOps;
use super::packed::PackedWeight;
use super::saved::{AttentionSaved, MlaSaved, MoeInputs, MoeSaved, RmsNormSaved};
use super::{AttentionSpec, Deferral, MlaSpec, RopeSpec, TokenLossScale};

/// Loss and the gradients that were asked for, computed in one pass.
pub(super) type LossAndGradients<B> = (FloatTensor<B>, Option<FloatTensor<B>>, Option<FloatTensor<B>>);

/// The backward kernels, and the forward ones that keep something for them.
pub(super) trait BackwardKernels: FusedOps {
    /// `gradient` times the first entry of `factor`, which is f32 and contiguous.
    fn scaled(gradient: FloatTensor<Self>, factor: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `dy W`.
    fn linear_backward_input(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `dy^T x`.
    fn linear_backward_weight(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `dy W` in the dtype of `x`, from an f32 `dy`.
    fn linear_f32_backward_input(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        x: &FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    /// `dy^T x` in the dtype of `weight`, from an f32 `dy`.
    fn linear_f32_backward_weight(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: &FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    /// Gradient of the logits.
    fn routing_weights_backward(
        logits: FloatTensor<Self>,
        indices: IntTensor<Self>,
        dweights: FloatTensor<Self>,
        dims: RouterDims,
    ) -> FloatTensor<Self>;
    /// Output and reciprocal standard deviation of each row.
    fn rms_norm_with_rstd(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Gradients of `x` and, if wanted, of `weight`.
    fn rms_norm_backward(
        saved: RmsNormSaved<Self>,
        dy: FloatTensor<Self>,
        want_weight: bool,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>);
    /// Gradient of `x`.
    fn rope_backward(
        dy: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RopeSpec,
    ) -> FloatTensor<Self>;
    /// Output and log-sum-exp of each query row and head.
    fn attention_with_lse(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Gradients of `(q, k, v)`.
    fn attention_backward(saved: AttentionSaved<Self>, dout: FloatTensor<Self>) -> [FloatTensor<Self>; 3];
    /// Output and log-sum-exp of each query row and head.
    fn mla_attention_with_lse(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        spec: &MlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Gradients of `(q, kv, k_pe)`.
    fn mla_attention_backward(saved: MlaSaved<Self>, dout: FloatTensor<Self>) -> [FloatTensor<Self>; 3];
    /// Gradients of gate and up, from `[gate, up, dout]`.
    fn gated_backward(saved: [FloatTensor<Self>; 3], activation: Activation) -> [FloatTensor<Self>; 2];
    /// Output, and what its backward pass needs beside the inputs.
    fn moe_experts_keeping(inputs: MoeInputs<Self>) -> (FloatTensor<Self>, MoeSaved<Self>);
    /// Gradients of `(x, weights, gate_up, down)`, each only if wanted.
    fn moe_experts_backward(
        saved: MoeSaved<Self>,
        dout: FloatTensor<Self>,
        want: [bool; 4],
    ) -> [Option<FloatTensor<Self>>; 4];
    /// Gradients of `(x, weights)`, each only if wanted; those of gate and up and of down go to the deferral.
    fn moe_experts_backward_deferring(
        saved: MoeSaved<Self>,
        dout: FloatTensor<Self>,
        want: [bool; 2],
    ) -> [Option<FloatTensor<Self>>; 2];
    /// `dy[rows of e] W[e]`.
    fn grouped_linear_backward_input(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: &[usize],
    ) -> FloatTensor<Self>;
    /// `dy[rows of e]^T x[rows of e]`.
    fn grouped_linear_backward_weight(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        offsets: &[usize],
    ) -> FloatTensor<Self>;
    /// Total loss, cross entropy and z-loss, `[3]`, and gradients of the total by `h` and `lm_head`.
    fn linear_cross_entropy_with_gradients(
        h: FloatTensor<Self>,
        lm_head: FloatTensor<Self>,
        labels: IntTensor<Self>,
        scale: TokenLossScale,
        want: (bool, bool),
    ) -> LossAndGradients<Self>;
}

#[derive(Debug)]
struct Linear;

impl<B: BackwardKernels> Backward<B, 2> for Linear {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, weight) = ops.state;
        let [to_x, to_weight] = ops.parents;
        if let Some(node) = to_x {
            grads.register::<B>(node.id, B::linear_backward_input(dy.clone(), weight));
        }
        if let Some(node) = to_weight {
            grads.register::<B>(node.id, B::linear_backward_weight(dy, x));
        }
    }
}

#[derive(Debug)]
struct LinearF32;

impl<B: BackwardKernels> Backward<B, 2> for LinearF32 {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, weight) = ops.state;
        let [to_x, to_weight] = ops.parents;
        if let Some(node) = to_x {
            grads.register::<B>(node.id, B::linear_f32_backward_input(dy.clone(), weight.clone(), &x));
        }
        if let Some(node) = to_weight {
            grads.register::<B>(node.id, B::linear_f32_backward_weight(dy, x, &weight));
        }
    }
}

#[derive(Debug)]
struct RoutingWeights;

impl<B: BackwardKernels> Backward<B, 1> for RoutingWeights {
    type State = (FloatTensor<B>, IntTensor<B>, RouterDims);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dweights = grads.consume::<B>(&ops.node);
        let (logits, indices, dims) = ops.state;
        let dlogits = B::routing_weights_backward(logits, indices, dweights, dims);
        register::<B, 1>(ops.parents.map(|p| p.map(|p| p.id)), [Some(dlogits)], grads);
    }
}

#[derive(Debug)]
struct RmsNorm;

impl<B: BackwardKernels> Backward<B, 2> for RmsNorm {
    type State = RmsNormSaved<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (dx, dweight) = B::rms_norm_backward(ops.state, dy, ops.parents[1].is_some());
        register::<B, 2>(ops.parents.map(|p| p.map(|p| p.id)), [Some(dx), dweight], grads);
    }
}

#[derive(Debug)]
struct Rope;

impl<B: BackwardKernels> Backward<B, 1> for Rope {
    type State = (FloatTensor<B>, FloatTensor<B>, RopeSpec);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (cos, sin, spec) = ops.state;
        let dx = B::rope_backward(dy, cos, sin, spec);
        register::<B, 1>(ops.parents.map(|p| p.map(|p| p.id)), [Some(dx)], grads);
    }
}

#[derive(Debug)]
struct Attention;

impl<B: BackwardKernels> Backward<B, 3> for Attention {
    type State = AttentionSaved<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let gradients = B::attention_backward(ops.state, dout).map(Some);
        register::<B, 3>(ops.parents.map(|p| p.map(|p| p.id)), gradients, grads);
    }
}

#[derive(Debug)]
struct MlaAttention;

impl<B: BackwardKernels> Backward<B, 3> for MlaAttention {
    type State = MlaSaved<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let gradients = B::mla_attention_backward(ops.state, dout).map(Some);
        register::<B, 3>(ops.parents.map(|p| p.map(|p| p.id)), gradients, grads);
    }
}

#[derive(Debug)]
struct Gated;

impl<B: BackwardKernels> Backward<B, 2> for Gated {
    type State = (FloatTensor<B>, FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let (gate, up, activation) = ops.state;
        let gradients = B::gated_backward([gate, up, dout], activation).map(Some);
        register::<B, 2>(ops.parents.map(|p| p.map(|p| p.id)), gradients, grads);
    }
}

#[derive(Debug)]
struct Add;

impl<B: BackwardKernels> Backward<B, 2> for Add {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let gradients = [Some(dout.clone()), Some(dout)];
        register::<B, 2>(ops.parents.map(|p| p.map(|p| p.id)), gradients, grads);
    }
}

#[derive(Debug)]
struct MoeExperts;

impl<B: BackwardKernels> Backward<B, 4> for MoeExperts {
    type State = MoeSaved<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let parents = ops.parents.map(|p| p.map(|p| p.id));
        let want: [bool; 4] = parents.map(|parent| parent.is_some());
        let [x, weights, gate_up, down] = want;
        if gate_up && down && ops.state.inputs.defers() {
            let gradients = B::moe_experts_backward_deferring(ops.state, dout, [x, weights]);
            return register::<B, 2>([parents[0], parents[1]], gradients, grads);
        }
        register::<B, 4>(parents, B::moe_experts_backward(ops.state, dout, want), grads);
    }
}

#[derive(Debug)]
struct GroupedLinear;

impl<B: BackwardKernels> Backward<B, 2> for GroupedLinear {
    type State = (FloatTensor<B>, FloatTensor<B>, Arc<[usize]>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, weight, offsets) = ops.state;
        let [to_x, to_weight] = ops.parents;
        if let Some(node) = to_x {
            grads.register::<B>(node.id, B::grouped_linear_backward_input(dy.clone(), weight, &offsets));
        }
        if let Some(node) = to_weight {
            grads.register::<B>(node.id, B::grouped_linear_backward_weight(dy, x, &offsets));
        }
    }
}

#[derive(Debug)]
struct LinearCrossEntropy;

impl<B: BackwardKernels> Backward<B, 2> for LinearCrossEntropy {
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        // The gradients of the total, the first entry, were computed with it and wait for the factor from above. The
        // other entries are measurements.
        let factor = grads.consume::<B>(&ops.node);
        let scaled = ops.state.map(|gradient| Some(B::scaled(gradient?, factor.clone())));
        register::<B, 2>(ops.parents.map(|p| p.map(|p| p.id)), scaled, grads);
    }
}

#[derive(Debug)]
struct ZeroWithGradient;

impl<B: BackwardKernels> Backward<B, 1> for ZeroWithGradient {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let factor = grads.consume::<B>(&ops.node);
        let gradient = B::scaled(ops.state, factor);
        register::<B, 1>(ops.parents.map(|p| p.map(|p| p.id)), [Some(gradient)], grads);
    }
}

/// Hands gradients to the parents that want them.
fn register<B: Backend, const N: usize>(
    parents: [Option<burn::backend::autodiff::NodeId>; N],
    gradients: [Option<FloatTensor<B>>; N],
    grads: &mut Gradients,
) {
    for (parent, gradient) in parents.into_iter().zip(gradients) {
        if let Some(id) = parent {
            grads.register::<B>(id, gradient.expect("a tracked input has its gradient computed"));
        }
    }
}

impl<B: BackwardKernels, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let op = Linear.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let out = <B as FusedOps>::linear(x.clone(), weight.clone());
        match op {
            OpsKind::Tracked(op) => op.finish((x, weight), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn linear_f32(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let op = LinearF32.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let out = B::linear_f32(x.clone(), weight.clone());
        match op {
            OpsKind::Tracked(op) => op.finish((x, weight), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn packed_linear(x: FloatTensor<Self>, weight: PackedWeight) -> FloatTensor<Self> {
        // The caller has made sure that nothing here is tracked.
        Self::from_inner(B::packed_linear(x.into_primitive(), weight))
    }

    fn packed_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        experts: [PackedWeight; 2],
        activation: Activation,
    ) -> FloatTensor<Self> {
        // As above.
        let (x, weights) = (x.into_primitive(), weights.into_primitive());
        Self::from_inner(B::packed_experts(x, indices, weights, experts, activation))
    }

    fn routing_weights(
        logits: FloatTensor<Self>,
        indices: IntTensor<Self>,
        dims: RouterDims,
    ) -> FloatTensor<Self> {
        let op = RoutingWeights.prepare::<C>([logits.node()]).compute_bound().stateful();
        let logits = logits.into_primitive();
        let out = B::routing_weights(logits.clone(), indices.clone(), dims);
        match op {
            OpsKind::Tracked(op) => op.finish((logits, indices, dims), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let op = RmsNorm.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match op {
            OpsKind::Tracked(op) => {
                let (out, rstd) = B::rms_norm_with_rstd(x.clone(), weight.clone(), eps);
                op.finish(RmsNormSaved { x, weight, rstd }, out)
            }
            OpsKind::UnTracked(op) => op.finish(B::rms_norm(x, weight, eps)),
        }
    }

    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RopeSpec,
    ) -> FloatTensor<Self> {
        let op = Rope.prepare::<C>([x.node()]).compute_bound().stateful();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let out = B::rope(x.into_primitive(), cos.clone(), sin.clone(), spec.clone());
        match op {
            OpsKind::Tracked(op) => op.finish((cos, sin, spec), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        let op = Attention.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful();
        let [q, k, v] = [q, k, v].map(|t| t.into_primitive());
        match op {
            OpsKind::Tracked(op) => {
                let (out, lse) = B::attention_with_lse(q.clone(), k.clone(), v.clone(), &spec);
                op.finish(AttentionSaved { q, k, v, out: out.clone(), lse, spec }, out)
            }
            OpsKind::UnTracked(op) => op.finish(<B as FusedOps>::attention(q, k, v, spec)),
        }
    }

    fn mla_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        spec: MlaSpec,
    ) -> FloatTensor<Self> {
        let op = MlaAttention.prepare::<C>([q.node(), kv.node(), k_pe.node()]).compute_bound().stateful();
        let [q, kv, k_pe] = [q, kv, k_pe].map(|t| t.into_primitive());
        match op {
            OpsKind::Tracked(op) => {
                let (out, lse) = B::mla_attention_with_lse(q.clone(), kv.clone(), k_pe.clone(), &spec);
                op.finish(MlaSaved { q, kv, k_pe, out: out.clone(), lse, spec }, out)
            }
            OpsKind::UnTracked(op) => op.finish(<B as FusedOps>::mla_attention(q, kv, k_pe, spec)),
        }
    }

    fn latent_attention(
        q: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        spec: MlaSpec,
    ) -> FloatTensor<Self> {
        // The caller has made sure that nothing here is tracked.
        let [q, latents, kv_b] = [q, latents, kv_b].map(|t| t.into_primitive());
        Self::from_inner(B::latent_attention(q, latents, kv_b, spec))
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let op = Gated.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful();
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let out = B::gated(gate.clone(), up.clone(), activation);
        match op {
            OpsKind::Tracked(op) => op.finish((gate, up, activation), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn add(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let op = Add.prepare::<C>([a.node(), b.node()]).compute_bound().stateful();
        let out = <B as FusedOps>::add(a.into_primitive(), b.into_primitive());
        match op {
            OpsKind::Tracked(op) => op.finish((), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn moe_experts(
        x: FloatTensor<Self>,
        indices: IntTensor<Self>,
        weights: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        activation: Activation,
        deferral: Deferral,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), weights.node(), gate_up.node(), down.node()];
        let op = MoeExperts.prepare::<C>(nodes).compute_bound().stateful();
        let [x, weights, gate_up, down] = [x, weights, gate_up, down].map(|t| t.into_primitive());
        match op {
            OpsKind::Tracked(op) => {
                let inputs = MoeInputs { x, indices, weights, gate_up, down, activation, deferral };
                let (out, saved) = B::moe_experts_keeping(inputs);
                op.finish(saved, out)
            }
            OpsKind::UnTracked(op) => {
                op.finish(B::moe_experts(x, indices, weights, gate_up, down, activation, deferral))
            }
        }
    }

    fn grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: Arc<[usize]>,
    ) -> FloatTensor<Self> {
        let op = GroupedLinear.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let out = B::grouped_linear(x.clone(), weight.clone(), offsets.clone());
        match op {
            OpsKind::Tracked(op) => op.finish((x, weight, offsets), out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }

    fn linear_cross_entropy(
        h: FloatTensor<Self>,
        lm_head: FloatTensor<Self>,
        labels: IntTensor<Self>,
        scale: TokenLossScale,
        want: (bool, bool),
    ) -> FloatTensor<Self> {
        let op = LinearCrossEntropy.prepare::<C>([h.node(), lm_head.node()]).compute_bound().stateful();
        let (h, lm_head) = (h.into_primitive(), lm_head.into_primitive());
        match op {
            OpsKind::Tracked(op) => {
                let (loss, dh, dw) = B::linear_cross_entropy_with_gradients(h, lm_head, labels, scale, want);
                op.finish([dh, dw], loss)
            }
            OpsKind::UnTracked(op) => op.finish(B::linear_cross_entropy(h, lm_head, labels, scale, want)),
        }
    }

    fn zero_with_gradient(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        let op = ZeroWithGradient.prepare::<C>([x.node()]).compute_bound().stateful();
        let (x, gradient) = (x.into_primitive(), gradient.into_primitive());
        let out = B::zero_with_gradient(x, gradient.clone());
        match op {
            OpsKind::Tracked(op) => op.finish(gradient, out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }
}
