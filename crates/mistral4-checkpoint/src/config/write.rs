//! Writing a configuration in the form of Hugging Face's `config.json`.

use serde_json::{Map, Value, json};

use super::rope::derived_attention_factor;
use super::{Config, ConfigFile, ConfigForm, MultimodalConfig, SoftmaxScalePolicy, TextConfig};

/// Other spellings of keys that are written; left in, they could contradict them.
const REPLACED: &[&str] = &[
    "image_token_id",
    "num_local_experts",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
];

impl Config {
    /// The `config.json` that transformers 5.24 reads as this model.
    pub fn to_hf_json(&self) -> Value {
        let apply_yarn_scaling = match self.softmax_scale.policy {
            SoftmaxScalePolicy::YarnMscale => Some(true),
            SoftmaxScalePolicy::Standard => None,
        };
        self.write(apply_yarn_scaling)
    }

    fn write(&self, apply_yarn_scaling: Option<bool>) -> Value {
        let mut text = text_config(&self.text, apply_yarn_scaling);
        match &self.vision {
            None => {
                text.insert("architectures".into(), json!(["Mistral4ForCausalLM"]));
                Value::Object(text)
            }
            Some(vision) => wrapper(vision, text),
        }
    }
}

impl ConfigFile {
    /// The `config.json` of this model, with the keys of the source that this library does not know.
    pub fn to_hf_json(&self) -> Value {
        let rope_keys = [
            "/text_config/rope_parameters",
            "/text_config/rope_scaling",
            "/rope_parameters",
            "/rope_scaling",
        ];
        let stated = match self.form {
            ConfigForm::Native => self.raw.pointer("/yarn/apply_scale").is_some(),
            ConfigForm::Hf => rope_keys.iter().any(|key| {
                self.raw
                    .pointer(key)
                    .and_then(|rope| rope.get("apply_yarn_scaling"))
                    .is_some_and(Value::is_boolean)
            }),
        };
        let policy = self.config.softmax_scale.policy;
        let apply_yarn_scaling = (stated || policy == SoftmaxScalePolicy::YarnMscale)
            .then_some(policy == SoftmaxScalePolicy::YarnMscale);
        let written = self.config.write(apply_yarn_scaling);
        match (self.form, &self.raw, written) {
            (ConfigForm::Hf, Value::Object(raw), Value::Object(written)) => {
                Value::Object(merge(raw, written))
            }
            (_, _, written) => written,
        }
    }
}

/// The source's keys in their order, with the values of this model, and then the keys it lacks.
fn merge(raw: &Map<String, Value>, mut written: Map<String, Value>) -> Map<String, Value> {
    let mut merged = Map::new();
    for (key, old) in raw {
        if REPLACED.contains(&key.as_str()) && !written.contains_key(key) {
            continue;
        }
        let value = match (old, written.shift_remove(key)) {
            (_, None) => old.clone(),
            (Value::Array(_), Some(_)) if key == "architectures" => old.clone(),
            (Value::Object(old), Some(Value::Object(new))) => Value::Object(merge(old, new)),
            (_, Some(new)) => new,
        };
        merged.insert(key.clone(), value);
    }
    merged.extend(written);
    merged
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("the caller writes an object"),
    }
}

fn text_config(text: &TextConfig, apply_yarn_scaling: Option<bool>) -> Map<String, Value> {
    let eos_token_id = match text.eos_token_id.as_slice() {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    };
    // transformers rotates the whole of head_dim when the rotary type is `default`.
    let head_dim = if text.rope.yarn.is_some() { text.qk_head_dim() } else { text.qk_rope_head_dim };
    object(json!({
        "attention_bias": text.attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": eos_token_id,
        "first_k_dense_replace": text.first_k_dense_replace,
        "head_dim": head_dim,
        "hidden_act": text.hidden_act.name(),
        "hidden_size": text.hidden_size,
        "initializer_range": text.initializer_range,
        "intermediate_size": text.intermediate_size,
        "kv_lora_rank": text.kv_lora_rank,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "mistral4",
        "moe_intermediate_size": text.moe_intermediate_size,
        "n_group": text.n_group,
        "n_routed_experts": text.n_routed_experts,
        "n_shared_experts": text.n_shared_experts,
        "norm_topk_prob": text.norm_topk_prob,
        "num_attention_heads": text.num_attention_heads,
        "num_experts_per_tok": text.num_experts_per_tok,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_attention_heads,
        "pad_token_id": text.pad_token_id,
        "q_lora_rank": text.q_lora_rank,
        "qk_head_dim": text.qk_head_dim(),
        "qk_nope_head_dim": text.qk_nope_head_dim,
        "qk_rope_head_dim": text.qk_rope_head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_interleave": text.rope_interleave,
        "rope_parameters": rope_parameters(text, apply_yarn_scaling),
        "routed_scaling_factor": text.routed_scaling_factor,
        "tie_word_embeddings": false,
        "topk_group": text.topk_group,
        "v_head_dim": text.v_head_dim,
        "vocab_size": text.vocab_size,
    }))
}

