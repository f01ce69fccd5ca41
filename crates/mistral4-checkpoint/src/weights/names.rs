//! The two-way table of tensor names.
//!
//! Canonical names are those that transformers 5.24 writes: `language_model.model.*`, `language_model.lm_head.weight`,
//! `vision_tower.*` and `multi_modal_projector.*` for a multimodal model, `model.*` and `lm_head.weight` for a text model.

use std::borrow::Cow;

use crate::config::{Config, MultimodalConfig, TextConfig};

/// One parameter of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Canonical key.
    pub key: String,
    /// Stored shape.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: TensorKind,
}

/// What a parameter is, which decides how it starts and whether it may be quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorKind {
    /// The embedding table, `[V, D]`.
    Embedding,
    /// The output projection, `[V, D]`.
    LmHead,
    /// A linear weight, `[out, in]`, of the decoder.
    Linear,
    /// Gate and up projections of all experts, `[E, 2F, D]`, gate rows first.
    ExpertsGateUp,
    /// Down projections of all experts, `[E, D, F]`.
    ExpertsDown,
    /// The router's weight, `[E, D]`.
    Gate,
    /// The router's selection bias, `[E]`, kept in f32; a checkpoint may lack it.
    GateBias,
    /// An RMSNorm weight.
    Norm,
    /// The bias of a linear.
    Bias,
    /// A linear weight of the vision tower or the projector.
    VisionLinear,
    /// The patch convolution of the tower, `[hidden, channels, patch, patch]`.
    PatchConv,
}

impl TensorSpec {
    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether FP8 checkpoints store it quantised.
    pub fn is_quantisable(&self) -> bool {
        matches!(self.kind, TensorKind::Linear | TensorKind::ExpertsGateUp | TensorKind::ExpertsDown)
    }

    /// Whether a checkpoint may lack it, in which case it is zero.
    pub fn is_optional(&self) -> bool {
        self.kind == TensorKind::GateBias
    }

    /// Whether it belongs to the vision tower or the projector.
    pub fn is_vision(&self) -> bool {
        self.key.starts_with(VISION_TOWER) || self.key.starts_with(PROJECTOR)
    }
}

const TEXT_PREFIX: &str = "language_model.";
const VISION_TOWER: &str = "vision_tower.";
const PROJECTOR: &str = "multi_modal_projector.";

/// Suffix of the router's selection bias.
pub const GATE_BIAS: &str = "mlp.gate.e_score_correction_bias";

/// Every parameter of a model, in the order it is applied.
pub fn tensors(config: &Config) -> Vec<TensorSpec> {
    let mut list = List(Vec::new());
    if let Some(vision) = &config.vision {
        list.vision(vision, config.text.hidden_size);
    }
    let prefix = if config.vision.is_some() { TEXT_PREFIX } else { "" };
    list.text(prefix, &config.text);
    list.0
}

/// Canonical form of a stored key: also accepts the `model.language_model.*` names of transformers 5's modules.
///
/// `multimodal` says which kind of checkpoint the key is from, since a plain `lm_head.weight` and `model.norm.weight`
/// are names of both.
pub fn canonical(stored: &str, multimodal: bool) -> Cow<'_, str> {
    if !multimodal {
        return Cow::Borrowed(stored);
    }
    if let Some(rest) = stored.strip_prefix("model.language_model.") {
        // NeMo's modules nest the text model once more, and keep the head inside.
        let rest = rest.strip_prefix("model.").unwrap_or(rest);
        let model = if rest.starts_with("lm_head.") { "" } else { "model." };
        return Cow::Owned(format!("{TEXT_PREFIX}{model}{rest}"));
    }
    if stored.starts_with("lm_head.") {
        return Cow::Owned(format!("{TEXT_PREFIX}{stored}"));
    }
    match stored.strip_prefix("model.") {
        Some(rest) if rest.starts_with(VISION_TOWER) || rest.starts_with(PROJECTOR) => Cow::Borrowed(rest),
        _ => Cow::Borrowed(stored),
    }
}

/// The canonical key of a text model's tensor, in a multimodal model.
pub(crate) fn in_wrapper(text_key: &str) -> String {
    format!("{TEXT_PREFIX}{text_key}")
}

/// Whether any of these keys belongs to a multimodal checkpoint.
pub(crate) fn are_multimodal<'a>(mut keys: impl Iterator<Item = &'a str>) -> bool {
    keys.any(|key| {
        key.starts_with(TEXT_PREFIX)
            || key.starts_with("model.language_model.")
            || key.strip_prefix("model.").unwrap_or(key).starts_with(VISION_TOWER)
    })
}

struct List(Vec<TensorSpec>);

impl List {
    fn push(&mut self, key: String, shape: &[usize], kind: TensorKind) {
        self.0.push(TensorSpec { key, shape: shape.to_vec(), kind });
    }

