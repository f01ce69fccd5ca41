//! YAML into a tree that remembers lines, with limits that keep hostile input small.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use saphyr_parser::{Event, Parser, ScalarStyle};

use super::reader::{HIDDEN, is_secret};
use crate::error::{Error, Location, Origin, Result};

/// Longest recipe, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// Deepest nesting.
pub(super) const MAX_DEPTH: usize = 32;
/// Most nodes, counted after aliases are followed, so that aliases of aliases cannot explode.
const MAX_NODES: usize = 50_000;

/// A value of a recipe, with the place where it was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) origin: Origin,
    pub(crate) value: Value,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Scalar(Scalar),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One key of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) origin: Origin,
    pub(crate) node: Node,
}

/// A scalar: its text, and what the text says when it is taken as a literal.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scalar {
    /// The text, environment variables expanded.
    pub(crate) text: String,
    /// The text as written; shown in place of `text`, so that secrets stay unprinted.
    pub(crate) written: String,
    pub(crate) literal: Literal,
}

/// A scalar's typed reading.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Literal {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text,
}

impl Scalar {
    /// Types a text as NeMo AutoModel's `translate_value` does: `none`, booleans, numbers, else text.
    pub(crate) fn new(text: String) -> Self {
        let literal = Literal::of(&text);
        Self { written: text.clone(), text, literal }
    }
}

impl Literal {
    fn of(text: &str) -> Self {
        match text {
            "" | "~" | "null" | "Null" | "NULL" | "none" | "None" => return Self::Null,
            "true" | "True" | "TRUE" => return Self::Bool(true),
            "false" | "False" | "FALSE" => return Self::Bool(false),
            _ => {}
        }
        // Python allows `_` between digits; `inf`, `nan` and words must stay text.
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            return Self::Text;
        }
        let plain = text.replace('_', "");
        if let Ok(int) = plain.parse::<i64>() {
            return Self::Int(int);
        }
        match plain.parse::<f64>() {
            Ok(float) if float.is_finite() => Self::Float(float),
            _ => Self::Text,
        }
    }
}

impl Node {
    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar(scalar) if scalar.literal == Literal::Null)
    }

    pub(crate) fn map(&self) -> Option<&[Entry]> {
        match &self.value {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }
}

/// One line that shows a value, shortened where it is long.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Value::Scalar(scalar) if scalar.written.chars().count() > 120 => {
                write!(f, "{}...", scalar.written.chars().take(120).collect::<String>())
            }
            Value::Scalar(scalar) => f.write_str(&scalar.written),
            Value::List(items) if items.len() > 8 => write!(f, "[{} values]", items.len()),
            Value::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        f.write_str(", ")?;
                    }
                    write!(f, "{item}")?;
                }
                f.write_str("]")
            }
            Value::Map(entries) => {
                let keys: Vec<_> = entries.iter().map(|entry| entry.key.as_str()).take(8).collect();
                write!(f, "{{{}}}", keys.join(", "))
            }
        }
    }
}

/// Parses one YAML document.
///
/// # Errors
/// Bytes that are not UTF-8 or not YAML, more than one document, duplicate keys, keys that are not plain text,
/// and documents over the limits of size, depth and node count.
pub(crate) fn parse(file: &Arc<str>, bytes: &[u8]) -> Result<Node> {
    let at = |line: usize| Location { file: file.clone(), origin: Origin::Line(line) };
    let refuse = |line: usize, message: String| Err(Error::Yaml { location: at(line), message });
    if bytes.len() > MAX_BYTES {
        return refuse(1, format!("the recipe is {} bytes long; at most {MAX_BYTES} are read", bytes.len()));
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&b| b == b'\n').count();
            return refuse(line, "not UTF-8 text".to_owned());
        }
    };
    Builder { file: file.clone(), open: Vec::new(), anchors: HashMap::new(), nodes: 0, root: None }.run(text)
}

/// Builds the tree from parser events without recursion, so that depth is bounded before anything is built.
struct Builder {
    file: Arc<str>,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
}

/// A list or mapping whose end has not come yet.
struct Open {
    line: usize,
    anchor: usize,
    key: Option<(String, usize)>,
    value: Value,
}

