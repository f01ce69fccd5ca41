//! Reads a section key by key, so that what is left over is unknown and what was read is reported.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;

use super::kind::{Asked, Kind};
use super::report::{Effect, RecipeReport, ReportEntry};
use super::yaml::{Entry, Literal, Node, Value};
use crate::error::{AcceptedNames, Error, Location, Origin, Result};

/// Parts of key names whose values are never printed.
const SECRET: [&str; 6] = ["token", "secret", "password", "api_key", "apikey", "credential"];

/// What is printed in place of a secret.
pub(crate) const HIDDEN: &str = "******";

/// The recipe that is being read.
pub(crate) struct Reading {
    pub(crate) file: Arc<str>,
    pub(crate) report: RefCell<RecipeReport>,
    /// Every key that was asked for, where somebody wants to know.
    pub(crate) asked: Option<RefCell<Vec<Asked>>>,
}

/// One mapping of a recipe. Every key that is asked for counts as known.
pub(crate) struct Section<'a> {
    reading: &'a Reading,
    path: String,
    origin: Origin,
    entries: &'a [Entry],
    known: Vec<String>,
}

impl<'a> Section<'a> {
    pub(crate) fn root(reading: &'a Reading, root: &'a Node) -> Self {
        let entries = root.map().unwrap_or_default();
        Self { reading, path: String::new(), origin: root.origin, entries, known: Vec::new() }
    }

