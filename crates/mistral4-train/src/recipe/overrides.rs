//! `--a.b.c value`, `--a.b.c=value` and bare `--a.b.c` on the command line.

use std::sync::Arc;

use super::yaml::{self, Entry, Node, Scalar, Value};
use crate::error::{Error, Origin, Result};

/// One dotted override: the keys from the root down, and the value as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// `a.b.c`.
    pub key: String,
    /// The value, not yet typed.
    pub value: String,
}

/// Splits command-line arguments into overrides, as NeMo AutoModel's parser does.
///
/// `--a.b value` and `--a.b=value` set a value; `--a.b` with no value sets `true`.
///
/// # Errors
/// An argument that is not an option, and an option without a name.
pub fn parse_overrides(arguments: &[String]) -> Result<Vec<Override>> {
    let refuse = |argument: &String, message: &str| {
        Err(Error::Override { argument: argument.clone(), message: message.to_owned() })
    };
    let mut overrides = Vec::new();
    let mut arguments = arguments.iter().peekable();
    while let Some(argument) = arguments.next() {
        let Some(option) = argument.strip_prefix("--") else {
            return refuse(argument, "expected `--section.key value`");
        };
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, value.to_owned()),
            None => match arguments.next_if(|next| !next.starts_with("--")) {
                Some(value) => (option, value.clone()),
                None => (option, "true".to_owned()),
            },
        };
        if key.split('.').any(str::is_empty) {
            return refuse(argument, "a key is names joined by single dots");
        }
        if key.split('.').count() > yaml::MAX_DEPTH {
            return refuse(argument, "the key is nested too deeply");
        }
        overrides.push(Override { key: key.to_owned(), value });
    }
    Ok(overrides)
}

/// Sets one value in the tree, making sections on the way where there are none.
///
/// # Errors
/// A value that begins like a list or mapping but is not one.
pub(crate) fn apply(root: &mut Node, change: &Override) -> Result<()> {
    let node = typed(change)?;
    let mut here = root;
    for key in change.key.split('.') {
        if here.map().is_none() {
            here.value = Value::Map(Vec::new());
        }
        here.origin = Origin::Override;
        let Value::Map(entries) = &mut here.value else { unreachable!("made a mapping above") };
        let at = match entries.iter().position(|entry| entry.key == key) {
            Some(at) => at,
            None => {
                let node = Node { origin: Origin::Override, value: Value::Map(Vec::new()) };
                entries.push(Entry { key: key.to_owned(), origin: Origin::Override, node });
                entries.len() - 1
            }
        };
        here = &mut entries[at].node;
    }
    *here = node;
    Ok(())
}

/// Types a value: `[..]`, `(..)` and `{..}` are read as YAML flow text, all else is a scalar.
fn typed(change: &Override) -> Result<Node> {
    let text = change.value.trim();
    let flow = match text.chars().next() {
        Some('[' | '{') => text.to_owned(),
        Some('(') if text.ends_with(')') => format!("[{}]", &text[1..text.len() - 1]),
        _ => {
            let value = Value::Scalar(Scalar::new(change.value.clone()));
            return Ok(Node { origin: Origin::Override, value });
        }
    };
    let file = Arc::from("override");
    let parsed = yaml::parse(&file, format!("value: {flow}").as_bytes()).map_err(|error| {
        Error::Override { argument: format!("--{} {}", change.key, change.value), message: error.to_string() }
    })?;
    let Value::Map(mut entries) = parsed.value else { unreachable!("`value:` begins a mapping") };
    if entries.len() != 1 {
        let argument = format!("--{} {}", change.key, change.value);
        return Err(Error::Override { argument, message: "expected one value".to_owned() });
    }
    let mut node = entries.swap_remove(0).node;
    mark(&mut node);
    Ok(node)
}

fn mark(node: &mut Node) {
    node.origin = Origin::Override;
    match &mut node.value {
        Value::Scalar(_) => {}
        Value::List(items) => items.iter_mut().for_each(mark),
        Value::Map(entries) => entries.iter_mut().for_each(|entry| {
            entry.origin = Origin::Override;
            mark(&mut entry.node);
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strings(arguments: &[&str]) -> Vec<String> {
        arguments.iter().map(|&argument| argument.to_owned()).collect()
    }

    #[test]
    fn the_three_forms_are_read() {
        let overrides = parse_overrides(&strings(&["--a.b", "3", "--c=x=y", "--d.e", "--f", "-1"])).unwrap();
        let pairs: Vec<_> = overrides.iter().map(|o| (o.key.as_str(), o.value.as_str())).collect();
        assert_eq!(pairs, [("a.b", "3"), ("c", "x=y"), ("d.e", "true"), ("f", "-1")]);
    }

    #[test]
    fn stray_arguments_and_empty_names_are_refused() {
        assert!(parse_overrides(&strings(&["stray"])).is_err());
        assert!(parse_overrides(&strings(&["--", "x"])).is_err());
        assert!(parse_overrides(&strings(&["--a..b", "x"])).is_err());
        assert!(parse_overrides(&strings(&["--.a=x"])).is_err());
    }

    #[test]
    fn lists_and_tuples_are_typed() {
        for value in ["[0.9, 0.95]", "(0.9, 0.95)"] {
            let node = typed(&Override { key: "betas".to_owned(), value: value.to_owned() }).unwrap();
            assert_eq!(node.to_string(), "[0.9, 0.95]");
            assert_eq!(node.origin, Origin::Override);
        }
        assert!(typed(&Override { key: "betas".to_owned(), value: "[0.9".to_owned() }).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_overrides_never_panic(key in "[a-c.]{1,8}", value in "[\\[\\](){}a:, 0-9\n-]{0,24}") {
            let mut root = Node { origin: Origin::Line(1), value: Value::Map(Vec::new()) };
            if let Ok(overrides) = parse_overrides(&[format!("--{key}={value}")]) {
                for change in overrides {
                    let _ = apply(&mut root, &change);
                }
            }
        }
    }
}
