//! `rope_parameters`, with the older `rope_scaling` and `rope_theta`.

use serde_json::Map;

use super::fields::Fields;
use super::softmax_scale::yarn_get_mscale;
use super::{RopeParameters, YarnParameters};
use crate::error::Result;

const DEFAULT_THETA: f64 = 10_000.0;

/// Parses the rotary embedding of a decoder; the second value is an explicit `apply_yarn_scaling`.
///
/// Source: transformers 5.24, `Mistral4Config.__post_init__` and `RotaryEmbeddingConfigMixin`.
pub(super) fn parse(
    fields: &Fields<'_>,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
    max_position_embeddings: usize,
    warnings: &mut Vec<String>,
) -> Result<(RopeParameters, Option<bool>)> {
    let head_dim = fields.optional_size("head_dim", None)?;
    let outer_theta = fields.positive("rope_theta", DEFAULT_THETA)?;
    let outer_factor = fields.optional_number("partial_rotary_factor")?;
    let outer_original = fields.optional_size("original_max_position_embeddings", None)?;
    let current = fields.object("rope_parameters")?;
    // As in transformers, a non-empty rope_scaling of an older version replaces rope_parameters.
    let old = match fields.non_null("rope_scaling") {
        Some(value) if value.as_object().is_some_and(Map::is_empty) => None,
        _ => fields.object("rope_scaling")?,
    };
    if old.is_some() && current.is_some() {
        warnings.push(format!(
            "{}: both `rope_scaling` and `rope_parameters` are there; rope_scaling wins, as in transformers",
            fields.file().display()
        ));
    }
    let Some(rope) = old.or(current) else {
        let rotary = Rotary { head_dim, partial: outer_factor, qk_nope_head_dim, qk_rope_head_dim };
        rotary.check(fields)?;
        return Ok((small_4(), None));
    };

    let rope_theta = rope.positive("rope_theta", outer_theta)?;
    let partial = rope.optional_number("partial_rotary_factor")?.or(outer_factor);
    let beta = rope.optional_number("llama_4_scaling_beta")?;
    let apply_yarn_scaling = match rope.non_null("apply_yarn_scaling") {
        None => None,
        Some(_) => Some(rope.flag("apply_yarn_scaling", false)?),
    };
    let original = match outer_original {
        Some(original) => Some(original),
        None => rope.optional_size("original_max_position_embeddings", None)?,
    };
    let rope_type = match rope.text("rope_type")? {
        Some(name) => name,
        None => rope.text("type")?.unwrap_or("default"),
    };
    let (yarn, original) = match rope_type {
        "default" => {
            // transformers rotates all of head_dim here, whatever the partial factor says.
            Rotary { head_dim, partial: None, qk_nope_head_dim, qk_rope_head_dim }.check(fields)?;
            (None, original)
        }
        "yarn" => {
            Rotary { head_dim, partial, qk_nope_head_dim, qk_rope_head_dim }.check(fields)?;
            let original = original.unwrap_or(max_position_embeddings);
            let yarn = parse_yarn(&rope, original, max_position_embeddings, apply_yarn_scaling, warnings)?;
            if rope_theta <= 1.0 {
                return Err(rope.invalid("rope_theta", "YaRN takes its logarithm", "use a base above 1"));
            }
            (Some(yarn), Some(original))
        }
        _ => {
            return Err(rope.invalid(
                "rope_type",
                "this rotary embedding is not implemented",
                "use default or yarn",
            ));
        }
    };
    let llama_4_scaling = match (beta, original) {
        (None, _) => None,
        (Some(beta), _) if beta < 0.0 => {
            return Err(rope.invalid(
                "llama_4_scaling_beta",
                "the factor must not be negative",
                "Small 4 has 0.1",
            ));
        }
        (Some(beta), Some(original)) => Some((beta, original)),
        (Some(_), None) => {
            return Err(rope.invalid(
                "original_max_position_embeddings",
                "llama_4_scaling_beta needs it",
                "add it, or remove llama_4_scaling_beta",
            ));
        }
    };
    // `max_position_embeddings` is repeated here by transformers and means nothing.
    // YaRN's keys on a default embedding do nothing either.
    let yarn_only =
        ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"];
    let inert: Vec<&str> = yarn_only.into_iter().chain(["type", "max_position_embeddings"]).collect();
    warnings.extend(rope.unknown(&inert));
    Ok((RopeParameters { rope_theta, yarn, llama_4_scaling }, apply_yarn_scaling))
}