    /// Dotted name of a key of this section.
    pub(crate) fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The value of a key, `None` when absent or null; the key counts as known from now on.
    fn look(&mut self, key: &str, kind: &Kind, what: &str) -> Option<&'a Node> {
        self.known.push(key.to_owned());
        self.note_asked(key, kind, what);
        let node = self.entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node);
        node.filter(|node| !node.is_null())
    }

    fn note_asked(&self, key: &str, kind: &Kind, what: &str) {
        if let Some(asked) = &self.reading.asked {
            let (section, target) = (self.path.clone(), self.target());
            let (key, kind, what) = (key.to_owned(), kind.clone(), what.to_owned());
            asked.borrow_mut().push(Asked { section, target, key, kind, what });
        }
    }

    /// What this section says that it is.
    fn target(&self) -> Option<String> {
        let entry = self.entries.iter().find(|entry| entry.key == "_target_")?;
        scalar_text(&entry.node)
    }

    fn location(&self, node: &Node) -> Location {
        Location { file: self.reading.file.clone(), origin: node.origin }
    }

    fn note(&self, key: &str, node: &Node, effect: Effect) {
        let key = self.key(key);
        let value = if is_secret(&key) { HIDDEN.to_owned() } else { node.to_string() };
        let entry = ReportEntry { key, value, location: self.location(node), effect };
        self.reading.report.borrow_mut().entries.push(entry);
    }

    /// An error about a value of this section.
    pub(crate) fn wrong(&self, key: &str, node: &Node, expected: impl Into<String>) -> Error {
        Error::Value {
            location: self.location(node),
            key: self.key(key),
            value: if is_secret(key) { HIDDEN.to_owned() } else { node.to_string() },
            expected: expected.into(),
        }
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        what: &'static str,
        kind: Kind,
        take: impl Fn(&Node) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(node) = self.look(key, &kind, what) else { return Ok(None) };
        let value = take(node).ok_or_else(|| self.wrong(key, node, kind.expected()))?;
        self.note(key, node, Effect::Used(what));
        Ok(Some(value))
    }

    pub(crate) fn bool(&mut self, key: &'static str, what: &'static str) -> Result<Option<bool>> {
        self.read(key, what, Kind::Bool, boolean)
    }

    pub(crate) fn usize(&mut self, key: &'static str, what: &'static str) -> Result<Option<usize>> {
        self.whole(key, what, 0, None)
    }

    /// A whole number of at least 1.
    pub(crate) fn count(&mut self, key: &'static str, what: &'static str) -> Result<Option<usize>> {
        self.whole(key, what, 1, None)
    }

    /// A whole number of at least 1 and at most `most`, where a larger one would exhaust the memory.
    pub(crate) fn count_up_to(
        &mut self,
        key: &'static str,
        what: &'static str,
        most: usize,
    ) -> Result<Option<usize>> {
        self.whole(key, what, 1, Some(most))
    }

    /// A whole number of at most `most`.
    pub(crate) fn usize_up_to(
        &mut self,
        key: &'static str,
        what: &'static str,
        most: usize,
    ) -> Result<Option<usize>> {
        self.whole(key, what, 0, Some(most))
    }

    fn whole(
        &mut self,
        key: &'static str,
        what: &'static str,
        least: usize,
        most: Option<usize>,
    ) -> Result<Option<usize>> {
        let fits = |&n: &usize| n >= least && most.is_none_or(|most| n <= most);
        self.read(key, what, Kind::Whole { least, most }, |node| whole(node).filter(fits))
    }

    /// A number that is not negative.
    pub(crate) fn non_negative(&mut self, key: &'static str, what: &'static str) -> Result<Option<f64>> {
        self.read(key, what, Kind::NonNegative, |node| number(node).filter(|&x| x >= 0.0))
    }

    pub(crate) fn text(&mut self, key: &'static str, what: &'static str) -> Result<Option<String>> {
        self.read(key, what, Kind::Text, scalar_text)
    }

    pub(crate) fn path(&mut self, key: &'static str, what: &'static str) -> Result<Option<PathBuf>> {
        Ok(self.text(key, what)?.map(PathBuf::from))
    }

    /// One text, or a list of texts.
    pub(crate) fn texts(&mut self, key: &'static str, what: &'static str) -> Result<Option<Vec<String>>> {
        self.read(key, what, Kind::Texts, |node| match &node.value {
            Value::List(items) => items.iter().map(scalar_text).collect(),
            _ => scalar_text(node).map(|text| vec![text]),
        })
    }

    /// Two numbers.
    pub(crate) fn pair(&mut self, key: &'static str, what: &'static str) -> Result<Option<[f64; 2]>> {
        self.read(key, what, Kind::Pair, |node| match &node.value {
            Value::List(items) => match items.as_slice() {
                [a, b] => Some([number(a)?, number(b)?]).filter(|p| p.iter().all(|x| (0.0..1.0).contains(x))),
                _ => None,
            },
            _ => None,
        })
    }

    /// A name from a closed list; `None` when absent.
    ///
    /// A mapping with only `_target_` counts as that name, as does a bare text.
    pub(crate) fn name<T: Copy>(
        &mut self,
        key: &'static str,
        what: &'static str,
        names: &[(&'static str, T)],
    ) -> Result<Option<T>> {
        let kind = Kind::Name(names.iter().map(|(name, _)| *name).collect());
        let Some(node) = self.look(key, &kind, what) else { return Ok(None) };
        let node = match node.map() {
            Some([entry]) if entry.key == "_target_" => &entry.node,
            _ => node,
        };
        let Some(value) = scalar_text(node) else {
            return Err(self.wrong(key, node, kind.expected()));
        };
        match names.iter().find(|(name, _)| *name == value) {
            Some((_, found)) => {
                self.note(key, node, Effect::Used(what));
                Ok(Some(*found))
            }
            None => {
                // A long list is easier to read without the module paths.
                let dots = |name: &str| name.matches('.').count();
                let fewest = names.iter().map(|(name, _)| dots(name)).min().unwrap_or(0);
                let short = names.iter().filter(|(name, _)| dots(name) == fewest);
                let accepted: Vec<String> = short.map(|(name, _)| (*name).to_owned()).collect();
                let candidates = || accepted.iter().map(String::as_str);
                let last = value.rsplit('.').next().unwrap_or(&value);
                let nearest = nearest(last, candidates()).or_else(|| nearest(&value, candidates()));
                let location = self.location(node);
                let accepted = Box::new(AcceptedNames { names: accepted, nearest });
                Err(Error::UnknownName { location, key: self.key(key), value, accepted })
            }
        }
    }

    /// A nested section; an absent one has no keys.
    pub(crate) fn section(&mut self, key: &str) -> Result<Section<'a>> {
        Ok(self.optional_section(key)?.unwrap_or(Section {
            reading: self.reading,
            path: self.key(key),
            origin: self.origin,
            entries: &[],
            known: Vec::new(),
        }))
    }

    /// A nested section, `None` when absent or null.
    pub(crate) fn optional_section(&mut self, key: &str) -> Result<Option<Section<'a>>> {
        let Some(node) = self.look(key, &Kind::Section, "") else { return Ok(None) };
        let Some(entries) = node.map() else {
            return Err(self.wrong(key, node, Kind::Section.expected()));
        };
        let path = self.key(key);
        let (reading, origin) = (self.reading, node.origin);
        Ok(Some(Section { reading, path, origin, entries, known: Vec::new() }))
    }

    /// Whether a key is set to anything but null, without reading it.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key && !entry.node.is_null())
    }

    /// Whether the value of a key is a mapping.
    pub(crate) fn is_section(&self, key: &str) -> bool {
        self.note_asked(key, &Kind::Section, "");
        self.entries.iter().any(|entry| entry.key == key && entry.node.map().is_some())
    }

    /// The keys of this section.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let entries = self.entries;
        entries.iter().map(|entry| entry.key.as_str())
    }

    /// Accepts a key that is valid in NeMo AutoModel and changes no result here, whatever it holds.
    pub(crate) fn no_effect(&mut self, key: &'static str, why: &'static str) {
        if let Some(node) = self.look(key, &Kind::Anything, &format!("no effect here: {why}")) {
            self.note(key, node, Effect::NoEffect(why));
        }
    }

    /// Accepts several such keys for one reason.
    pub(crate) fn none_of_effect(&mut self, keys: &[&'static str], why: &'static str) {
        for key in keys {
            self.no_effect(key, why);
        }
    }

    /// A key that would change the result: off (null, false, 0, 1 for sizes) is fine, else it blocks a run.
    pub(crate) fn unsupported(&mut self, key: &'static str, reason: &str) {
        self.unsupported_unless(key, reason, |node| match &node.value {
            Value::Scalar(scalar) => {
                matches!(scalar.literal, Literal::Bool(false) | Literal::Int(0))
                    || scalar.literal == Literal::Float(0.0)
            }
            Value::List(items) => items.is_empty(),
            Value::Map(_) => false,
        });
    }

    /// A key that blocks a run unless its value is one that changes nothing.
    pub(crate) fn unsupported_unless(
        &mut self,
        key: &'static str,
        reason: &str,
        harmless: impl Fn(&Node) -> bool,
    ) {
        let Some(node) = self.look(key, &Kind::Anything, &format!("refused unless it is off: {reason}"))
        else {
            return;
        };
        let effect = match harmless(node) {
            true => Effect::NoEffect("off: this is what happens here anyway"),
            false => Effect::Unsupported(reason.to_owned()),
        };
        self.note(key, node, effect);
    }

    /// Changes what the report says about a key that was read.
    pub(crate) fn mark(&self, key: &str, effect: Effect) {
        let full = self.key(key);
        let mut report = self.reading.report.borrow_mut();
        if let Some(entry) = report.entries.iter_mut().rev().find(|entry| entry.key == full) {
            entry.effect = effect;
        }
    }

    /// Changes what the report says about every key of a section that was read.
    pub(crate) fn mark_section(&self, section: &str, effect: &Effect) {
        let prefix = format!("{}.", self.key(section));
        let mut report = self.reading.report.borrow_mut();
        for entry in report.entries.iter_mut().filter(|entry| entry.key.starts_with(&prefix)) {
            entry.effect = effect.clone();
        }
    }

    /// An error about a required key that is absent.
    pub(crate) fn missing(&self, key: &str, purpose: &str) -> Error {
        Error::MissingKey { file: self.reading.file.clone(), key: self.key(key), purpose: purpose.to_owned() }
    }

    /// An error about the value of a key of this section that is set.
    pub(crate) fn refuse(&self, key: &str, expected: impl Into<String>) -> Error {
        match self.entries.iter().find(|entry| entry.key == key) {
            Some(entry) => self.wrong(key, &entry.node, expected),
            None => self.missing(key, &expected.into()),
        }
    }

    /// Ends the section.
    ///
    /// # Errors
    /// The first key that nobody asked for, with the known key nearest to it.
    pub(crate) fn finish(self) -> Result<()> {
        for entry in self.entries {
            if !self.known.contains(&entry.key) {
                return Err(Error::UnknownKey {
                    location: Location { file: self.reading.file.clone(), origin: entry.origin },
                    key: self.key(&entry.key),
                    nearest: nearest(&entry.key, self.known.iter().map(String::as_str)),
                });
            }
        }
        Ok(())
    }
}

