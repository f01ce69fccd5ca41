//! Parsing of Hugging Face's `config.json`: the `mistral3` wrapper and the plain `mistral4` text model.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::quantization::Quantization;
use super::softmax_scale::{self, ConfigOptions};
use super::{Activation, Config, TextConfig, rope, vision};
use crate::error::{Error, Result};

/// Keys that transformers writes and that do not change what the model computes.
pub(super) const INERT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "dtype",
    "experts_implementation",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
    // Sampling settings that old versions wrote here; generation_config.json is their place.
    "bad_words_ids",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// What a configuration file says.
pub(super) struct Parsed {
    pub(super) config: Config,
    pub(super) quantization: Option<Quantization>,
    pub(super) warnings: Vec<String>,
}

/// Parses the root object of a `config.json`.
pub(super) fn parse(file: &Path, root: &Map<String, Value>, options: &ConfigOptions) -> Result<Parsed> {
    let not_a_model = |problem: String| {
        Error::NotAModel {
        path: file.to_path_buf(),
        problem,
        fix: "a Mistral 4 config has model_type mistral4, or mistral3 with a text_config of model_type mistral4".into(),
    }
    };
    let fields = Fields::new(file, "", root);
    let mut warnings = Vec::new();
    let (text, scale, vision, mut quantization) = match fields.text("model_type")? {
        Some("mistral4") => {
            let (text, scale) = text_config(&fields, &mut warnings)?;
            (text, scale, None, None)
        }
        Some("mistral3") => {
            let text_fields = fields
                .object("text_config")?
                .ok_or_else(|| not_a_model("the mistral3 wrapper has no text_config".into()))?;
            match text_fields.text("model_type")? {
                Some("mistral4") => {}
                other => {
                    let name = other.unwrap_or("mistral (the default)");
                    return Err(not_a_model(format!("text_config.model_type is {name}")));
                }
            }
            let (text, scale) = text_config(&text_fields, &mut warnings)?;
            let quantization = Quantization::parse(&text_fields)?;
            warnings.extend(text_fields.unknown(INERT));
            let vision = vision::multimodal_config(&fields, &text, &mut warnings)?;
            (text, scale, Some(vision), quantization)
        }
        Some(other) => return Err(not_a_model(format!("model_type is {other}"))),
        None => return Err(not_a_model("there is no model_type".into())),
    };
    reject_unsupported(&fields)?;
    if fields.get("tie_word_embeddings").is_none() && vision.is_some() {
        warnings.push(format!(
            "{}: `tie_word_embeddings` is absent, for which transformers ties the embeddings of a mistral3 wrapper; \
             read as false, so the checkpoint must hold lm_head.weight",
            file.display()
        ));
    }
    if let Some(at_root) = Quantization::parse(&fields)? {
        quantization = Some(at_root);
    }
    warnings.extend(fields.unknown(INERT));
    let softmax_scale = softmax_scale::resolve(options, &text, scale);
    let config = Config { text, vision, softmax_scale };
    config.check_total_size(file)?;
    Ok(Parsed { config, quantization, warnings })
}

/// True only for a wrapper around this decoder: `text_config.model_type` is `mistral4`.
///
/// A plain text `config.json` has no `text_config`; it loads as a text model and is not what this asks about.
///
/// Source: NeMo AutoModel, `Mistral3ForConditionalGeneration.supports_config`.
pub fn supports_config(config: &Value) -> bool {
    config.pointer("/text_config/model_type").and_then(Value::as_str) == Some("mistral4")
}

