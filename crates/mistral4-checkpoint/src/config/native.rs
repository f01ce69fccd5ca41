//! Parsing of Mistral's own `params.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::hf::{Parsed, check_routing};
use super::quantization::{ActivationScheme, Fp8Quantization, Quantization};
use super::softmax_scale::{self, ConfigOptions};
use super::vision::{check_heads, merge_size};
use super::{Activation, Config, MultimodalConfig, RopeParameters, TextConfig, VisionConfig, YarnParameters};
use crate::error::{Error, Result};

/// Keys that say how Mistral's own code runs the model, and nothing about what it computes.
const INERT: &[&str] = &[
    "_sliding_window",
    "causal",
    "dtype",
    "max_batch_size",
    "max_seq_len",
    "model_parallel",
    "model_type",
    "moe_tensor_parallelism",
    "name",
    "pipeline_parallel",
    "ragged_attention",
    "tekken",
    "use_cache",
];

/// Parses the root object of a `params.json`.
///
/// Source: transformers' `convert_mistral4_weight_to_hf.py` and vLLM's `transformers_utils/configs/mistral.py`.
pub(super) fn parse(file: &Path, root: &Map<String, Value>, options: &ConfigOptions) -> Result<Parsed> {
    let fields = Fields::new(file, "", root);
    let mut warnings = Vec::new();
    let moe = fields.object("moe")?.ok_or_else(|| Error::NotAModel {
        path: file.to_path_buf(),
        problem: "there is no `moe`".into(),
        fix: "Mistral 4 is a mixture of experts; this is another model".into(),
    })?;
    let text = text_config(&fields, &moe)?;
    let (rope, apply_scale) = rope(&fields, &mut warnings)?;
    let text = TextConfig { rope, ..text };
    check_routing(&fields, &text, |key| match key {
        "num_hidden_layers" => "n_layers",
        "n_group" => "moe.num_expert_groups",
        "topk_group" => "moe.num_expert_groups_per_tok",
        "n_routed_experts" => "moe.num_experts",
        "num_experts_per_tok" => "moe.num_experts_per_tok",
        other => other,
    })?;
    let vision = match fields.object("vision_encoder")? {
        Some(encoder) => {
            let vision = vision(&encoder, &text)?;
            warnings.extend(encoder.unknown(&[
                "image_break_token_id",
                "image_end_token_id",
                "max_image_size",
            ]));
            Some(vision)
        }
        None => None,
    };
    fields.only("multimodal", &[], "only vision_encoder is known", "this is another model")?;
    let quantization = quantization(&fields, vision.is_some())?;
    warnings.extend(moe.unknown(&["expert_parallel", "expert_model_parallel", "use_load_balancing_bias"]));
    warnings.extend(fields.unknown(INERT));
    let softmax_scale = softmax_scale::resolve(options, &text, apply_scale);
    let config = Config { text, vision, softmax_scale };
    config.check_total_size(file)?;
    Ok(Parsed { config, quantization, warnings })
}

