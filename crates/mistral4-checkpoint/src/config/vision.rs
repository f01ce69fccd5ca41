//! The Pixtral tower and projector of a `mistral3` wrapper.

use serde_json::{Value, json};

use super::fields::Fields;
use super::hf::INERT;
use super::{Activation, MultimodalConfig, TextConfig, VisionConfig};
use crate::error::{Error, Result};

/// Parses what the wrapper adds to the decoder.
pub(super) fn multimodal_config(
    fields: &Fields<'_>,
    text: &TextConfig,
    warnings: &mut Vec<String>,
) -> Result<MultimodalConfig> {
    let vision_config = match fields.object("vision_config")? {
        Some(vision) => {
            let config = vision_config(&vision, warnings)?;
            warnings.extend(vision.unknown(INERT));
            config
        }
        // The wrapper's own default differs from PixtralVisionConfig's.
        None => VisionConfig { image_size: 1540, patch_size: 14, ..pixtral_defaults() },
    };
    let token_key =
        if fields.get("image_token_index").is_some() { "image_token_index" } else { "image_token_id" };
    let image_token_index = match fields.get(token_key) {
        None => 10,
        Some(_) => fields
            .token(token_key, None, text.vocab_size)?
            .ok_or_else(|| fields.invalid(token_key, "images need a token", "Mistral's is 10"))?,
    };
    if image_token_index as usize >= text.vocab_size {
        return Err(fields.invalid(
            "image_token_index",
            format!("the default 10 is outside the vocabulary of {}", text.vocab_size),
            "give an id below vocab_size",
        ));
    }
    Ok(MultimodalConfig {
        vision_feature_layer: vision_feature_layer(fields, vision_config.num_hidden_layers)?,
        image_token_index,
        projector_hidden_act: fields.activation("projector_hidden_act", Activation::Gelu)?,
        multimodal_projector_bias: fields.flag("multimodal_projector_bias", false)?,
        spatial_merge_size: merge_size(fields)?,
        vision_config,
    })
}

fn pixtral_defaults() -> VisionConfig {
    VisionConfig {
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 24,
        num_attention_heads: 16,
        head_dim: 64,
        num_channels: 3,
        image_size: 1024,
        patch_size: 16,
        hidden_act: Activation::Gelu,
        rope_theta: 10_000.0,
        initializer_range: 0.02,
    }
}

fn vision_config(fields: &Fields<'_>, warnings: &mut Vec<String>) -> Result<VisionConfig> {
    match fields.text("model_type")? {
        Some("pixtral") | None => {}
        Some(_) => {
            return Err(fields.invalid("model_type", "this vision tower is not implemented", "use pixtral"));
        }
    }
    let default = pixtral_defaults();
    let hidden_size = fields.size("hidden_size", default.hidden_size)?;
    let num_attention_heads = fields.size("num_attention_heads", default.num_attention_heads)?;
    let head_dim = check_heads(fields, hidden_size, num_attention_heads)?;
    if let Some(stated) = fields.optional_size("head_dim", None)?
        && stated != head_dim
    {
        return Err(fields.invalid(
            "head_dim",
            format!("hidden_size / num_attention_heads is {head_dim}"),
            "remove it, it is derived",
        ));
    }
    fields.only(
        "attention_dropout",
        &[json!(0.0)],
        "dropout on attention weights is not implemented",
        "set it to 0",
    )?;
    Ok(VisionConfig {
        hidden_size,
        intermediate_size: fields.size("intermediate_size", default.intermediate_size)?,
        num_hidden_layers: layers(fields, default.num_hidden_layers)?,
        num_attention_heads,
        head_dim,
        num_channels: fields.size("num_channels", default.num_channels)?,
        image_size: square(fields, "image_size", default.image_size)?,
        patch_size: square(fields, "patch_size", default.patch_size)?,
        hidden_act: fields.activation("hidden_act", default.hidden_act)?,
        rope_theta: rope_theta(fields, warnings)?,
        initializer_range: fields.positive("initializer_range", default.initializer_range)?,
    })
}

