//! `quantization_config`: how a checkpoint's weights are stored.

use serde_json::{Value, json};

use super::fields::Fields;
use crate::error::Result;

/// FP8 weights with scales.
///
/// The shapes stored decide how a weight is read; this is kept to be written back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantization {
    /// Rows and columns that share a scale; `None`: one scale for a whole weight or expert.
    pub weight_block_size: Option<(usize, usize)>,
    /// Whether activations are scaled as they come (`dynamic`) or by a stored factor (`static`).
    pub activation_scheme: ActivationScheme,
    /// Modules left as they are.
    pub modules_to_not_convert: Vec<String>,
}

/// Where activation scales come from; this library computes with dequantised weights and needs neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationScheme {
    /// From each activation.
    Dynamic,
    /// From `*activation_scale` keys.
    Static,
}

impl Quantization {
    /// What this library writes: one scale a weight or expert.
    ///
    /// # Shapes
    /// `X.weight_scale_inv` [], `experts.X_scale_inv` [E, 1, 1].
    pub fn per_tensor(multimodal: bool) -> Self {
        let names: &[&str] = if multimodal {
            &["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        } else {
            &["lm_head"]
        };
        Quantization {
            weight_block_size: None,
            activation_scheme: ActivationScheme::Dynamic,
            modules_to_not_convert: names.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    /// The form of transformers' `FineGrainedFP8Config`.
    pub fn to_json(&self) -> Value {
        json!({
            "activation_scheme": match self.activation_scheme {
                ActivationScheme::Dynamic => "dynamic",
                ActivationScheme::Static => "static",
            },
            "dequantize": false,
            "modules_to_not_convert": self.modules_to_not_convert,
            "quant_method": "fp8",
            "weight_block_size": self.weight_block_size.map(|(rows, columns)| [rows, columns]),
        })
    }

    /// Parses `quantization_config`, if there is one.
    pub(super) fn parse(fields: &Fields<'_>) -> Result<Option<Self>> {
        let Some(quantization) = fields.object("quantization_config")? else { return Ok(None) };
        quantization.only(
            "quant_method",
            &[json!("fp8")],
            "this quantization is not implemented",
            "use a checkpoint in fp8, bf16, f16 or f32",
        )?;
        if quantization.non_null("quant_method").is_none() {
            return Err(quantization.invalid(
                "quant_method",
                "the key is required",
                "this library reads fp8",
            ));
        }
        let activation_scheme =
            match quantization.text("activation_scheme")?.map(str::to_lowercase).as_deref() {
                None | Some("dynamic") => ActivationScheme::Dynamic,
                Some("static") => ActivationScheme::Static,
                Some(_) => {
                    return Err(quantization.invalid(
                        "activation_scheme",
                        "unknown scheme",
                        "use dynamic or static",
                    ));
                }
            };
        let weight_block_size = match quantization.get("weight_block_size") {
            None => Some((128, 128)),
            Some(Value::Null) => None,
            Some(value) => Some(block_size(value).ok_or_else(|| {
                quantization.invalid(
                    "weight_block_size",
                    "two sizes above 0 are needed",
                    "write [128, 128] or null",
                )
            })?),
        };
        quantization.only("scale_fmt", &[json!("float")], "only f32 scales are implemented", "use float")?;
        quantization.only("expert_dtype", &[json!("fp8")], "only fp8 experts are implemented", "use fp8")?;
        quantization.only(
            "modules_to_convert",
            &[json!([])],
            "embeddings and other modules beside linears and experts are not read as fp8",
            "remove it",
        )?;
        let skipped = match quantization.non_null("modules_to_not_convert") {
            Some(list) => Some(("modules_to_not_convert", list)),
            None => quantization.non_null("ignored_layers").map(|list| ("ignored_layers", list)),
        };
        let modules_to_not_convert = match skipped {
            None => Vec::new(),
            Some((key, list)) => serde_json::from_value(list.clone())
                .map_err(|_| quantization.invalid(key, "a list of names is needed", "write [\"lm_head\"]"))?,
        };
        Ok(Some(Quantization { weight_block_size, activation_scheme, modules_to_not_convert }))
    }
}

fn block_size(value: &Value) -> Option<(usize, usize)> {
    match value.as_array()?.as_slice() {
        [rows, columns] => {
            let size = |value: &Value| {
                value.as_u64().filter(|size| (1..=1 << 31).contains(size)).map(|s| s as usize)
            };
            Some((size(rows)?, size(columns)?))
        }
        _ => None,
    }
}