fn text_config(fields: &Fields<'_>, moe: &Fields<'_>) -> Result<TextConfig> {
    let vocab_size = fields.required_size("vocab_size")?;
    let num_attention_heads = fields.required_size("n_heads")?;
    fields.only(
        "n_kv_heads",
        &[json!(num_attention_heads)],
        "latent attention gives every head its own key and value",
        "set it to n_heads",
    )?;
    fields.only("tied_embeddings", &[json!(false)], "tied embeddings are not supported", "untie them")?;
    fields.only("sliding_window", &[], "attention windows are not implemented", "set it to null")?;
    fields.only("use_biases", &[json!(false)], "the native form has no biases", "set it to false")?;
    moe.only("route_every_n", &[json!(1)], "every layer after the dense ones has experts", "set it to 1")?;
    moe.only(
        "renorm_strategy",
        &[json!("WEIGHTS")],
        "unknown way to normalise routing weights",
        "use WEIGHTS",
    )?;
    let qk_nope_head_dim = fields.required_size("qk_nope_head_dim")?;
    let qk_rope_head_dim = fields.required_size("qk_rope_head_dim")?;
    if !qk_rope_head_dim.is_multiple_of(2) {
        return Err(fields.invalid("qk_rope_head_dim", "rotation works on pairs", "make it even"));
    }
    let v_head_dim = fields.required_size("v_head_dim")?;
    let known = [json!(qk_nope_head_dim + qk_rope_head_dim), json!(v_head_dim)];
    fields.only("head_dim", &known, "neither a query head nor a value head has that width", "remove it")?;
    let max_position_embeddings = match fields.optional_size("max_position_embeddings", None)? {
        Some(positions) => positions,
        None => fields.optional_size("max_seq_len", None)?.unwrap_or(1_048_576),
    };
    Ok(TextConfig {
        vocab_size,
        hidden_size: fields.required_size("dim")?,
        intermediate_size: fields.required_size("hidden_dim")?,
        moe_intermediate_size: moe.required_size("expert_hidden_dim")?,
        num_hidden_layers: fields.required_size("n_layers")?,
        num_attention_heads,
        n_shared_experts: moe.size("num_shared_experts", 1)?,
        n_routed_experts: moe.required_size("num_experts")?,
        num_experts_per_tok: moe.required_size("num_experts_per_tok")?,
        routed_scaling_factor: moe.positive("routed_scale", 1.0)?,
        kv_lora_rank: fields.required_size("kv_lora_rank")?,
        q_lora_rank: fields.optional_size("q_lora_rank", None)?,
        qk_rope_head_dim,
        qk_nope_head_dim,
        v_head_dim,
        n_group: moe.optional_size("num_expert_groups", None)?.unwrap_or(1),
        topk_group: moe.optional_size("num_expert_groups_per_tok", None)?.unwrap_or(1),
        first_k_dense_replace: moe.count("first_k_dense_replace", 0)?,
        norm_topk_prob: true,
        hidden_act: fields.activation("activation", Activation::Silu)?,
        max_position_embeddings,
        initializer_range: 0.02,
        rms_norm_eps: fields.positive("norm_eps", 1e-6)?,
        pad_token_id: Some(11).filter(|&id| id < vocab_size as u32),
        bos_token_id: Some(1).filter(|&id| id < vocab_size as u32),
        eos_token_id: Some(2).filter(|&id| id < vocab_size as u32).into_iter().collect(),
        rope: super::rope::small_4(),
        rope_interleave: true,
        attention_bias: false,
    })
}

/// The rotary embedding and an explicit `yarn.apply_scale`.
fn rope(fields: &Fields<'_>, warnings: &mut Vec<String>) -> Result<(RopeParameters, Option<bool>)> {
    let rope_theta = fields.positive("rope_theta", 10_000.0)?;
    let mut apply_scale = None;
    let yarn = match fields.object("yarn")? {
        None => None,
        Some(yarn) => {
            if rope_theta <= 1.0 {
                return Err(fields.invalid("rope_theta", "YaRN takes its logarithm", "use a base above 1"));
            }
            if yarn.non_null("apply_scale").is_some() {
                apply_scale = Some(yarn.flag("apply_scale", false)?);
            }
            let required = |key: &str| match yarn.get(key) {
                None => Err(yarn.invalid(key, "the key is required", "add it")),
                Some(_) => yarn.positive(key, 1.0),
            };
            let parameters = YarnParameters {
                factor: required("factor")?,
                original_max_position_embeddings: yarn.required_size("original_max_position_embeddings")?,
                beta_fast: required("beta")?,
                beta_slow: required("alpha")?,
                truncate: true,
                // The form has no such keys; both readers of it take 1, whose ratio is 1 as well.
                mscale: Some(1.0),
                mscale_all_dim: Some(1.0),
                attention_factor: 1.0,
            };
            warnings.extend(yarn.unknown(&[]));
            Some(parameters)
        }
    };
    let llama_4_scaling = match fields.object("llama_4_scaling")? {
        None => None,
        Some(scaling) => {
            let beta = scaling.positive("beta", 0.1)?;
            let original = scaling.required_size("original_max_position_embeddings")?;
            if let Some(yarn) = &yarn
                && yarn.original_max_position_embeddings != original
            {
                return Err(scaling.invalid(
                    "original_max_position_embeddings",
                    format!(
                        "yarn has {}, and the model has one such length",
                        yarn.original_max_position_embeddings
                    ),
                    "make the two the same",
                ));
            }
            warnings.extend(scaling.unknown(&[]));
            Some((beta, original))
        }
    };
    Ok((RopeParameters { rope_theta, yarn, llama_4_scaling }, apply_scale))
}