impl Builder {
    fn run(mut self, text: &str) -> Result<Node> {
        let mut documents = 0;
        for event in Parser::new_from_str(text) {
            let (event, span) = match event {
                Ok(event) => event,
                Err(error) => {
                    return self.refuse(error.marker().line(), format!("not YAML: {}", error.info()));
                }
            };
            let line = span.start.line();
            match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        return self
                            .refuse(line, "a recipe is one YAML document; a second one begins".to_owned());
                    }
                }
                Event::Scalar(text, style, anchor, _) => {
                    let scalar = match style {
                        ScalarStyle::Plain => Scalar::new(text.into_owned()),
                        // An empty quoted string is a string; other quoted scalars are typed as NeMo types them.
                        _ if text.is_empty() => {
                            Scalar { text: String::new(), written: String::new(), literal: Literal::Text }
                        }
                        _ => Scalar::new(text.into_owned()),
                    };
                    self.place(line, anchor, Value::Scalar(scalar))?;
                }
                Event::SequenceStart(anchor, _) => self.begin(line, anchor, Value::List(Vec::new()))?,
                Event::MappingStart(anchor, _) => self.begin(line, anchor, Value::Map(Vec::new()))?,
                Event::SequenceEnd | Event::MappingEnd => {
                    if let Some(open) = self.open.pop() {
                        self.place(open.line, open.anchor, open.value)?;
                    }
                }
                Event::Alias(anchor) => {
                    let Some(node) = self.anchors.get(&anchor).cloned() else {
                        return self.refuse(line, "an alias inside of its own anchor".to_owned());
                    };
                    self.count(line, size(&node))?;
                    if self.open.len() + depth(&node) > MAX_DEPTH {
                        return self.refuse(line, format!("nested deeper than {MAX_DEPTH} levels"));
                    }
                    self.place(line, 0, node.value)?;
                }
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            }
        }
        match self.root.take() {
            Some(root) if root.map().is_some() => Ok(root),
            _ => self.refuse(1, "a recipe is a mapping of sections".to_owned()),
        }
    }

    fn begin(&mut self, line: usize, anchor: usize, value: Value) -> Result<()> {
        if self.open.len() >= MAX_DEPTH {
            return self.refuse(line, format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.open.push(Open { line, anchor, key: None, value });
        Ok(())
    }

    /// Puts a finished node where it belongs: a key or a value of the open mapping, an item, or the root.
    fn place(&mut self, line: usize, anchor: usize, value: Value) -> Result<()> {
        self.count(line, 1)?;
        let node = Node { origin: Origin::Line(line), value };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.value {
            Value::List(items) => items.push(node),
            Value::Map(entries) => match open.key.take() {
                Some((key, line)) => entries.push(Entry { key, origin: Origin::Line(line), node }),
                None => {
                    let Value::Scalar(scalar) = node.value else {
                        return self.refuse(line, "a key must be plain text".to_owned());
                    };
                    if entries.iter().any(|entry| entry.key == scalar.text) {
                        return self.refuse(line, format!("the key `{}` appears twice", scalar.text));
                    }
                    open.key = Some((scalar.text, line));
                }
            },
            Value::Scalar(_) => unreachable!("only lists and mappings are opened"),
        }
        Ok(())
    }

    fn count(&mut self, line: usize, nodes: usize) -> Result<()> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MAX_NODES {
            return self.refuse(line, format!("more than {MAX_NODES} values once aliases are followed"));
        }
        Ok(())
    }

    fn refuse<T>(&self, line: usize, message: String) -> Result<T> {
        let location = Location { file: self.file.clone(), origin: Origin::Line(line) };
        Err(Error::Yaml { location, message })
    }
}

fn children(node: &Node) -> Box<dyn Iterator<Item = &Node> + '_> {
    match &node.value {
        Value::Scalar(_) => Box::new(std::iter::empty()),
        Value::List(items) => Box::new(items.iter()),
        Value::Map(entries) => Box::new(entries.iter().map(|entry| &entry.node)),
    }
}

/// Nodes in a tree; trees are at most `MAX_DEPTH` deep.
fn size(node: &Node) -> usize {
    1 + children(node).map(size).sum::<usize>()
}

fn depth(node: &Node) -> usize {
    match node.value {
        Value::Scalar(_) => 0,
        _ => 1 + children(node).map(depth).max().unwrap_or(0),
    }
}

/// Writes a tree as YAML, every scalar as it was written, secrets hidden.
pub(crate) fn write(root: &Node) -> String {
    let mut out = String::new();
    write_node(root, 0, &mut out);
    out
}

fn write_node(node: &Node, indent: usize, out: &mut String) {
    let pad = |out: &mut String| out.push_str(&" ".repeat(indent));
    match &node.value {
        Value::Scalar(scalar) => {
            out.push_str(&written_scalar(scalar));
            out.push('\n');
        }
        Value::List(items) if items.is_empty() => out.push_str("[]\n"),
        Value::Map(entries) if entries.is_empty() => out.push_str("{}\n"),
        Value::List(items) => {
            for item in items {
                pad(out);
                out.push('-');
                write_child(item, indent, out);
            }
        }
        Value::Map(entries) => {
            for entry in entries {
                pad(out);
                out.push_str(&written_scalar(&Scalar {
                    literal: Literal::Text,
                    ..Scalar::new(entry.key.clone())
                }));
                out.push(':');
                match is_secret(&entry.key) {
                    true => out.push_str(&format!(" \"{HIDDEN}\"\n")),
                    false => write_child(&entry.node, indent, out),
                }
            }
        }
    }
}