/// The width of a head, which must hold pairs for rows and for columns.
pub(super) fn check_heads(
    fields: &Fields<'_>,
    hidden_size: usize,
    num_attention_heads: usize,
) -> Result<usize> {
    let head_dim = hidden_size / num_attention_heads;
    if !hidden_size.is_multiple_of(num_attention_heads) {
        return Err(fields.invalid(
            "num_attention_heads",
            format!("hidden_size {hidden_size} does not divide into that many heads"),
            "use a divisor",
        ));
    }
    if !head_dim.is_multiple_of(4) {
        return Err(fields.invalid(
            "num_attention_heads",
            format!("a head of {head_dim} does not split into pairs for rows and columns"),
            "make hidden_size / num_attention_heads a multiple of 4",
        ));
    }
    Ok(head_dim)
}

fn layers(fields: &Fields<'_>, default: usize) -> Result<usize> {
    match fields.size("num_hidden_layers", default)? {
        layers if layers > 4096 => Err(fields.invalid(
            "num_hidden_layers",
            "the number is implausibly large",
            "the largest accepted is 4096",
        )),
        layers => Ok(layers),
    }
}

/// Patches merged along a side.
pub(super) fn merge_size(fields: &Fields<'_>) -> Result<usize> {
    match fields.size("spatial_merge_size", 2)? {
        size if size > 64 => {
            Err(fields.invalid("spatial_merge_size", "the number is implausibly large", "Mistral's is 2"))
        }
        size => Ok(size),
    }
}

/// A side in pixels, written as one number or as a pair of equal ones.
fn square(fields: &Fields<'_>, key: &str, default: usize) -> Result<usize> {
    let Some(Value::Array(sides)) = fields.get(key) else { return fields.size(key, default) };
    match sides.as_slice() {
        [height, width] if height == width => match height.as_u64() {
            Some(side @ 1..=65_536) => Ok(side as usize),
            _ => Err(fields.invalid(key, "a whole number of pixels is needed", "use one number")),
        },
        _ => Err(fields.invalid(key, "the two sides must be the same", "use one number")),
    }
}

fn rope_theta(fields: &Fields<'_>, warnings: &mut Vec<String>) -> Result<f64> {
    let outer = fields.positive("rope_theta", 10_000.0)?;
    let Some(rope) = fields.object("rope_parameters")? else { return Ok(outer) };
    let rope_type = match rope.text("rope_type")? {
        Some(name) => name,
        None => rope.text("type")?.unwrap_or("axial"),
    };
    // transformers turns `default`, which older checkpoints carry, into its `axial`.
    if !matches!(rope_type, "axial" | "default") {
        return Err(rope.invalid("rope_type", "this rotary embedding is not implemented", "use axial"));
    }
    let theta = rope.positive("rope_theta", outer)?;
    warnings.extend(rope.unknown(&["type"]));
    Ok(theta)
}

/// Resolves an index into the tower's `num_hidden_layers + 1` hidden states, which may count from the end.
fn vision_feature_layer(fields: &Fields<'_>, num_hidden_layers: usize) -> Result<usize> {
    const KEY: &str = "vision_feature_layer";
    let invalid = |problem: String, fix: &str| -> Error { fields.invalid(KEY, problem, fix) };
    let value = match fields.get(KEY) {
        None => return Ok(num_hidden_layers),
        Some(Value::Array(layers)) => match layers.as_slice() {
            [layer] => layer,
            _ => {
                return Err(invalid(
                    "several layers do not fit the projector's norm, in transformers neither".into(),
                    "name one layer",
                ));
            }
        },
        Some(layer) => layer,
    };
    let layer =
        value.as_i64().ok_or_else(|| invalid("a whole number is needed".into(), "-1 is the last layer"))?;
    let states = num_hidden_layers as i64 + 1;
    if !(-states..states).contains(&layer) {
        return Err(invalid(
            format!("the tower has {states} hidden states"),
            "count from 0 (the embeddings), or from -1 (the last layer) down",
        ));
    }
    Ok(layer.rem_euclid(states) as usize)
}
