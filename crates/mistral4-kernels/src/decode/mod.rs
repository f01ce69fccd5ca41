//! One token through one decoder layer, the step that decoding repeats, and through the output projection.
//!
//! At one row every product reads its weights once, so that a layer should take as long as memory takes to hand them
//! over. Its steps are short, though: the threads stay together from the layer's input to its output and meet between
//! phases (see [`crate::phases`]), each preparing what it needs for a phase itself.
//!
//! Roundings are those of the separate kernels, except that inner activations of the shared experts stay `f32`.
#[cfg(target_arch = "x86_64")]
mod avx512;
mod feed_forward;
mod heads;
mod mla;
mod weight;

pub use feed_forward::{DecodeExperts, DecodeMlp};
pub use heads::{DecodeAttentionDims, Rotary};
pub use mla::DecodeMla;
pub use weight::DecodeWeight;

use crate::experts::Activation;
use crate::isa::Isa;
use crate::parallel::Shared;
use crate::phases::{self, Phase, Tasks};
use crate::quantized::StackDims;
use crate::scratch::{self, Scratch};
use half::bf16;
use weight::{Product, Rows, store_rounded, with_prepared};

/// A norm's weight and epsilon.
#[derive(Clone, Debug)]
pub struct DecodeNorm {
    /// `[D]`
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

impl DecodeNorm {
    fn apply(&self, isa: Isa, x: &[bf16]) -> Scratch<bf16> {
        let mut y = scratch::take(x.len());
        crate::norm::forward_rows(isa, x, &self.weight, self.eps, &mut y, &mut [0.0]);
        y
    }
}

/// The weights of a decoder layer.
#[derive(Clone, Debug)]
pub struct DecodeLayer {
    /// Before the attention.
    pub input_layernorm: DecodeNorm,
    /// The attention.
    pub self_attn: DecodeMla,
    /// Before the feed-forward.
    pub post_attention_layernorm: DecodeNorm,
    /// The routed experts, in layers that have them.
    pub experts: Option<DecodeExperts>,
    /// The shared experts, or the dense feed-forward.
    pub mlp: DecodeMlp,
    /// Function applied to gates.
    pub activation: Activation,
}

/// What a token brings to a layer.
#[derive(Clone, Copy, Debug)]
pub struct DecodeToken<'a> {
    /// `[D]`
    pub x: &'a [bf16],
    /// Its position.
    pub rotary: Rotary<'a>,
    /// Latents and rotated key parts of earlier tokens, `[slots, R + rope]`.
    pub cached: &'a [bf16],
    /// `kv_b_proj`, each head's keys before its values, `[N * (nope + value_dim), R]`.
    pub kv_b: &'a [bf16],
}

impl DecodeLayer {
    /// D.
    pub fn hidden(&self) -> usize {
        self.input_layernorm.weight.len()
    }

    /// Entries of a cached slot: R + rope.
    pub fn slot_width(&self) -> usize {
        self.self_attn.dims.width()
    }
}

/// One token through a layer: `out` is the residual stream behind it, `own` the token's slot of the cache.
///
/// # Shapes
/// See [`DecodeToken`]; `out`: `[D]`, `own`: `[R + rope]`.
///
/// # Panics
/// When a slice has the wrong length or weights do not fit each other.
pub fn decode_layer(layer: &DecodeLayer, token: &DecodeToken<'_>, out: &mut [bf16], own: &mut [bf16]) {
    let isa = Isa::active();
    let hidden = layer.hidden();
    assert_eq!(token.x.len(), hidden, "x is [D]");
    assert_eq!([out.len(), own.len()], [hidden, layer.slot_width()], "out is [D], own [R + rope]");
    assert_eq!(layer.post_attention_layernorm.weight.len(), hidden, "norms are [D]");
    let mut x = scratch::take::<bf16>(hidden);
    layer.self_attn.forward(isa, &layer.input_layernorm, token, own, &mut x);
    feed_forward::forward(isa, layer, &x, out);
}

/// The logits of a token behind the last layer: the final norm, then the output projection. They are rounded to `bf16`,
/// as a product's results are, and given as `f32`.
///
/// # Shapes
/// - `norm`, `x`: `[D]`, `lm_head`: `[V, D]`, `logits`: `[V]`
///
/// # Panics
/// When a slice has the wrong length.
pub fn decode_head(norm: &DecodeNorm, lm_head: &DecodeWeight, x: &[bf16], logits: &mut [f32]) {
    let isa = Isa::active();
    assert_eq!(norm.weight.len(), x.len(), "the norm is [D]");
    let dims = StackDims { matrices: 1, rows: logits.len(), columns: x.len() };
    assert_eq!(lm_head.dims(), dims, "lm_head is [V, D]");
    let product = Product::new(lm_head);
    let logits = Shared::new(logits);
    let project = |tasks: &mut Tasks<'_>| {
        let prepare = || Rows::one(isa, lm_head, &norm.apply(isa, x));
        with_prepared(tasks, prepare, |rows, task| {
            product.run_with(isa, task, rows, |columns, sums| {
                // SAFETY: each task owns its outputs.
                store_rounded(isa, sums, unsafe { logits.slice(columns) });
            });
        });
    };
    phases::run([Phase { tasks: product.tasks(), work: &project }]);
}
