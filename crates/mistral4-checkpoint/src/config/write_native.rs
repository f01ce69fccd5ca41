//! Writing a configuration in the form of Mistral's own `params.json`.

use serde_json::{Value, json};

use super::{Activation, Config, SoftmaxScalePolicy};
use crate::error::{Error, Result};

impl Config {
    /// The `params.json` of this model.
    ///
    /// The form has no place for token ids, initialisation and the longest image side a processor accepts; readers take
    /// Mistral's values.
    ///
    /// # Errors
    /// When the model has something that the form cannot say.
    pub fn to_params_json(&self) -> Result<Value> {
        let refuse = |key: &str, problem: &str| {
            Err(Error::Unrepresentable { key: key.to_owned(), format: "native", problem: problem.to_owned() })
        };
        let text = &self.text;
        if text.attention_bias {
            return refuse("attention_bias", "the form has no biases");
        }
        if !text.rope_interleave {
            return refuse("rope_interleave", "rotary pairs are neighbours there");
        }
        if !text.norm_topk_prob {
            return refuse("norm_topk_prob", "routing weights are always normalised there");
        }
        let apply_scale = self.softmax_scale.policy == SoftmaxScalePolicy::YarnMscale;
        let mut params = json!({
            "dim": text.hidden_size,
            "n_layers": text.num_hidden_layers,
            "head_dim": text.v_head_dim,
            "hidden_dim": text.intermediate_size,
            "n_heads": text.num_attention_heads,
            "n_kv_heads": text.num_attention_heads,
            "norm_eps": text.rms_norm_eps,
            "vocab_size": text.vocab_size,
            "tied_embeddings": false,
            "rope_theta": text.rope.rope_theta,
            "max_position_embeddings": text.max_position_embeddings,
            "q_lora_rank": text.q_lora_rank,
            "qk_rope_head_dim": text.qk_rope_head_dim,
            "qk_nope_head_dim": text.qk_nope_head_dim,
            "kv_lora_rank": text.kv_lora_rank,
            "v_head_dim": text.v_head_dim,
            "moe": {
                "first_k_dense_replace": text.first_k_dense_replace,
                "route_every_n": 1,
                "num_experts": text.n_routed_experts,
                "num_experts_per_tok": text.num_experts_per_tok,
                "num_expert_groups": text.n_group,
                "num_expert_groups_per_tok": text.topk_group,
                "num_shared_experts": text.n_shared_experts,
                "expert_hidden_dim": text.moe_intermediate_size,
                "routed_scale": text.routed_scaling_factor,
            },
        });
        if text.hidden_act != Activation::Silu {
            params["activation"] = json!(text.hidden_act.name());
        }
        match &text.rope.yarn {
            Some(yarn) => {
                if yarn.attention_factor != 1.0 {
                    return refuse("rope_parameters.attention_factor", "cos and sin are not scaled there");
                }
                if !yarn.truncate {
                    return refuse("rope_parameters.truncate", "the ramp's ends are always whole there");
                }
                if apply_scale && yarn.mscale_all_dim != Some(1.0) {
                    return refuse("rope_parameters.mscale_all_dim", "it is always 1 there");
                }
                params["yarn"] = json!({
                    "original_max_position_embeddings": yarn.original_max_position_embeddings,
                    "factor": yarn.factor,
                    "apply_scale": apply_scale,
                    "beta": yarn.beta_fast,
                    "alpha": yarn.beta_slow,
                });
            }
            None if apply_scale => return refuse("softmax_scale", "without YaRN there is no scale to apply"),
            None => {}
        }
        if let Some((beta, original)) = text.rope.llama_4_scaling
            && beta != 0.0
        {
            params["llama_4_scaling"] = json!({"original_max_position_embeddings": original, "beta": beta});
        }
        let Some(vision) = &self.vision else { return Ok(params) };
        let tower = &vision.vision_config;
        if tower.hidden_act != Activation::Silu {
            return refuse("vision_config.hidden_act", "the tower's activation is always silu there");
        }
        if vision.projector_hidden_act != Activation::Gelu {
            return refuse("projector_hidden_act", "the projector's activation is always gelu there");
        }
        if vision.vision_feature_layer != tower.num_hidden_layers {
            return refuse("vision_feature_layer", "the last layer always feeds the projector there");
        }
        params["vision_encoder"] = json!({
            "image_token_id": vision.image_token_index,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads,
            "mm_projector_id": "patch_merge",
            "spatial_merge_size": vision.spatial_merge_size,
            "hidden_size": tower.hidden_size,
            "num_channels": tower.num_channels,
            "image_size": tower.image_size,
            "max_image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "rope_theta": tower.rope_theta,
            "add_pre_mm_projector_layer_norm": true,
            "adapter_bias": vision.multimodal_projector_bias,
        });
        Ok(params)
    }
}