    fn text(&mut self, prefix: &str, text: &TextConfig) {
        let hidden = text.hidden_size;
        self.push(
            format!("{prefix}model.embed_tokens.weight"),
            &[text.vocab_size, hidden],
            TensorKind::Embedding,
        );
        for layer in 0..text.num_hidden_layers {
            let prefix = format!("{prefix}model.layers.{layer}.");
            self.push(format!("{prefix}input_layernorm.weight"), &[hidden], TensorKind::Norm);
            self.attention(&prefix, text);
            self.push(format!("{prefix}post_attention_layernorm.weight"), &[hidden], TensorKind::Norm);
            if text.is_moe_layer(layer) {
                self.moe(&prefix, text);
            } else {
                self.mlp(&format!("{prefix}mlp."), hidden, text.intermediate_size, TensorKind::Linear);
            }
        }
        self.push(format!("{prefix}model.norm.weight"), &[hidden], TensorKind::Norm);
        self.push(format!("{prefix}lm_head.weight"), &[text.vocab_size, hidden], TensorKind::LmHead);
    }

    fn attention(&mut self, prefix: &str, text: &TextConfig) {
        let (hidden, heads) = (text.hidden_size, text.num_attention_heads);
        let queries = heads * text.qk_head_dim();
        let mut linear = |name: &str, outputs: usize, inputs: usize, bias: bool| {
            self.push(format!("{prefix}self_attn.{name}.weight"), &[outputs, inputs], TensorKind::Linear);
            if bias {
                self.push(format!("{prefix}self_attn.{name}.bias"), &[outputs], TensorKind::Bias);
            }
        };
        match text.q_lora_rank {
            None => linear("q_proj", queries, hidden, false),
            Some(rank) => {
                linear("q_a_proj", rank, hidden, text.attention_bias);
                linear("q_b_proj", queries, rank, false);
            }
        }
        linear("kv_a_proj_with_mqa", text.kv_lora_rank + text.qk_rope_head_dim, hidden, text.attention_bias);
        linear("kv_b_proj", heads * (text.qk_nope_head_dim + text.v_head_dim), text.kv_lora_rank, false);
        linear("o_proj", hidden, heads * text.v_head_dim, text.attention_bias);
        if let Some(rank) = text.q_lora_rank {
            self.push(format!("{prefix}self_attn.q_a_layernorm.weight"), &[rank], TensorKind::Norm);
        }
        self.push(format!("{prefix}self_attn.kv_a_layernorm.weight"), &[text.kv_lora_rank], TensorKind::Norm);
    }

    fn moe(&mut self, prefix: &str, text: &TextConfig) {
        let (hidden, experts, width) = (text.hidden_size, text.n_routed_experts, text.moe_intermediate_size);
        self.push(format!("{prefix}mlp.gate.weight"), &[experts, hidden], TensorKind::Gate);
        self.push(format!("{prefix}{GATE_BIAS}"), &[experts], TensorKind::GateBias);
        self.push(
            format!("{prefix}mlp.experts.gate_up_proj"),
            &[experts, 2 * width, hidden],
            TensorKind::ExpertsGateUp,
        );
        self.push(
            format!("{prefix}mlp.experts.down_proj"),
            &[experts, hidden, width],
            TensorKind::ExpertsDown,
        );
        let shared = width * text.n_shared_experts;
        self.mlp(&format!("{prefix}mlp.shared_experts."), hidden, shared, TensorKind::Linear);
    }

    fn mlp(&mut self, prefix: &str, hidden: usize, width: usize, kind: TensorKind) {
        self.push(format!("{prefix}gate_proj.weight"), &[width, hidden], kind);
        self.push(format!("{prefix}up_proj.weight"), &[width, hidden], kind);
        self.push(format!("{prefix}down_proj.weight"), &[hidden, width], kind);
    }

    fn vision(&mut self, vision: &MultimodalConfig, text_hidden: usize) {
        let tower = &vision.vision_config;
        let hidden = tower.hidden_size;
        let kind = TensorKind::VisionLinear;
        self.push(
            format!("{VISION_TOWER}patch_conv.weight"),
            &[hidden, tower.num_channels, tower.patch_size, tower.patch_size],
            TensorKind::PatchConv,
        );
        self.push(format!("{VISION_TOWER}ln_pre.weight"), &[hidden], TensorKind::Norm);
        for layer in 0..tower.num_hidden_layers {
            let prefix = format!("{VISION_TOWER}transformer.layers.{layer}.");
            self.push(format!("{prefix}attention_norm.weight"), &[hidden], TensorKind::Norm);
            for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                self.push(format!("{prefix}attention.{name}.weight"), &[hidden, hidden], kind);
            }
            self.push(format!("{prefix}ffn_norm.weight"), &[hidden], TensorKind::Norm);
            self.mlp(&format!("{prefix}feed_forward."), hidden, tower.intermediate_size, kind);
        }
        self.push(format!("{PROJECTOR}norm.weight"), &[hidden], TensorKind::Norm);
        let merged = hidden * vision.spatial_merge_size * vision.spatial_merge_size;
        self.push(format!("{PROJECTOR}patch_merger.merging_layer.weight"), &[hidden, merged], kind);
        for (name, inputs) in [("linear_1", hidden), ("linear_2", text_hidden)] {
            self.push(format!("{PROJECTOR}{name}.weight"), &[text_hidden, inputs], kind);
            if vision.multimodal_projector_bias {
                self.push(format!("{PROJECTOR}{name}.bias"), &[text_hidden], TensorKind::Bias);
            }
        }
    }
}
