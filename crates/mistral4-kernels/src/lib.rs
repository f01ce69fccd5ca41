//! CPU kernels on raw slices: matrix products, experts, attention, norms, losses, optimiser steps.
//!
//! Every operation is a free function on slices, with its sizes passed in and its outputs passed as
//! `&mut` slices that it overwrites. `<op>_backward` takes the inputs of `<op>` and the gradient of its
//! output. [`mod@reference`] holds a plain twin of each, which the tests compare against.
//!
//! Shape letters: T tokens, D hidden, N heads, H head dim, E experts, K experts per token, F expert inner
//! size, V vocabulary. All matrices are row-major and contiguous unless a stride is named.
//!
//! Results do not depend on the number of threads: work is cut into pieces by shape alone, and no float is
//! ever added from two threads.
#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(
        dead_code,
        unused_variables,
        reason = "some forms of operands are read by the kernels of x86-64 alone"
    )
)]

mod add;
mod attention;
mod decode;
mod element;
mod experts;
mod gemm;
mod isa;
mod loss;
mod norm;
mod optimizer;
mod parallel;
mod peaks;
mod phases;
mod quantized;
mod rope;
mod router;
mod scratch;
mod team;
mod vector;

pub mod reference;

pub use add::add;
pub use attention::{
    Attention, AttentionDims, AttentionGrads, AttentionSaved, LatentAttention, LatentDims, MlaAttention,
    MlaDims, MlaGrads, Segment, attention, attention_backward, latent_attention, mla_attention,
    mla_attention_backward,
};
pub use decode::{
    DecodeAttentionDims, DecodeExperts, DecodeLayer, DecodeMla, DecodeMlp, DecodeNorm, DecodeToken,
    DecodeWeight, Rotary, decode_head, decode_layer,
};
pub use element::{Element, Index};
pub use experts::{
    Activation, DeferredGradient, ExpertDims, ExpertGrads, Experts, GroupedLinearDims, PackedExperts, gated,
    gated_backward, grouped_linear, grouped_linear_backward_input, grouped_linear_backward_weight,
    moe_experts, moe_experts_backward, moe_experts_backward_deferring, moe_experts_keeping, packed_experts,
};
pub use gemm::{
    GemmDims, LinearDims, Matrix, MatrixMut, PackedMatrix, gemm, linear, linear_backward_input,
    linear_backward_weight, packed_linear,
};
pub use isa::{Isa, IsaError};
pub use loss::{IGNORE_INDEX, LinearCrossEntropy, LinearCrossEntropyGrads, LossSum, linear_cross_entropy};
pub use norm::{RmsNormSaved, rms_norm, rms_norm_backward};
pub use optimizer::{
    AdamW, AdamW8bitState, AdamWState, AdamWWeight, BLOCK_8BIT, DynamicMap, Quantized8bit, adamw_step,
    adamw_step_8bit, adamw_step_master, scale, sum_of_squares,
};
pub use peaks::{peak_bf16_gflops, peak_f32_gflops, read_bandwidth};
pub use quantized::{
    Bits, QuantizeError, QuantizedExperts, QuantizedMatrix, Scales, Scheme, StackDims, quantized_experts,
    quantized_experts_backward, quantized_grouped_linear, quantized_grouped_linear_backward_input,
    quantized_linear, quantized_linear_backward_input,
};
pub use rope::{RopeDims, rope, rope_backward};
pub use router::{RouterDims, choose_experts, routing_weights, routing_weights_backward};

pub use half::bf16;
