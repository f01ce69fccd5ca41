//! The Pixtral vision tower and the projector into the decoder's width.

mod projector;
mod rope;
mod tower;

pub use projector::{MultiModalProjector, PatchMerger};
pub use tower::{PixtralAttention, PixtralAttentionLayer, PixtralTransformer, PixtralVisionModel};

/// Patches of one image: rows and columns.
pub type Grid = (usize, usize);
