//! The model settings that a v15 tokenizer file offers.

use serde::Deserialize;

use crate::chat::ReasoningEffort;

/// Which model settings a model takes, and their defaults: `model_settings_builder` of `tekken.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettingsBuilder {
    /// The reasoning efforts on offer; none when the model has no such setting.
    #[serde(default)]
    pub reasoning_effort: Option<ReasoningEffortBuilder>,
    /// Whether a response format's JSON schema is rendered.
    #[serde(default)]
    pub json_schema: Option<JsonSchemaBuilder>,
}

/// The reasoning efforts on offer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReasoningEffortBuilder {
    /// Always `enum`.
    #[serde(default = "enum_type", rename = "type")]
    pub kind: String,
    /// The values a request may name.
    pub values: Vec<ReasoningEffort>,
    /// Always true: a request may leave the effort open.
    #[serde(default = "yes")]
    pub accepts_none: bool,
    /// The value used when a request names none.
    pub default: ReasoningEffort,
}

/// The JSON schema setting.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonSchemaBuilder {
    /// Always `json_schema`.
    #[serde(default = "json_schema_type", rename = "type")]
    pub kind: String,
    /// Always false: a request always has a response format.
    #[serde(default)]
    pub accepts_none: bool,
    /// Always absent.
    #[serde(default)]
    pub default: (),
}

fn enum_type() -> String {
    "enum".to_owned()
}

fn json_schema_type() -> String {
    "json_schema".to_owned()
}

fn yes() -> bool {
    true
}

impl ModelSettingsBuilder {
    /// The setting of Mistral Small 4: effort `none` (the default) or `high`.
    pub fn none_or_high() -> Self {
        Self {
            reasoning_effort: Some(ReasoningEffortBuilder {
                kind: enum_type(),
                values: vec![ReasoningEffort::None, ReasoningEffort::High],
                accepts_none: true,
                default: ReasoningEffort::None,
            }),
            json_schema: None,
        }
    }

    /// The key and reason of the first inconsistency.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        if let Some(builder) = &self.reasoning_effort {
            if builder.kind != "enum" {
                return Some((
                    "reasoning_effort.type",
                    format!("expected \"enum\", found {:?}", builder.kind),
                ));
            }
            if !builder.accepts_none {
                return Some(("reasoning_effort.accepts_none", "must be true".to_owned()));
            }
            if !builder.values.contains(&builder.default) {
                return Some((
                    "reasoning_effort.default",
                    format!("{} is not among the values", builder.default),
                ));
            }
            for (index, value) in builder.values.iter().enumerate() {
                if builder.values[..index].contains(value) {
                    return Some(("reasoning_effort.values", format!("{value} is there twice")));
                }
            }
        }
        if let Some(builder) = &self.json_schema {
            if builder.kind != "json_schema" {
                return Some((
                    "json_schema.type",
                    format!("expected \"json_schema\", found {:?}", builder.kind),
                ));
            }
            if builder.accepts_none {
                return Some(("json_schema.accepts_none", "must be false".to_owned()));
            }
        }
        None
    }
}