/// Keys of any level whose other values would change the model in ways that are not implemented.
fn reject_unsupported(fields: &Fields<'_>) -> Result<()> {
    fields.only(
        "tie_word_embeddings",
        &[json!(false)],
        "tied embeddings are not supported",
        "untie them: store lm_head.weight and set it to false",
    )?;
    fields.only("is_encoder_decoder", &[json!(false)], "the model is a decoder", "set it to false")?;
    fields.only(
        "per_layer_config",
        &[json!({}), json!([])],
        "all layers share one configuration",
        "remove it",
    )?;
    fields.only(
        "tie_last_hidden_states",
        &[json!(true)],
        "the last hidden state is always the one after the final norm",
        "remove it",
    )?;
    if let Some(architectures) = fields.non_null("architectures") {
        let known =
            ["Mistral4ForCausalLM", "Mistral3ForConditionalGeneration", "Mistral4Model", "Mistral3Model"];
        let names = architectures.as_array().map(Vec::as_slice).unwrap_or_default();
        if !names.is_empty()
            && !names.iter().any(|name| name.as_str().is_some_and(|name| known.contains(&name)))
        {
            return Err(fields.invalid(
                "architectures",
                "this head is not implemented",
                "use Mistral4ForCausalLM or Mistral3ForConditionalGeneration",
            ));
        }
    }
    Ok(())
}

/// Parses the decoder's keys, which are the root of a text model or the `text_config` of a wrapper.
fn text_config(fields: &Fields<'_>, warnings: &mut Vec<String>) -> Result<(TextConfig, Option<bool>)> {
    reject_unsupported(fields)?;
    let vocab_size = fields.size("vocab_size", 131_072)?;
    let num_attention_heads = fields.size("num_attention_heads", 32)?;
    if let Some(heads) = fields.optional_size("num_key_value_heads", None)? {
        // transformers' default is 32 whatever num_attention_heads is, so only an explicit value can disagree.
        if heads != num_attention_heads {
            return Err(fields.invalid(
                "num_key_value_heads",
                format!("latent attention gives every one of the {num_attention_heads} heads its own key and value"),
                "set it to num_attention_heads",
            ));
        }
    }
    let n_routed_experts = match (fields.get("n_routed_experts"), fields.get("num_local_experts")) {
        (None, Some(_)) => fields.size("num_local_experts", 128)?,
        (Some(experts), Some(alias)) if experts != alias => {
            return Err(fields.invalid(
                "num_local_experts",
                format!("it is another name of n_routed_experts, which is {experts}"),
                "remove one of the two",
            ));
        }
        _ => fields.size("n_routed_experts", 128)?,
    };
    let qk_rope_head_dim = fields.size("qk_rope_head_dim", 64)?;
    let qk_nope_head_dim = fields.size("qk_nope_head_dim", 64)?;
    if !qk_rope_head_dim.is_multiple_of(2) {
        return Err(fields.invalid("qk_rope_head_dim", "rotation works on pairs", "make it even"));
    }
    if let Some(qk_head_dim) = fields.optional_size("qk_head_dim", None)?
        && qk_head_dim != qk_nope_head_dim + qk_rope_head_dim
    {
        return Err(fields.invalid(
            "qk_head_dim",
            format!("qk_nope_head_dim + qk_rope_head_dim is {}", qk_nope_head_dim + qk_rope_head_dim),
            "remove it, it is derived",
        ));
    }
    let max_position_embeddings = fields.size("max_position_embeddings", 1_048_576)?;
    let (rope, apply_yarn_scaling) =
        rope::parse(fields, qk_nope_head_dim, qk_rope_head_dim, max_position_embeddings, warnings)?;
    let text = TextConfig {
        vocab_size,
        hidden_size: fields.size("hidden_size", 4096)?,
        intermediate_size: fields.size("intermediate_size", 12_288)?,
        moe_intermediate_size: fields.size("moe_intermediate_size", 2048)?,
        num_hidden_layers: fields.size("num_hidden_layers", 36)?,
        num_attention_heads,
        n_shared_experts: fields.size("n_shared_experts", 1)?,
        n_routed_experts,
        num_experts_per_tok: fields.size("num_experts_per_tok", 4)?,
        routed_scaling_factor: fields.positive("routed_scaling_factor", 1.0)?,
        kv_lora_rank: fields.size("kv_lora_rank", 256)?,
        q_lora_rank: fields.optional_size("q_lora_rank", Some(1024))?,
        qk_rope_head_dim,
        qk_nope_head_dim,
        v_head_dim: fields.size("v_head_dim", 128)?,
        n_group: fields.size("n_group", 1)?,
        topk_group: fields.size("topk_group", 1)?,
        first_k_dense_replace: fields.count("first_k_dense_replace", 0)?,
        norm_topk_prob: fields.flag("norm_topk_prob", true)?,
        hidden_act: fields.activation("hidden_act", Activation::Silu)?,
        max_position_embeddings,
        initializer_range: fields.positive("initializer_range", 0.02)?,
        rms_norm_eps: fields.positive("rms_norm_eps", 1e-6)?,
        pad_token_id: fields.token("pad_token_id", Some(11), vocab_size)?,
        bos_token_id: fields.token("bos_token_id", Some(1), vocab_size)?,
        eos_token_id: fields.tokens("eos_token_id", 2, vocab_size)?,
        rope,
        rope_interleave: fields.flag("rope_interleave", true)?,
        attention_bias: fields.flag("attention_bias", false)?,
    };
    check_routing(fields, &text, |key| key)?;
    reject_other_decoders(fields, &text)?;
    Ok((text, apply_yarn_scaling))
}

