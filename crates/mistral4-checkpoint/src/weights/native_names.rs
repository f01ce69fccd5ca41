//! Names of Mistral's own form, `consolidated*.safetensors`, and the canonical names they stand for.
//!
//! Source: transformers' `convert_mistral4_weight_to_hf.py` and vLLM's `mistral_large_3.py`.

use super::names;

/// Modules of a decoder layer: native, canonical.
const LAYER: &[(&str, &str)] = &[
    ("attention_norm", "input_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wq_a", "self_attn.q_a_proj"),
    ("attention.q_a_norm", "self_attn.q_a_layernorm"),
    ("attention.wq_b", "self_attn.q_b_proj"),
    ("attention.wkv_a_with_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attention.kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attention.wkv_b", "self_attn.kv_b_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("gate", "mlp.gate"),
    ("shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("shared_experts.w3", "mlp.shared_experts.up_proj"),
];

/// Modules of a layer of the vision tower.
const VISION_LAYER: &[(&str, &str)] = &[
    ("attention_norm", "attention_norm"),
    ("attention.wq", "attention.q_proj"),
    ("attention.wk", "attention.k_proj"),
    ("attention.wv", "attention.v_proj"),
    ("attention.wo", "attention.o_proj"),
    ("ffn_norm", "ffn_norm"),
    ("feed_forward.w1", "feed_forward.gate_proj"),
    ("feed_forward.w2", "feed_forward.down_proj"),
    ("feed_forward.w3", "feed_forward.up_proj"),
];

/// Modules outside of layers, in a text model's canonical names.
const TEXT_ROOT: &[(&str, &str)] =
    &[("tok_embeddings", "model.embed_tokens"), ("norm", "model.norm"), ("output", "lm_head")];

/// Modules of the vision side outside of layers.
const VISION_ROOT: &[(&str, &str)] = &[
    ("vision_encoder.patch_conv", "vision_tower.patch_conv"),
    ("vision_encoder.ln_pre", "vision_tower.ln_pre"),
    ("patch_merger.merging_layer", "multi_modal_projector.patch_merger.merging_layer"),
    ("pre_mm_projector_norm", "multi_modal_projector.norm"),
    ("vision_language_adapter.w_in", "multi_modal_projector.linear_1"),
    ("vision_language_adapter.w_out", "multi_modal_projector.linear_2"),
];

const VISION_LAYERS: (&str, &str) =
    ("vision_encoder.transformer.layers.", "vision_tower.transformer.layers.");

/// What a native key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NativeName {
    /// A parameter, under its canonical key.
    Tensor(String),
    /// A part of a layer's stacked experts.
    Expert {
        /// Canonical key of the stack.
        key: String,
        /// Which expert.
        expert: usize,
        /// Which of the parts that are stacked by rows.
        part: usize,
    },
}

/// Canonical name of a native module's parameter, such as `layers.0.attention.wq_a.weight`.
pub(crate) fn to_canonical(native: &str, multimodal: bool) -> Option<NativeName> {
    let (module, parameter) = native.rsplit_once('.')?;
    let text = |key: String| if multimodal { names::in_wrapper(&key) } else { key };
    if let Some(rest) = module.strip_prefix("layers.") {
        let (layer, module) = split_layer(rest)?;
        if let Some(rest) = module.strip_prefix("experts.") {
            let (expert, weight) = split_layer(rest)?;
            if parameter != "weight" {
                return None;
            }
            let (name, part) = match weight {
                "w1" => ("gate_up_proj", 0),
                "w3" => ("gate_up_proj", 1),
                "w2" => ("down_proj", 0),
                _ => return None,
            };
            let key = text(format!("model.layers.{layer}.mlp.experts.{name}"));
            return Some(NativeName::Expert { key, expert, part });
        }
        let module = second(LAYER, module)?;
        return Some(NativeName::Tensor(text(format!("model.layers.{layer}.{module}.{parameter}"))));
    }
    if let Some(rest) = module.strip_prefix(VISION_LAYERS.0) {
        let (layer, module) = split_layer(rest)?;
        let module = second(VISION_LAYER, module)?;
        return Some(NativeName::Tensor(format!("{}{layer}.{module}.{parameter}", VISION_LAYERS.1)));
    }
    if let Some(module) = second(TEXT_ROOT, module) {
        return Some(NativeName::Tensor(text(format!("{module}.{parameter}"))));
    }
    second(VISION_ROOT, module).map(|module| NativeName::Tensor(format!("{module}.{parameter}")))
}

/// Native name of a parameter that is no expert stack, from its canonical key.
pub(crate) fn to_native(canonical: &str) -> Option<String> {
    let key = canonical.strip_prefix("language_model.").unwrap_or(canonical);
    let (module, parameter) = key.rsplit_once('.')?;
    if let Some(rest) = module.strip_prefix("model.layers.") {
        let (layer, module) = split_layer(rest)?;
        return Some(format!("layers.{layer}.{}.{parameter}", first(LAYER, module)?));
    }
    if let Some(rest) = module.strip_prefix(VISION_LAYERS.1) {
        let (layer, module) = split_layer(rest)?;
        return Some(format!("{}{layer}.{}.{parameter}", VISION_LAYERS.0, first(VISION_LAYER, module)?));
    }
    let module = first(TEXT_ROOT, module).or_else(|| first(VISION_ROOT, module))?;
    Some(format!("{module}.{parameter}"))
}

/// Native names of one expert's parts, in the order of their rows, from the canonical key of the stack.
pub(crate) fn to_native_expert(canonical: &str, expert: usize) -> Option<Vec<String>> {
    let key = canonical.strip_prefix("language_model.").unwrap_or(canonical);
    let (layer, module) = split_layer(key.strip_prefix("model.layers.")?)?;
    let weights: &[&str] = match module {
        "mlp.experts.gate_up_proj" => &["w1", "w3"],
        "mlp.experts.down_proj" => &["w2"],
        _ => return None,
    };
    Some(weights.iter().map(|weight| format!("layers.{layer}.experts.{expert}.{weight}.weight")).collect())
}

/// Whether a parameter's rows are in another order in the native form: queries and keys of the tower, whose rotary pairs
/// are neighbours there and half a head apart in the canonical form.
pub(crate) fn is_permuted(canonical: &str) -> bool {
    canonical.starts_with(VISION_LAYERS.1)
        && (canonical.ends_with(".attention.q_proj.weight")
            || canonical.ends_with(".attention.k_proj.weight"))
}

/// Where a row of the canonical form is found in the native one.
///
/// Source: transformers' `_permute_for_rope`.
pub(crate) fn native_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (within % half) + within / half
}