fn write_child(node: &Node, indent: usize, out: &mut String) {
    let nested = match &node.value {
        Value::Scalar(_) => false,
        Value::List(items) => !items.is_empty(),
        Value::Map(entries) => !entries.is_empty(),
    };
    out.push(if nested { '\n' } else { ' ' });
    write_node(node, if nested { indent + 2 } else { 0 }, out);
}

/// Plain words stay plain, all else becomes a double-quoted string; quoted scalars are typed all the same.
fn written_scalar(scalar: &Scalar) -> String {
    let word = |c: char| c.is_ascii_alphanumeric() || "_./+$".contains(c);
    let text = &scalar.written;
    let plain = text.starts_with(word) && text.chars().all(|c| word(c) || c == '-');
    if plain {
        return text.clone();
    }
    if scalar.literal == Literal::Null {
        return "null".to_owned();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() || c == '\u{feff}' || c == '\u{2028}' || c == '\u{2029}' => {
                quoted.push_str(&format!("\\U{:08X}", u32::from(c)));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Node> {
        parse(&Arc::from("r.yaml"), text.as_bytes())
    }

    #[test]
    fn literals_are_typed_as_nemo_types_them() {
        for (text, literal) in [
            ("1e-5", Literal::Float(1e-5)),
            ("1.0e-3", Literal::Float(1e-3)),
            ("10", Literal::Int(10)),
            ("-3", Literal::Int(-3)),
            ("1_000", Literal::Int(1000)),
            (".5", Literal::Float(0.5)),
            ("none", Literal::Null),
            ("True", Literal::Bool(true)),
            ("1:30", Literal::Text),
            ("infinity", Literal::Text),
            ("-", Literal::Text),
            ("1e999", Literal::Text),
            ("yes", Literal::Text),
        ] {
            assert_eq!(Literal::of(text), literal, "{text}");
        }
    }

    #[test]
    fn lines_are_remembered() {
        let root = read("# note\na: 1\nb:\n  c: [x, y]\n").unwrap();
        let entries = root.map().unwrap();
        assert_eq!(entries[0].origin, Origin::Line(2));
        assert_eq!(entries[1].node.map().unwrap()[0].origin, Origin::Line(4));
    }

    #[test]
    fn laughing_aliases_are_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
        for i in 1..9 {
            let row = vec![format!("*a{}", i - 1); 9].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{row}]\n"));
        }
        assert!(read(&text).unwrap_err().to_string().contains("once aliases are followed"));
    }

    #[test]
    fn deep_nesting_is_refused() {
        let nested = |levels: usize| format!("a: {}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(read(&nested(30)).is_ok());
        assert!(read(&nested(40)).unwrap_err().to_string().contains("nested deeper than 32 levels"));
        assert!(read(&nested(100_000)).is_err());
    }

    #[test]
    fn duplicate_keys_second_documents_and_lists_are_refused() {
        assert!(
            read("a: 1\na: 2\n").unwrap_err().to_string().contains("r.yaml:2: the key `a` appears twice")
        );
        assert!(read("a: 1\n---\nb: 2\n").unwrap_err().to_string().contains("one YAML document"));
        assert!(read("- 1\n").unwrap_err().to_string().contains("mapping of sections"));
        assert!(read("").unwrap_err().to_string().contains("mapping of sections"));
        assert!(read("a: &x [*x]\n").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&Arc::from("r.yaml"), &bytes);
        }

        #[test]
        fn what_is_written_reads_back_the_same(text in "[a-c:&*!|>%@`\"'{}\\[\\],#\\- \n\t0-9.$]{0,60}") {
            if let Ok(root) = parse(&Arc::from("r.yaml"), text.as_bytes()) {
                let written = write(&root);
                let again = parse(&Arc::from("again.yaml"), written.as_bytes());
                prop_assert!(again.is_ok(), "{written}: {again:?}");
                prop_assert_eq!(write(&again.unwrap()), written);
            }
        }

        #[test]
        fn yaml_like_text_never_panics(text in "[a-c:&*!|>%@`\"'{}\\[\\],#\\- \n\t0-9.$]{0,200}") {
            let _ = parse(&Arc::from("r.yaml"), text.as_bytes());
        }
    }
}