/// Whether a (dotted) key holds a secret.
pub(crate) fn is_secret(key: &str) -> bool {
    // `tokenizer` and `num_tokens` are no secrets; a part named exactly so is.
    let last = key.rsplit('.').next().unwrap_or(key).to_ascii_lowercase();
    SECRET.iter().any(|secret| last == *secret || last.ends_with(&format!("_{secret}")))
}

fn boolean(node: &Node) -> Option<bool> {
    match &node.value {
        Value::Scalar(scalar) => match scalar.literal {
            Literal::Bool(value) => Some(value),
            _ => None,
        },
        _ => None,
    }
}

fn whole(node: &Node) -> Option<usize> {
    match &node.value {
        Value::Scalar(scalar) => match scalar.literal {
            Literal::Int(value) => usize::try_from(value).ok(),
            _ => None,
        },
        _ => None,
    }
}

fn number(node: &Node) -> Option<f64> {
    match &node.value {
        Value::Scalar(scalar) => match scalar.literal {
            Literal::Int(value) => Some(value as f64),
            Literal::Float(value) => Some(value),
            _ => None,
        },
        _ => None,
    }
}

fn scalar_text(node: &Node) -> Option<String> {
    match &node.value {
        Value::Scalar(scalar) if scalar.literal != Literal::Null => Some(scalar.text.clone()),
        _ => None,
    }
}

/// The candidate within a third of its length in edits, if there is one.
pub(crate) fn nearest<'n>(word: &str, candidates: impl Iterator<Item = &'n str>) -> Option<String> {
    candidates
        .map(|candidate| (edits(word, candidate), candidate))
        .filter(|(distance, candidate)| {
            *distance <= candidate.chars().count().max(word.chars().count()).div_ceil(3)
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate.to_owned())
}

/// Edits (insert, delete, replace, swap of neighbours) from one word to another.
fn edits(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let b: Vec<char> = b.chars().take(64).collect();
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names_are_close_ones_only() {
        let names = ["max_steps", "num_epochs", "val_every_steps"];
        assert_eq!(nearest("max_step", names.into_iter()), Some("max_steps".to_owned()));
        assert_eq!(nearest("mxa_steps", names.into_iter()), Some("max_steps".to_owned()));
        assert_eq!(nearest("learning_rate", names.into_iter()), None);
    }

    #[test]
    fn secrets_are_known_by_their_names() {
        assert!(is_secret("wandb.api_key"));
        assert!(is_secret("dataset.token"));
        assert!(is_secret("hf_token"));
        assert!(!is_secret("dataset.tokenizer"));
        assert!(!is_secret("num_tokens"));
    }
}