fn parse_yarn(
    rope: &Fields<'_>,
    original_max_position_embeddings: usize,
    max_position_embeddings: usize,
    apply_yarn_scaling: Option<bool>,
    warnings: &mut Vec<String>,
) -> Result<YarnParameters> {
    let factor = match rope.get("factor") {
        None => {
            return Err(rope.invalid(
                "factor",
                "YaRN needs it",
                "give max_position_embeddings over the original",
            ));
        }
        Some(value) if value.is_null() => {
            max_position_embeddings as f64 / original_max_position_embeddings as f64
        }
        Some(_) => rope.positive("factor", 1.0)?,
    };
    if factor < 1.0 {
        warnings.push(format!("{}: YaRN's `factor` {factor} is below 1", rope.file().display()));
    }
    let positive_or = |key: &str, default: f64| -> Result<f64> {
        // transformers writes `get(key) or default`, so 0 and null are the default too.
        match rope.optional_number(key)? {
            None | Some(0.0) => Ok(default),
            Some(_) => rope.positive(key, default),
        }
    };
    let mscale = rope.optional_number("mscale")?;
    let mscale_all_dim = rope.optional_number("mscale_all_dim")?;
    for (key, value) in [("mscale", mscale), ("mscale_all_dim", mscale_all_dim)] {
        if value.is_some_and(|value| value < 0.0) {
            return Err(rope.invalid(key, "the factor must not be negative", "Small 4 has 1"));
        }
    }
    let attention_factor = match rope.optional_number("attention_factor")? {
        Some(_) => rope.positive("attention_factor", 1.0)?,
        None if apply_yarn_scaling == Some(false) => 1.0,
        None => derived_attention_factor(factor, mscale, mscale_all_dim),
    };
    Ok(YarnParameters {
        factor,
        original_max_position_embeddings,
        beta_fast: positive_or("beta_fast", 32.0)?,
        beta_slow: positive_or("beta_slow", 1.0)?,
        truncate: rope.flag("truncate", true)?,
        mscale,
        mscale_all_dim,
        attention_factor,
    })
}

/// The factor on cos and sin when none is given.
///
/// Source: transformers 5.24, `_compute_yarn_parameters`.
pub(super) fn derived_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    match (mscale.filter(|&m| m != 0.0), mscale_all_dim.filter(|&m| m != 0.0)) {
        (Some(mscale), Some(all_dim)) => yarn_get_mscale(factor, mscale) / yarn_get_mscale(factor, all_dim),
        _ => yarn_get_mscale(factor, 1.0),
    }
}

/// The keys from which transformers derives how many dimensions it rotates.
struct Rotary {
    head_dim: Option<usize>,
    partial: Option<f64>,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
}

impl Rotary {
    /// transformers rotates `head_dim * partial_rotary_factor` dimensions; that must be `qk_rope_head_dim`.
    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim;
        let head_dim = self.head_dim.unwrap_or(qk_head_dim);
        if self.partial.is_none() && head_dim == self.qk_rope_head_dim {
            return Ok(());
        }
        let partial = self.partial.unwrap_or(self.qk_rope_head_dim as f64 / qk_head_dim as f64);
        let rotated = head_dim as f64 * partial;
        // The factor is a quotient rounded to a double, so the product may fall short by a hair.
        if (rotated - self.qk_rope_head_dim as f64).abs() < 1e-3 {
            return Ok(());
        }
        Err(fields.invalid(
            "head_dim",
            format!(
                "head_dim {head_dim} times partial_rotary_factor {partial} is {rotated}, but qk_rope_head_dim is {}",
                self.qk_rope_head_dim
            ),
            "remove head_dim and partial_rotary_factor, they are derived",
        ))
    }
}

/// Mistral Small 4's rotary embedding, which transformers takes when there is none.
pub(super) fn small_4() -> RopeParameters {
    let original_max_position_embeddings = 8192;
    RopeParameters {
        rope_theta: DEFAULT_THETA,
        yarn: Some(YarnParameters {
            factor: 128.0,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            attention_factor: 1.0,
        }),
        llama_4_scaling: Some((0.1, original_max_position_embeddings)),
    }
}
