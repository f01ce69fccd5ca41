//! Whether a JSON value is a JSON schema of draft 7.
//!
//! Source: <http://json-schema.org/draft-07/schema#>, the meta schema, as Python's `jsonschema` applies it (with its
//! `regex` format check; it has no check for `uri` and `uri-reference` without extra packages).

use super::python_regex;
use crate::json::Json;

/// What a keyword's value must be.
enum Rule {
    String,
    Regex,
    Boolean,
    Number,
    PositiveNumber,
    Count,
    List,
    Schema,
    Schemas,
    SchemaOrSchemas,
    SchemaByName,
    SchemaByPattern,
    Dependencies,
    UniqueStrings,
    Type,
}

fn rule(keyword: &str) -> Option<Rule> {
    Some(match keyword {
        "$id" | "$schema" | "$ref" | "$comment" | "title" | "description" | "format" | "contentMediaType"
        | "contentEncoding" => Rule::String,
        "pattern" => Rule::Regex,
        "readOnly" | "uniqueItems" => Rule::Boolean,
        "maximum" | "exclusiveMaximum" | "minimum" | "exclusiveMinimum" => Rule::Number,
        "multipleOf" => Rule::PositiveNumber,
        "maxLength" | "minLength" | "maxItems" | "minItems" | "maxProperties" | "minProperties" => {
            Rule::Count
        }
        "examples" | "enum" => Rule::List,
        "additionalItems"
        | "contains"
        | "additionalProperties"
        | "propertyNames"
        | "if"
        | "then"
        | "else"
        | "not" => Rule::Schema,
        "allOf" | "anyOf" | "oneOf" => Rule::Schemas,
        "items" => Rule::SchemaOrSchemas,
        "definitions" | "properties" => Rule::SchemaByName,
        "patternProperties" => Rule::SchemaByPattern,
        "dependencies" => Rule::Dependencies,
        "required" => Rule::UniqueStrings,
        "type" => Rule::Type,
        _ => return None,
    })
}

/// The first way in which the value is not a schema, or nothing if it is one.
pub(super) fn problem(schema: &Json) -> Option<String> {
    match schema {
        Json::Bool(_) => None,
        Json::Object(keywords) => keywords.iter().find_map(|(keyword, value)| {
            let found = rule(keyword).and_then(|rule| broken(&rule, value));
            found.map(|reason| format!("`{keyword}`: {reason}"))
        }),
        other => Some(format!("{} is not of type 'object', 'boolean'", other.dump())),
    }
}

fn broken(rule: &Rule, value: &Json) -> Option<String> {
    let expected = |holds: bool, what: &str| (!holds).then(|| format!("{} is not {what}", value.dump()));
    match rule {
        Rule::String => expected(matches!(value, Json::String(_)), "of type 'string'"),
        Rule::Regex => match value {
            Json::String(pattern) => python_regex::problem(pattern),
            _ => expected(false, "of type 'string'"),
        },
        Rule::Boolean => expected(matches!(value, Json::Bool(_)), "of type 'boolean'"),
        Rule::Number => expected(number(value).is_some(), "of type 'number'"),
        Rule::PositiveNumber => {
            expected(number(value).is_some_and(|number| number > 0.0), "a number above 0")
        }
        Rule::Count => {
            let holds = number(value).is_some_and(|number| number >= 0.0 && number.fract() == 0.0);
            expected(holds, "a non-negative integer")
        }
        Rule::List => expected(matches!(value, Json::Array(_)), "of type 'array'"),
        Rule::Schema => problem(value),
        Rule::Schemas => match value {
            Json::Array(schemas) if !schemas.is_empty() => schemas.iter().find_map(problem),
            _ => expected(false, "a non-empty list of schemas"),
        },
        Rule::SchemaOrSchemas => match value {
            Json::Array(_) => broken(&Rule::Schemas, value),
            _ => problem(value),
        },
        Rule::SchemaByName => match value {
            Json::Object(schemas) => schemas.values().find_map(problem),
            _ => expected(false, "of type 'object'"),
        },
        Rule::SchemaByPattern => match value {
            Json::Object(schemas) => schemas
                .keys()
                .find_map(|pattern| python_regex::problem(pattern))
                .or_else(|| schemas.values().find_map(problem)),
            _ => expected(false, "of type 'object'"),
        },
        Rule::Dependencies => match value {
            Json::Object(dependencies) => dependencies.values().find_map(|dependency| match dependency {
                Json::Array(_) => broken(&Rule::UniqueStrings, dependency),
                schema => problem(schema),
            }),
            _ => expected(false, "of type 'object'"),
        },
        Rule::UniqueStrings => expected(unique_strings(value, |_| true), "a list of different strings"),
        Rule::Type => {
            let holds = match value {
                Json::String(name) => is_type(name),
                Json::Array(names) => !names.is_empty() && unique_strings(value, is_type),
                _ => false,
            };
            expected(holds, "valid under any of the given schemas")
        }
    }
}

/// The value of a number. Integers far beyond a float's range keep their sign, which is all that the rules ask for.
fn number(value: &Json) -> Option<f64> {
    match value {
        Json::Integer(digits) => digits.parse().ok(),
        Json::Float(number) => Some(*number),
        _ => None,
    }
}

fn is_type(name: &str) -> bool {
    matches!(name, "array" | "boolean" | "integer" | "null" | "number" | "object" | "string")
}

fn unique_strings(value: &Json, allowed: impl Fn(&str) -> bool) -> bool {
    let Json::Array(items) = value else { return false };
    let mut seen = std::collections::HashSet::new();
    items.iter().all(|item| item.as_str().is_some_and(|text| allowed(text) && seen.insert(text)))
}
