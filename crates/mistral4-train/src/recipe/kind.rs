//! What the value of a recipe's key may be.

use serde_json::{Value, json};

/// Kinds of values. The reader checks them, the schema describes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Bool,
    Whole {
        least: usize,
        most: Option<usize>,
    },
    NonNegative,
    Text,
    /// One text or several.
    Texts,
    /// Two numbers in `[0, 1)`.
    Pair,
    /// One of these.
    Name(Vec<&'static str>),
    Section,
    /// Whatever it is, it is not looked at.
    Anything,
}

/// A key that the reader asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Dotted name of the section.
    pub(crate) section: String,
    /// The section's `_target_`.
    pub(crate) target: Option<String>,
    pub(crate) key: String,
    pub(crate) kind: Kind,
    /// What the key does.
    pub(crate) what: String,
}

impl Kind {
    /// What an error says that it expected.
    pub(crate) fn expected(&self) -> String {
        match self {
            Self::Bool => "true or false".to_owned(),
            Self::Whole { least, most: None } => format!("a whole number, {least} or more"),
            Self::Whole { least, most: Some(most) } => format!("a whole number from {least} to {most}"),
            Self::NonNegative => "a number, 0 or more".to_owned(),
            Self::Text => "text".to_owned(),
            Self::Texts => "text or a list of texts".to_owned(),
            Self::Pair => "two numbers from 0 up to, not including, 1".to_owned(),
            Self::Name(_) => "a name".to_owned(),
            Self::Section => "a section (a mapping)".to_owned(),
            Self::Anything => "anything".to_owned(),
        }
    }

    /// The values as alternatives of a JSON schema; a section's own keys are not in it.
    ///
    /// A text with a `$` may stand for any scalar, as an environment variable may hold it.
    pub(super) fn schemas(&self) -> Vec<Value> {
        let variable = || json!({"type": "string", "pattern": "\\$"});
        let text = json!({"type": ["string", "number", "boolean"]});
        match self {
            Self::Bool => vec![json!({"type": "boolean"}), variable()],
            Self::Whole { least, most } => {
                let mut number = json!({"type": "integer", "minimum": least});
                if let Some(most) = most {
                    number["maximum"] = json!(most);
                }
                vec![number, variable()]
            }
            Self::NonNegative => vec![json!({"type": "number", "minimum": 0}), variable()],
            Self::Text => vec![text],
            Self::Texts => vec![text.clone(), json!({"type": "array", "items": text})],
            Self::Pair => {
                let number = json!({"anyOf": [
                    {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, variable()
                ]});
                vec![json!({"type": "array", "items": number, "minItems": 2, "maxItems": 2})]
            }
            Self::Name(names) => {
                // `true` in YAML is a boolean, and a name all the same.
                let literal = |name: &&str| match *name {
                    "true" => Some(json!(true)),
                    "false" => Some(json!(false)),
                    _ => None,
                };
                let names: Vec<Value> =
                    names.iter().map(|name| json!(name)).chain(names.iter().filter_map(literal)).collect();
                let target = json!({
                    "type": "object",
                    "properties": {"_target_": {"enum": names}},
                    "required": ["_target_"],
                    "additionalProperties": false
                });
                vec![json!({"enum": names}), target, variable()]
            }
            Self::Section => vec![json!({"type": "object"})],
            Self::Anything => vec![json!({})],
        }
    }
}
