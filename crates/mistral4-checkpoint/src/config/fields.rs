//! Typed access to the keys of one JSON object, remembering which were read.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::Activation;
use crate::error::{Error, Result};

/// Sizes above this are a mistake in any configuration, and keep products of two far from overflow.
const LARGEST_SIZE: u64 = 1 << 31;

/// One JSON object of a configuration file.
pub(super) struct Fields<'a> {
    file: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
    read: RefCell<HashSet<&'a str>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a Path, prefix: &str, map: &'a Map<String, Value>) -> Self {
        Fields { file, prefix: prefix.to_owned(), map, read: RefCell::default() }
    }

    /// The file these keys come from.
    pub(super) fn file(&self) -> &'a Path {
        self.file
    }

    /// The value of a key, null included.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.map.get_key_value(key)?;
        self.read.borrow_mut().insert(key.as_str());
        Some(value)
    }

    /// The names of all keys.
    pub(super) fn keys(&self) -> Vec<&'a str> {
        self.map.keys().map(String::as_str).collect()
    }

    /// The value of a key that is there and not null.
    pub(super) fn non_null(&self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|value| !value.is_null())
    }

    /// The object under a key; `None` when absent or null.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        match self.non_null(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields::new(self.file, &format!("{}{key}.", self.prefix), map)))
            }
            Some(_) => Err(self.invalid(key, "an object is needed", "write {...}")),
        }
    }

    /// An error about a key.
    pub(super) fn invalid(&self, key: &str, problem: impl Into<String>, fix: impl Into<String>) -> Error {
        let mut steps = key.split('.');
        let first = steps.next().and_then(|step| self.map.get(step));
        let value = steps.fold(first, |value, step| value?.get(step));
        let value = value.map_or_else(|| "absent".to_owned(), shortened);
        Error::Config {
            file: self.file.to_path_buf(),
            key: format!("{}{key}", self.prefix),
            value,
            problem: problem.into(),
            fix: fix.into(),
        }
    }

    /// A whole number of 0 or more; `None` when the key is absent.
    fn whole(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().ok_or_else(|| {
            self.invalid(
                key,
                "a whole number of 0 or more is needed",
                "write it without a fraction, sign or quotes",
            )
        })?;
        if number > LARGEST_SIZE {
            return Err(self.invalid(
                key,
                "the number is implausibly large",
                format!("the largest accepted is {LARGEST_SIZE}"),
            ));
        }
        Ok(Some(number as usize))
    }

    /// A whole number of 0 or more, with transformers' default.
    pub(super) fn count(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.whole(key)?.unwrap_or(default))
    }

    /// A whole number above 0, with transformers' default.
    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize> {
        match self.whole(key)? {
            Some(0) => Err(self.invalid(key, "the size must be above 0", "give the size of the weights")),
            size => Ok(size.unwrap_or(default)),
        }
    }

    /// A whole number above 0 that has no default.
    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        if self.get(key).is_none() {
            return Err(self.invalid(key, "the key is required", "add it"));
        }
        self.size(key, 0)
    }

    /// A whole number above 0, or null; `default` when absent.
    pub(super) fn optional_size(&self, key: &str, default: Option<usize>) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size(key, 0).map(Some),
        }
    }

    /// A number; `None` when absent or null.
    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        match self.non_null(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => Err(self.invalid(key, "a finite number is needed", "write it without quotes")),
            },
        }
    }

    /// A number above 0, with transformers' default; null is an error.
    pub(super) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        if let Some(Value::Null) = self.get(key) {
            return Err(self.invalid(
                key,
                "a number above 0 is needed",
                format!("leave it out for {default}"),
            ));
        }
        let number = self.optional_number(key)?.unwrap_or(default);
        if number <= 0.0 {
            return Err(self.invalid(
                key,
                "the number must be above 0",
                format!("transformers' default is {default}"),
            ));
        }
        Ok(number)
    }

    /// A switch, with transformers' default; null counts as false, as Python has it.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.invalid(key, "true or false is needed", "write it without quotes")),
        }
    }

    /// A string; `None` when absent or null.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.non_null(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.invalid(key, "a string is needed", "put it in quotes")),
        }
    }

    /// An activation's name in transformers, with its default.
    pub(super) fn activation(&self, key: &str, default: Activation) -> Result<Activation> {
        if let Some(Value::Null) = self.get(key) {
            return Err(self.invalid(key, "an activation is needed", "leave it out for the default"));
        }
        match self.text(key)? {
            None => Ok(default),
            Some(name) => Activation::from_name(name).ok_or_else(|| {
                self.invalid(
                    key,
                    "this activation is not implemented",
                    "use silu, gelu, gelu_pytorch_tanh or relu",
                )
            }),
        }
    }

    /// A token id below `vocab_size`; `default` when absent, `None` when null.
    pub(super) fn token(&self, key: &str, default: Option<u32>, vocab_size: usize) -> Result<Option<u32>> {
        match self.get(key) {
            None => Ok(default.filter(|&id| (id as usize) < vocab_size)),
            Some(Value::Null) => Ok(None),
            Some(value) => self.token_id(key, value, vocab_size).map(Some),
        }
    }

    /// One or several token ids; `default` when absent, empty when null.
    pub(super) fn tokens(&self, key: &str, default: u32, vocab_size: usize) -> Result<Vec<u32>> {
        match self.get(key) {
            None => Ok(Some(default).filter(|&id| (id as usize) < vocab_size).into_iter().collect()),
            Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(|id| self.token_id(key, id, vocab_size)).collect(),
            Some(value) => Ok(vec![self.token_id(key, value, vocab_size)?]),
        }
    }

    fn token_id(&self, key: &str, value: &Value, vocab_size: usize) -> Result<u32> {
        match value.as_u64() {
            Some(id) if id < vocab_size as u64 && u32::try_from(id).is_ok() => Ok(id as u32),
            _ => {
                Err(self.invalid(key, "a token id is needed", format!("ids go from 0 to {}", vocab_size - 1)))
            }
        }
    }

    /// Requires that a key is absent, null or one of the given values.
    pub(super) fn only(&self, key: &str, accepted: &[Value], problem: &str, fix: &str) -> Result<()> {
        match self.non_null(key) {
            Some(value) if !accepted.iter().any(|other| same(value, other)) => {
                Err(self.invalid(key, problem, fix))
            }
            _ => Ok(()),
        }
    }

    /// The keys nobody read and that are not in `inert`, with their prefix.
    pub(super) fn unknown(&self, inert: &[&str]) -> Vec<String> {
        let read = self.read.borrow();
        self.map
            .keys()
            .filter(|key| !read.contains(key.as_str()) && !inert.contains(&key.as_str()))
            .map(|key| format!("{}: unknown key `{}{key}` is ignored", self.file.display(), self.prefix))
            .collect()
    }
}

/// Equal, where 0 and 0.0 are the same number.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| a == b)
}

/// A value as JSON, cut so that a message stays one line.
fn shortened(value: &Value) -> String {
    const SHOWN: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= SHOWN { text } else { text.chars().take(SHOWN).chain("...".chars()).collect() }
}
