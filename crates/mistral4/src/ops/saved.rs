//! What fused operations keep for their backward passes.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use mistral4_checkpoint::config::Activation;

use super::{AttentionSpec, Deferral, MlaSpec};

/// Inputs of [`super::extension::FusedOps::moe_experts`].
#[derive(Debug, Clone)]
pub(super) struct MoeInputs<B: Backend> {
    pub(super) x: FloatTensor<B>,
    pub(super) indices: IntTensor<B>,
    pub(super) weights: FloatTensor<B>,
    pub(super) gate_up: FloatTensor<B>,
    pub(super) down: FloatTensor<B>,
    pub(super) activation: Activation,
    pub(super) deferral: Deferral,
}

impl<B: Backend> MoeInputs<B> {
    /// Whether the gradients of the weights shall leave the backward pass as products.
    pub(super) fn defers(&self) -> bool {
        let [_, both, hidden] = self.gate_up.shape().dims();
        let slots = self.indices.shape().num_elements();
        // Rows of both weights' factors: gradients of gate and up with the token, of the output with what is inside.
        let factors = slots * (both + hidden + hidden + both / 2);
        let elements = self.gate_up.shape().num_elements() + self.down.shape().num_elements();
        self.deferral.wants(factors, elements)
    }
}

/// Inputs of [`super::extension::FusedOps::moe_experts`], and the gates and ups on the way, kept for its backward pass.
#[derive(Debug, Clone)]
pub(super) struct MoeSaved<B: Backend> {
    pub(super) inputs: MoeInputs<B>,
    /// `[T * K, 2F]`, token slots sorted by expert.
    pub(super) kept: FloatTensor<B>,
}

/// Inputs and results of [`super::extension::FusedOps::rms_norm`], kept for its backward pass.
#[derive(Debug, Clone)]
pub(super) struct RmsNormSaved<B: Backend> {
    pub(super) x: FloatTensor<B>,
    pub(super) weight: FloatTensor<B>,
    pub(super) rstd: FloatTensor<B>,
}

/// Inputs and results of attention, kept for its backward pass.
#[derive(Debug, Clone)]
pub(super) struct AttentionSaved<B: Backend> {
    pub(super) q: FloatTensor<B>,
    pub(super) k: FloatTensor<B>,
    pub(super) v: FloatTensor<B>,
    pub(super) out: FloatTensor<B>,
    pub(super) lse: FloatTensor<B>,
    pub(super) spec: AttentionSpec,
}

/// Inputs and results of [`super::extension::FusedOps::mla_attention`], kept for its backward pass.
#[derive(Debug, Clone)]
pub(super) struct MlaSaved<B: Backend> {
    pub(super) q: FloatTensor<B>,
    pub(super) kv: FloatTensor<B>,
    pub(super) k_pe: FloatTensor<B>,
    pub(super) out: FloatTensor<B>,
    pub(super) lse: FloatTensor<B>,
    pub(super) spec: MlaSpec,
}