/// Where a row of the native form is found in the canonical one; undoes [`native_row`].
pub(crate) fn canonical_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    head * head_dim + (within % 2) * (head_dim / 2) + within / 2
}

fn split_layer(rest: &str) -> Option<(usize, &str)> {
    let (number, module) = rest.split_once('.')?;
    // Other spellings of the number, such as 01, would make two keys one.
    let layer: usize = number.parse().ok()?;
    (layer.to_string() == number).then_some((layer, module))
}

fn second(table: &[(&str, &'static str)], native: &str) -> Option<&'static str> {
    table.iter().find(|(known, _)| *known == native).map(|(_, canonical)| *canonical)
}

fn first(table: &[(&'static str, &str)], canonical: &str) -> Option<&'static str> {
    table.iter().find(|(_, known)| *known == canonical).map(|(native, _)| *native)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigFile, ConfigOptions};
    use crate::weights::names::{TensorKind, tensors};

    #[test]
    fn every_parameter_has_a_native_name_that_leads_back() {
        let config = ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap().config;
        for (config, multimodal) in [(config.text_only(), false), (config, true)] {
            for spec in tensors(&config) {
                let key = spec.key;
                if matches!(spec.kind, TensorKind::ExpertsGateUp | TensorKind::ExpertsDown) {
                    for (part, native) in to_native_expert(&key, 3).unwrap().iter().enumerate() {
                        let expected = NativeName::Expert { key: key.clone(), expert: 3, part };
                        assert_eq!(to_canonical(native, multimodal), Some(expected));
                    }
                } else {
                    let native = to_native(&key).unwrap();
                    assert_eq!(to_canonical(&native, multimodal), Some(NativeName::Tensor(key)));
                }
            }
        }
    }

    #[test]
    fn rows_go_there_and_back() {
        for row in 0..48 {
            assert_eq!(canonical_row(native_row(row, 16), 16), row);
        }
        // The first head's rows are x0 x2 x4 ... then x1 x3 x5 ... of the native order.
        assert_eq!((0..4).map(|row| native_row(row, 4)).collect::<Vec<_>>(), [0, 2, 1, 3]);
    }

    #[test]
    fn other_keys_are_unknown() {
        for key in ["layers.00.attention.wq_a.weight", "layers.0.attention.wz.weight", "weight", "a.b"] {
            assert_eq!(to_canonical(key, false), None, "{key}");
        }
    }
}
