//! `adapter_config.json` of the `peft` library.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::targets::module_in_transformers;
use super::{Adapter, LoraTensors};
use crate::error::{Error, Result};
use crate::json;

/// Settings that do not change what a trained adapter computes.
const HARMLESS: &[&str] = &[
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_dora",
    "use_rslora",
];

/// What is needed of the file to use the matrices.
#[derive(Debug)]
pub(super) struct PeftConfig {
    pub(super) rank: usize,
    pub(super) alpha: f64,
    alpha_pattern: BTreeMap<String, f64>,
    use_rslora: bool,
    pub(super) use_dora: bool,
    pub(super) base_model: Option<String>,
}

impl PeftConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// A file that is no configuration of LoRA, or one with settings that are not read here, by name.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let value = json::read(path)?;
        let wrong =
            |key: &str, problem: String| Error::Adapter { file: path.into(), key: key.into(), problem };
        let Value::Object(entries) = value else {
            return Err(wrong("{}", "the file holds no settings".into()));
        };
        let get = |key: &str| entries.get(key).filter(|value| !value.is_null());
        if get("peft_type").and_then(Value::as_str) != Some("LORA") {
            let is = get("peft_type").map_or("absent".into(), Value::to_string);
            return Err(wrong("peft_type", format!("it is {is}; only LORA is read")));
        }
        for (key, value) in &entries {
            let is_off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            };
            if !is_off && !HARMLESS.contains(&key.as_str()) {
                return Err(wrong(key, format!("it is {value}, which is not supported")));
            }
        }
        if let Some(bias) = get("bias").and_then(Value::as_str).filter(|bias| *bias != "none") {
            return Err(wrong("bias", format!("it is {bias:?}; only \"none\" is supported")));
        }
        const OF_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];
        let init = get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if OF_THE_BASE.iter().any(|name| init.starts_with(name)) {
            let problem =
                format!("{init:?} changes the base model; convert the adapter to plain LoRA with peft");
            return Err(wrong("init_lora_weights", problem));
        }
        let rank = get("r").and_then(Value::as_u64).filter(|&rank| rank > 0);
        let rank = rank.ok_or_else(|| wrong("r", "a rank of 1 or more is needed".into()))?;
        let alpha = get("lora_alpha").and_then(Value::as_f64);
        let alpha = alpha.ok_or_else(|| wrong("lora_alpha", "a number is needed".into()))?;
        let mut alpha_pattern = BTreeMap::new();
        for (name, value) in get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            let value = value.as_f64().ok_or_else(|| wrong("alpha_pattern", format!("`{name}`: {value}")))?;
            if name.contains(|c: char| !c.is_alphanumeric() && !"._-".contains(c)) {
                let problem = format!("`{name}` is a regular expression; only plain names are read");
                return Err(wrong("alpha_pattern", problem));
            }
            alpha_pattern.insert(name.clone(), value);
        }
        let flag = |key| get(key).and_then(Value::as_bool).unwrap_or(false);
        Ok(Self {
            rank: rank as usize,
            alpha,
            alpha_pattern,
            use_rslora: flag("use_rslora"),
            use_dora: flag("use_dora"),
            base_model: get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
        })
    }

    /// The factor on `B A` of a module, named as in transformers.
    pub(super) fn scale(&self, module: &str, rank: usize) -> f64 {
        let is_named = |name: &str| module == name || module.ends_with(&format!(".{name}"));
        let named = self.alpha_pattern.iter().find(|(name, _)| is_named(name));
        let alpha = named.map_or(self.alpha, |(_, alpha)| *alpha);
        alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }
}

impl Adapter {
    /// The text of `adapter_config.json`.
    pub(super) fn peft_config(&self, multimodal: bool) -> Vec<u8> {
        let number = |value: f64| if value.fract() == 0.0 { json!(value as i64) } else { json!(value) };
        let (mut modules, mut parameters) = (Vec::new(), Vec::new());
        let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
        for (name, lora) in &self.modules {
            let name = module_in_transformers(name, multimodal);
            if lora.rank() != self.rank {
                rank_pattern.insert(name.clone(), json!(lora.rank()));
            }
            let alpha = lora.scale * lora.rank() as f64;
            if (alpha - self.alpha).abs() > 1e-9 * self.alpha.abs() {
                alpha_pattern.insert(name.clone(), number(alpha));
            }
            if lora.a.shape.len() == 3 { parameters.push(name) } else { modules.push(name) }
        }
        let is_dora = |lora: &LoraTensors| lora.magnitude.is_some();
        let mut config = json!({
            "task_type": "CAUSAL_LM",
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_model,
            "r": self.rank,
            "lora_alpha": number(self.alpha),
            "use_dora": self.modules.values().any(is_dora),
            "bias": "none",
            "inference_mode": true,
            "target_modules": modules,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        });
        if !parameters.is_empty() {
            config["target_parameters"] = json!(parameters);
        }
        format!("{config:#}\n").into_bytes()
    }
}