/// The router's sizes must fit one another; `name` turns a key of this form into the file's own.
pub(super) fn check_routing(
    fields: &Fields<'_>,
    text: &TextConfig,
    name: impl Fn(&'static str) -> &'static str,
) -> Result<()> {
    if text.num_hidden_layers > 4096 {
        return Err(fields.invalid(
            name("num_hidden_layers"),
            "the number is implausibly large",
            "the largest accepted is 4096",
        ));
    }
    if !text.n_routed_experts.is_multiple_of(text.n_group) {
        return Err(fields.invalid(
            name("n_group"),
            format!("{} experts do not divide into that many groups", text.n_routed_experts),
            "use a divisor of n_routed_experts",
        ));
    }
    if text.topk_group > text.n_group {
        return Err(fields.invalid(
            name("topk_group"),
            format!("there are only {} groups", text.n_group),
            "use at most n_group",
        ));
    }
    let experts_per_group = text.n_routed_experts / text.n_group;
    if experts_per_group < 2 && text.first_k_dense_replace < text.num_hidden_layers {
        return Err(fields.invalid(
            name("n_routed_experts"),
            "a group is scored by its best two experts, so it needs two",
            "use fewer groups or more experts",
        ));
    }
    let reachable = text.topk_group * experts_per_group;
    if text.num_experts_per_tok > reachable && text.first_k_dense_replace < text.num_hidden_layers {
        return Err(fields.invalid(
            name("num_experts_per_tok"),
            format!("a token can reach {reachable} experts (topk_group groups of {experts_per_group})"),
            "lower it or raise topk_group",
        ));
    }
    Ok(())
}

/// Keys of related decoders that Mistral 4 does not have; accepted only where they change nothing.
fn reject_other_decoders(fields: &Fields<'_>, text: &TextConfig) -> Result<()> {
    fields.only(
        "attention_dropout",
        &[json!(0.0)],
        "dropout on attention weights is not implemented",
        "set it to 0, as in every released Mistral 4",
    )?;
    fields.only("sliding_window", &[], "attention windows are not implemented", "set it to null")?;
    fields.only("mlp_bias", &[json!(false)], "feed-forwards have no bias", "set it to false")?;
    fields.only(
        "scoring_func",
        &[json!("softmax")],
        "the router's scores are a softmax",
        "set it to softmax",
    )?;
    fields.only(
        "topk_method",
        &[json!("noaux_tc"), json!("greedy")],
        "unknown way to choose experts",
        "remove it",
    )?;
    fields.only(
        "moe_layer_freq",
        &[json!(1)],
        "every layer after the dense ones has experts",
        "set it to 1",
    )?;
    fields.only(
        "num_nextn_predict_layers",
        &[json!(0)],
        "multi-token prediction is not implemented",
        "set it to 0",
    )?;
    if let Some(layer_types) = fields.non_null("layer_types") {
        let full = layer_types.as_array().is_some_and(|types| {
            types.len() == text.num_hidden_layers && types.iter().all(|kind| kind == "full_attention")
        });
        if !full {
            return Err(fields.invalid(
                "layer_types",
                "every layer attends to all positions",
                "remove it, or give full_attention for each layer",
            ));
        }
    }
    Ok(())
}
