//! The Mistral 4 model family: multi-head latent attention, a mixture of experts with a shared expert,
//! YaRN rotary embedding with Llama-4 query scaling, and the Pixtral vision tower with its projector.
//!
//! The library knows nothing of text or training: token ids and pixels go in, logits (or hidden states) come out.
//! Module fields carry the names of the checkpoint's tensors, so that `model.layers.0.self_attn.q_a_proj.weight`
//! is both a key in `model.safetensors` and a path through these structs.
//!
//! Shape letters used in the documentation: T tokens, B batch, S sequence, D hidden, N heads, H head width,
//! R latent rank, E experts, K experts a token, F expert width, V vocabulary, P patches.

pub mod error;
pub mod generate;
pub mod inputs;
pub mod model;
pub mod ops;
pub mod vision;
pub mod weights;

pub use error::{Error, Result};
pub use inputs::{ForwardOptions, Images, ModelInputs};
pub use mistral4_checkpoint as checkpoint;
pub use model::{
    Mistral3ForConditionalGeneration, Mistral4, Mistral4ForCausalLM, Mistral4Model, ModelOutput,
    cache::LatentCache,
};