fn rope_parameters(text: &TextConfig, apply_yarn_scaling: Option<bool>) -> Value {
    let rope = &text.rope;
    let mut written = Map::new();
    let mut insert = |key: &str, value: Value| written.insert(key.to_owned(), value);
    insert("rope_theta", json!(rope.rope_theta));
    if let Some((beta, original)) = rope.llama_4_scaling {
        insert("llama_4_scaling_beta", json!(beta));
        insert("original_max_position_embeddings", json!(original));
    }
    match &rope.yarn {
        None => {
            insert("rope_type", json!("default"));
            insert("partial_rotary_factor", json!(1.0));
        }
        Some(yarn) => {
            insert("rope_type", json!("yarn"));
            insert("partial_rotary_factor", json!(text.qk_rope_head_dim as f64 / text.qk_head_dim() as f64));
            insert("factor", json!(yarn.factor));
            insert("original_max_position_embeddings", json!(yarn.original_max_position_embeddings));
            insert("beta_fast", json!(yarn.beta_fast));
            insert("beta_slow", json!(yarn.beta_slow));
            insert("truncate", json!(yarn.truncate));
            // transformers multiplies by mscale_all_dim's scale whenever it is there, so that where the scale is not to be
            // applied the two factors are left out, and what they do to cos and sin is written as attention_factor.
            let stated = |factor: Option<f64>| factor.filter(|_| apply_yarn_scaling != Some(false));
            let (mscale, mscale_all_dim) = (stated(yarn.mscale), stated(yarn.mscale_all_dim));
            for (key, value) in [("mscale", mscale), ("mscale_all_dim", mscale_all_dim)] {
                if let Some(value) = value {
                    insert(key, json!(value));
                }
            }
            let derived = derived_attention_factor(yarn.factor, mscale, mscale_all_dim);
            if apply_yarn_scaling.is_some() || yarn.attention_factor != derived {
                insert("attention_factor", json!(yarn.attention_factor));
            }
        }
    }
    if let Some(apply) = apply_yarn_scaling {
        insert("apply_yarn_scaling", json!(apply));
    }
    // Older readers ask for `type`.
    let rope_type = written["rope_type"].clone();
    written.insert("type".into(), rope_type);
    Value::Object(written)
}

fn wrapper(vision: &MultimodalConfig, text_config: Map<String, Value>) -> Value {
    let tower = &vision.vision_config;
    let vision_feature_layer = if vision.vision_feature_layer == tower.num_hidden_layers {
        json!(-1)
    } else {
        json!(vision.vision_feature_layer)
    };
    json!({
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": vision.image_token_index,
        "model_type": "mistral3",
        "multimodal_projector_bias": vision.multimodal_projector_bias,
        "projector_hidden_act": vision.projector_hidden_act.name(),
        "spatial_merge_size": vision.spatial_merge_size,
        "text_config": text_config,
        "tie_word_embeddings": false,
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": tower.head_dim,
            "hidden_act": tower.hidden_act.name(),
            "hidden_size": tower.hidden_size,
            "image_size": tower.image_size,
            "initializer_range": tower.initializer_range,
            "intermediate_size": tower.intermediate_size,
            "model_type": "pixtral",
            "num_attention_heads": tower.num_attention_heads,
            "num_channels": tower.num_channels,
            "num_hidden_layers": tower.num_hidden_layers,
            "patch_size": tower.patch_size,
            "rope_parameters": {"rope_theta": tower.rope_theta, "rope_type": "axial"},
        },
        "vision_feature_layer": vision_feature_layer,
    })
}
