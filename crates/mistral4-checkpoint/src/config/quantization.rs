//! `quantization_config`: how a checkpoint's weights are stored.

use serde_json::{Value, json};

use super::fields::Fields;
use crate::error::Result;

/// How a checkpoint's quantised weights are stored.
///
/// The shapes stored decide how a weight is read; this is kept to be shown and written back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quantization {
    /// FP8 weights with scales.
    Fp8(Fp8Quantization),
    /// Integer codes packed into 32-bit words, the form `pack-quantized` of the compressed-tensors library.
    Packed(Vec<PackedGroup>),
}

/// Modules that are coded in the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedGroup {
    /// Bits of a code: 4 or 8.
    pub bits: usize,
    /// Neighbouring columns that share a scale; `None`: all of a row.
    pub group_size: Option<usize>,
    /// Whether there are no zero points.
    pub symmetric: bool,
}

/// FP8 weights with scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fp8Quantization {
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

impl Fp8Quantization {
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
        Fp8Quantization {
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

    /// Parses an object whose `quant_method` is `fp8`.
    fn parse(quantization: &Fields<'_>) -> Result<Self> {
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
        Ok(Fp8Quantization { weight_block_size, activation_scheme, modules_to_not_convert })
    }
}

impl Quantization {
    /// Parses `quantization_config`, if there is one.
    pub(super) fn parse(fields: &Fields<'_>) -> Result<Option<Self>> {
        let Some(quantization) = fields.object("quantization_config")? else { return Ok(None) };
        match quantization.text("quant_method")? {
            Some("fp8") => Fp8Quantization::parse(&quantization).map(Quantization::Fp8).map(Some),
            Some("compressed-tensors") => packed_groups(&quantization).map(Quantization::Packed).map(Some),
            Some(_) => Err(quantization.invalid(
                "quant_method",
                "this quantization is not implemented",
                "use a checkpoint in fp8, compressed-tensors (pack-quantized), bf16, f16 or f32",
            )),
            None => Err(quantization.invalid(
                "quant_method",
                "the key is required",
                "this library reads fp8 and compressed-tensors",
            )),
        }
    }
}

/// Reads `config_groups` of the compressed-tensors library.
fn packed_groups(quantization: &Fields<'_>) -> Result<Vec<PackedGroup>> {
    quantization.only(
        "format",
        &[json!("pack-quantized")],
        "this format is not implemented",
        "use a checkpoint in the format pack-quantized",
    )?;
    let groups = quantization.object("config_groups")?;
    let Some(groups) = groups.filter(|groups| !groups.keys().is_empty()) else {
        return Err(quantization.invalid(
            "config_groups",
            "a group is required",
            "say how weights are coded",
        ));
    };
    groups.keys().into_iter().map(|name| packed_group(&groups, name)).collect()
}

fn packed_group(groups: &Fields<'_>, name: &str) -> Result<PackedGroup> {
    let group = groups.object(name)?;
    let weights = group.as_ref().map(|group| group.object("weights")).transpose()?.flatten();
    let (Some(group), Some(weights)) = (group, weights) else {
        return Err(groups.invalid(name, "the group has no weights", "say how weights are coded"));
    };
    group.only(
        "input_activations",
        &[],
        "only weights may be quantised",
        "use a W4A16 or W8A16 checkpoint",
    )?;
    weights.only("type", &[json!("int")], "only integer codes are implemented", "use int")?;
    weights.only("dynamic", &[json!(false)], "weights are not quantised as they come", "use false")?;
    weights.only(
        "actorder",
        &[json!("weight"), json!("static"), json!(false)],
        "groups of columns in another order are not implemented",
        "quantise without actorder, or with static",
    )?;
    let bits = weights.required_size("num_bits")?;
    if ![4, 8].contains(&bits) {
        return Err(weights.invalid("num_bits", "this width is not implemented", "use 4 or 8"));
    }
    let group_size = match weights.text("strategy")? {
        Some("group") => Some(weights.required_size("group_size")?),
        Some("channel") => None,
        _ => {
            return Err(weights.invalid(
                "strategy",
                "this strategy is not implemented",
                "use group or channel",
            ));
        }
    };
    Ok(PackedGroup { bits, group_size, symmetric: weights.flag("symmetric", true)? })
}

/// The `quantization_config` of packed integer weights: `groups` with the modules they are for, and the modules left as
/// they are.
///
/// Source: `QuantizationConfig` of the compressed-tensors library.
pub(crate) fn packed_json(groups: &[(&str, PackedGroup)], ignore: &[&str]) -> Value {
    let group = |(target, group): &(&str, PackedGroup)| {
        json!({
            "format": "pack-quantized",
            "input_activations": null,
            "output_activations": null,
            "targets": [target],
            "weights": {
                "actorder": null,
                "block_structure": null,
                "dynamic": false,
                "group_size": group.group_size,
                "num_bits": group.bits,
                "observer": "mse",
                "observer_kwargs": {},
                "strategy": if group.group_size.is_some() { "group" } else { "channel" },
                "symmetric": group.symmetric,
                "type": "int",
            },
        })
    };
    let groups: serde_json::Map<String, Value> =
        groups.iter().enumerate().map(|(i, entry)| (format!("group_{i}"), group(entry))).collect();
    json!({
        "config_groups": groups,
        "format": "pack-quantized",
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    })
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