fn vision(encoder: &Fields<'_>, text: &TextConfig) -> Result<MultimodalConfig> {
    encoder.only(
        "mm_projector_id",
        &[json!("patch_merge")],
        "this projector is not implemented",
        "use patch_merge",
    )?;
    encoder.only(
        "add_pre_mm_projector_layer_norm",
        &[json!(true)],
        "the projector always has a norm",
        "set it to true",
    )?;
    let hidden_size = encoder.required_size("hidden_size")?;
    let num_attention_heads = encoder.required_size("num_attention_heads")?;
    let head_dim = check_heads(encoder, hidden_size, num_attention_heads)?;
    let num_hidden_layers = encoder.required_size("num_hidden_layers")?;
    if num_hidden_layers > 4096 {
        return Err(encoder.invalid("num_hidden_layers", "the number is implausibly large", "at most 4096"));
    }
    let image_token_index = match encoder.get("image_token_id") {
        None => 10,
        Some(_) => encoder
            .token("image_token_id", None, text.vocab_size)?
            .ok_or_else(|| encoder.invalid("image_token_id", "images need a token", "Mistral's is 10"))?,
    };
    Ok(MultimodalConfig {
        vision_config: VisionConfig {
            hidden_size,
            intermediate_size: encoder.required_size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            head_dim,
            num_channels: encoder.size("num_channels", 3)?,
            image_size: encoder.required_size("image_size")?,
            patch_size: encoder.required_size("patch_size")?,
            hidden_act: Activation::Silu,
            rope_theta: encoder.positive("rope_theta", 10_000.0)?,
            initializer_range: 0.02,
        },
        image_token_index,
        projector_hidden_act: Activation::Gelu,
        vision_feature_layer: num_hidden_layers,
        multimodal_projector_bias: encoder.flag("adapter_bias", false)?,
        spatial_merge_size: merge_size(encoder)?,
    })
}

fn quantization(fields: &Fields<'_>, multimodal: bool) -> Result<Option<Quantization>> {
    let Some(quantization) = fields.object("quantization")? else { return Ok(None) };
    quantization.only(
        "qformat_weight",
        &[json!("fp8_e4m3")],
        "this quantization is not implemented",
        "use a checkpoint in fp8_e4m3 or bf16",
    )?;
    if quantization.non_null("qformat_weight").is_none() {
        return Err(quantization.invalid(
            "qformat_weight",
            "the key is required",
            "this library reads fp8_e4m3",
        ));
    }
    let activation_scheme = match quantization.text("qscheme_act")? {
        None | Some("TENSOR") => ActivationScheme::Static,
        Some("NO_SCALES") => ActivationScheme::Dynamic,
        Some(_) => {
            return Err(quantization.invalid("qscheme_act", "unknown scheme", "use TENSOR or NO_SCALES"));
        }
    };
    let fp8 = Fp8Quantization { activation_scheme, ..Fp8Quantization::per_tensor(multimodal) };
    Ok(Some(Quantization::Fp8(fp8)))
}
