//! `${VAR}`, `${VAR,default}`, `${oc.env:VAR}` and `$VAR` inside of a recipe's text.

use std::sync::Arc;

use super::yaml::{Node, Scalar, Value};
use crate::error::{Error, Location, Result};

/// Expands every variable of a tree; what is printed later stays as written.
///
/// # Errors
/// A variable that is not set and has no default.
pub(crate) fn expand(
    file: &Arc<str>,
    root: &mut Node,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<()> {
    Expander { file, lookup }.node(root, &mut String::new())
}

struct Expander<'a> {
    file: &'a Arc<str>,
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl Expander<'_> {
    fn node(&self, node: &mut Node, key: &mut String) -> Result<()> {
        let length = key.len();
        match &mut node.value {
            Value::Scalar(scalar) if scalar.text.contains('$') => {
                let text = self.text(&scalar.text).map_err(|variable| Error::MissingVariable {
                    location: Location { file: self.file.clone(), origin: node.origin },
                    key: key.clone(),
                    variable,
                })?;
                if text != scalar.text {
                    *scalar = Scalar { written: scalar.written.clone(), ..Scalar::new(text) };
                }
            }
            Value::Scalar(_) => {}
            Value::List(items) => {
                for (i, item) in items.iter_mut().enumerate() {
                    key.push_str(&format!(".{i}"));
                    self.node(item, key)?;
                    key.truncate(length);
                }
            }
            Value::Map(entries) => {
                for entry in entries {
                    if !key.is_empty() {
                        key.push('.');
                    }
                    key.push_str(&entry.key);
                    self.node(&mut entry.node, key)?;
                    key.truncate(length);
                }
            }
        }
        Ok(())
    }

    /// Replaces the variables of one text; the error is the name of the variable that is not set.
    fn text(&self, text: &str) -> std::result::Result<String, String> {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(dollar) = rest.find('$') {
            out.push_str(&rest[..dollar]);
            rest = &rest[dollar + 1..];
            if let Some((inside, after)) = rest.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
                let inside = inside.trim();
                let inside = inside.strip_prefix("oc.env:").unwrap_or(inside);
                let (name, default) = match inside.split_once(',') {
                    Some((name, default)) => (name.trim(), Some(default.trim().to_owned())),
                    None => (inside.trim(), None),
                };
                out.push_str(&(self.lookup)(name).or(default).ok_or_else(|| name.to_owned())?);
                rest = after;
            } else {
                let length = name_length(rest);
                if length == 0 {
                    out.push('$');
                } else {
                    out.push_str(&(self.lookup)(&rest[..length]).ok_or_else(|| rest[..length].to_owned())?);
                    rest = &rest[length..];
                }
            }
        }
        out.push_str(rest);
        Ok(out)
    }
}

/// Bytes of a leading `name` or `name.with.dots`.
fn name_length(text: &str) -> usize {
    let word = |text: &str| text.bytes().take_while(|&b| b.is_ascii_alphanumeric() || b == b'_').count();
    if !text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        return 0;
    }
    let mut length = word(text);
    while text[length..].starts_with('.') {
        match word(&text[length + 1..]) {
            0 => break,
            more => length += 1 + more,
        }
    }
    length
}

#[cfg(test)]
mod tests {
    use super::super::yaml::{self, Literal};
    use super::*;
    use proptest::prelude::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "DATA" => Some("/data".to_owned()),
            "STEPS" => Some("30".to_owned()),
            _ => None,
        }
    }

    fn expanded(text: &str) -> Result<String> {
        let file = Arc::from("r.yaml");
        let mut root = yaml::parse(&file, format!("a:\n  b: {text}\n").as_bytes())?;
        expand(&file, &mut root, &lookup)?;
        let Value::Scalar(scalar) = &root.map().unwrap()[0].node.map().unwrap()[0].node.value else {
            panic!()
        };
        Ok(scalar.text.clone())
    }

    #[test]
    fn every_form_expands() {
        for (text, want) in [
            ("${DATA}/x", "/data/x"),
            ("$DATA/x", "/data/x"),
            ("${oc.env:DATA}", "/data"),
            ("${NOPE,fallback}", "fallback"),
            ("${oc.env:NOPE, a b}", "a b"),
            ("cost $ 5", "cost $ 5"),
            ("a${STEPS}b$STEPS.", "a30b30."),
        ] {
            assert_eq!(expanded(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn values_are_typed_after_expansion_and_shown_before_it() {
        let file = Arc::from("r.yaml");
        let mut root = yaml::parse(&file, b"steps: ${STEPS}").unwrap();
        expand(&file, &mut root, &lookup).unwrap();
        let node = &root.map().unwrap()[0].node;
        let Value::Scalar(scalar) = &node.value else { panic!() };
        assert_eq!(scalar.literal, Literal::Int(30));
        assert_eq!(node.to_string(), "${STEPS}");
    }

    #[test]
    fn a_missing_variable_is_named_with_its_key() {
        let message = expanded("${NOPE}").unwrap_err().to_string();
        assert!(message.starts_with("r.yaml:2: `a.b` needs the environment variable NOPE"), "{message}");
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[${}A-Z.,: é]{0,40}") {
            let _ = Expander { file: &Arc::from("r"), lookup: &lookup }.text(&text);
        }
    }
}
