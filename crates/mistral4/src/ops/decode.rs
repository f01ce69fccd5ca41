//! One token through a decoder layer in one kernel: see [`mistral4_kernels::decode_layer`].
//!
//! Its composite body is the layer itself: see [`DecoderLayer::forward`](crate::model::decoder_layer::DecoderLayer).

use std::sync::Arc;

use burn::tensor::Tensor;
use mistral4_kernels::DecodeLayer;

#[cfg(feature = "flex")]
use super::extension;
use crate::model::rope::RotaryTables;

/// The weights of a layer, shared between the copies of a model.
pub type DecodeWeights = Arc<DecodeLayer>;

/// The token behind the layer and its slot of the cache; for tensors on the CPU that ask for no gradient.
///
/// # Shapes
/// - `x`: `[1, D]`, `cached`: `[slots, R + rope]`, `kv_b`: `[N * (nope + v), R]`
/// - output: `[1, D]` and `[1, R + rope]`
#[cfg(feature = "flex")]
pub(crate) fn decode_layer(
    x: Tensor<2>,
    rotary: &RotaryTables,
    cached: Tensor<2>,
    kv_b: Tensor<2>,
    weights: &DecodeWeights,
) -> [Tensor<2>; 2] {
    let (hidden, width) = (weights.hidden(), weights.slot_width());
    let both = extension::decode_layer(x, rotary, cached, kv_b, weights.clone());
    [both.clone().slice_dim(1, 0..hidden), both.slice_dim(1, hidden..hidden + width)]
}
