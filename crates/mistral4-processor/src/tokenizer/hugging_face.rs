//! Hugging Face's `tokenizer.json`, as far as byte-level BPE goes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use rustc_hash::FxHashMap;
use serde::Deserialize;
use serde_json::Value;

use super::bpe::{Bpe, Merges};
use super::pattern::Pattern;
use super::{ModelSettingsBuilder, Pieces, Tokenizer, TokenizerVersion};
use crate::{Error, Result};

/// No vocabulary is larger; a larger id is a broken file, not a reason to allocate.
const MAX_ID: u32 = 4_000_000;

/// GPT-2's pattern, which a `ByteLevel` pre-tokenizer applies when `use_regex` is true.
const BYTE_LEVEL_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow, default)]
    added_tokens: Vec<AddedToken<'a>>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
struct AddedToken<'a> {
    id: u32,
    #[serde(borrow)]
    content: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    vocab: HashMap<Cow<'a, str>, u32>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    Pair(#[serde(borrow)] Cow<'a, str>, #[serde(borrow)] Cow<'a, str>),
    Text(#[serde(borrow)] Cow<'a, str>),
}

impl Merge<'_> {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Text(text) => text.split_once(' '),
        }
    }
}

/// Names the path in every error of this file.
struct Reader<'p> {
    path: &'p Path,
}

impl Reader<'_> {
    fn malformed(&self, key: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Malformed { path: self.path.to_owned(), key: key.into(), reason: reason.into() }
    }

    fn parse<'a>(&self, bytes: &'a [u8]) -> Result<File<'a>> {
        serde_json::from_slice(bytes).map_err(|_| {
            let mut deserializer = serde_json::Deserializer::from_slice(bytes);
            match serde_path_to_error::deserialize::<_, File>(&mut deserializer) {
                Err(error) => self.malformed(error.path().to_string(), error.inner().to_string()),
                Ok(_) => self.malformed(".", "more text after the end of the JSON object"),
            }
        })
    }

    fn check_supported(&self, file: &File) -> Result<()> {
        let model = &file.model;
        if model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
            return Err(self.malformed("model.type", "only byte-level BPE is supported"));
        }
        if model.byte_fallback {
            return Err(self.malformed("model.byte_fallback", "only byte-level BPE is supported"));
        }
        if !model.dropout.is_null() && model.dropout.as_f64() != Some(0.0) {
            return Err(self.malformed("model.dropout", "merges with dropout are not supported"));
        }
        let affixes = [
            ("continuing_subword_prefix", &model.continuing_subword_prefix),
            ("end_of_word_suffix", &model.end_of_word_suffix),
        ];
        for (key, affix) in affixes {
            if affix.as_deref().is_some_and(|affix| !affix.is_empty()) {
                return Err(self.malformed(format!("model.{key}"), "only byte-level BPE is supported"));
            }
        }
        let empty_sequence = file.normalizer["normalizers"].as_array().is_some_and(Vec::is_empty);
        if !file.normalizer.is_null() && !empty_sequence {
            return Err(self.malformed("normalizer", "normalizers are not supported"));
        }
        Ok(())
    }

    /// The pattern of the pre-tokenizer, which has to end in `ByteLevel`.
    fn pattern(&self, pre_tokenizer: &Value) -> Result<Option<String>> {
        let steps = match pre_tokenizer["type"].as_str() {
            Some("Sequence") => {
                pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice).unwrap_or_default()
            }
            _ => std::slice::from_ref(pre_tokenizer),
        };
        let unsupported = || {
            let reason = "expected at most one `Split` by `Regex`, `Isolated`, then `ByteLevel` without a prefix space";
            self.malformed("pre_tokenizer", reason)
        };
        let (split, byte_level) = match steps {
            [byte_level] => (None, byte_level),
            [split, byte_level] => (Some(split), byte_level),
            _ => return Err(unsupported()),
        };
        let prefix_space = byte_level["add_prefix_space"].as_bool().unwrap_or(true);
        if byte_level["type"] != "ByteLevel" || prefix_space {
            return Err(unsupported());
        }
        let use_regex = byte_level["use_regex"].as_bool().unwrap_or(true);
        match split {
            None => Ok(use_regex.then(|| BYTE_LEVEL_PATTERN.to_owned())),
            Some(split) => {
                let pattern = split["pattern"]["Regex"].as_str();
                let plain = split["behavior"] == "Isolated" && !split["invert"].as_bool().unwrap_or(false);
                match pattern {
                    Some(pattern) if split["type"] == "Split" && plain && !use_regex => {
                        Ok(Some(pattern.to_owned()))
                    }
                    _ => Err(unsupported()),
                }
            }
        }
    }

    fn check_id(&self, key: &str, id: u32) -> Result<()> {
        if id > MAX_ID {
            return Err(self.malformed(key, format!("id {id} is above the limit of {MAX_ID}")));
        }
        Ok(())
    }

    fn merges(&self, model: &Model) -> Result<FxHashMap<(u32, u32), (u32, u32)>> {
        let mut pairs = FxHashMap::with_capacity_and_hasher(model.merges.len(), Default::default());
        let mut joined = String::new();
        for (index, merge) in model.merges.iter().enumerate() {
            let key = || format!("model.merges[{index}]");
            let Some((left, right)) = merge.parts() else {
                return Err(self.malformed(key(), "expected two tokens"));
            };
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let id = |token: &str| {
                let id = model.vocab.get(token).copied();
                id.ok_or_else(|| self.malformed(key(), format!("{token:?} is not in model.vocab")))
            };
            pairs.insert((id(left)?, id(right)?), (index as u32, id(&joined)?));
        }
        Ok(pairs)
    }
}

/// The bytes behind the printable stand-ins that byte-level BPE writes, as GPT-2 assigns them.
fn byte_of_character() -> HashMap<char, u8> {
    let mut next = 256;
    let mut map = HashMap::with_capacity(256);
    for byte in 0..=255_u8 {
        let character = match byte {
            33..=126 | 161..=172 | 174..=255 => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("below the surrogates")
            }
        };
        map.insert(character, byte);
    }
    map
}

/// Reads the bytes of a `tokenizer.json` and the `tokenizer_config.json` beside it.
///
/// Every added token is a control token here, whatever its `special` flag says, so text can never spell one.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let reader = Reader { path };
    let file = reader.parse(bytes)?;
    reader.check_supported(&file)?;
    let pattern = reader.pattern(&file.pre_tokenizer)?;
    let pattern = pattern
        .map(|pattern| {
            Pattern::new(&pattern).map_err(|reason| reader.malformed("pre_tokenizer.pattern", reason))
        })
        .transpose()?;

    let mut special_ids = HashMap::new();
    let mut names: FxHashMap<u32, &str> = FxHashMap::default();
    for (index, token) in file.added_tokens.iter().enumerate() {
        reader.check_id(&format!("added_tokens[{index}].id"), token.id)?;
        names.insert(token.id, &token.content);
        special_ids.insert(token.content.clone().into_owned(), token.id);
    }

    let characters = byte_of_character();
    let mut by_id: Vec<Option<&str>> = Vec::new();
    for (token, id) in &file.model.vocab {
        reader.check_id(&format!("model.vocab[{token:?}]"), *id)?;
        let index = *id as usize;
        if by_id.len() <= index {
            by_id.resize(index + 1, None);
        }
        if let Some(other) = by_id[index].replace(token) {
            return Err(reader.malformed("model.vocab", format!("{token:?} and {other:?} share id {id}")));
        }
    }
    let size = names.keys().map(|id| *id as usize + 1).max().unwrap_or(0).max(by_id.len());
    by_id.resize(size, None);

    let mut pieces = Pieces::default();
    let mut ids = FxHashMap::with_capacity_and_hasher(size, Default::default());
    for (id, token) in by_id.into_iter().enumerate() {
        if let Some(name) = names.get(&(id as u32)) {
            pieces.push_special(name);
            continue;
        }
        let Some(token) = token else {
            return Err(
                reader.malformed("model.vocab", format!("no token has id {id}, though higher ids are there"))
            );
        };
        let bytes: Option<Box<[u8]>> =
            token.chars().map(|character| characters.get(&character).copied()).collect();
        let Some(bytes) = bytes else {
            return Err(
                reader.malformed(format!("model.vocab[{token:?}]"), "not written in byte-level characters")
            );
        };
        pieces.push_bytes(&bytes);
        ids.insert(bytes, id as u32);
    }
    let merges =
        Merges::Listed { pairs: reader.merges(&file.model)?, ignore_merges: file.model.ignore_merges };
    let bpe = Bpe::new(pattern, ids, merges)
        .map_err(|byte| reader.malformed("model.vocab", format!("the byte {byte:#04x} is no token")))?;

    let named = config_tokens(path)?;
    let find =
        |key: &str, default: &str| special_ids.get(named.get(key).map_or(default, String::as_str)).copied();
    let required = |key: &str, default: &str| {
        find(key, default)
            .ok_or_else(|| reader.malformed("added_tokens", format!("{key} (or {default}) is missing")))
    };
    let (bos, eos) = (required("bos_token", "<s>")?, required("eos_token", "</s>")?);
    let pad = find("pad_token", "<pad>");
    let version = infer_version(&special_ids);
    let settings = (version == TokenizerVersion::V15).then(ModelSettingsBuilder::none_or_high);
    Ok(Tokenizer {
        path: path.to_owned(),
        version,
        pieces,
        bpe,
        special_ids,
        bos,
        eos,
        pad,
        settings,
        image: None,
    })
}

/// `tokenizer.json` does not say its version; each version brought control tokens that tell it.
fn infer_version(special_ids: &HashMap<String, u32>) -> TokenizerVersion {
    let marks = [
        ("[MODEL_SETTINGS]", TokenizerVersion::V15),
        ("[THINK]", TokenizerVersion::V13),
        ("[ARGS]", TokenizerVersion::V11),
        ("[SYSTEM_PROMPT]", TokenizerVersion::V7),
    ];
    let found = marks.into_iter().find(|(name, _)| special_ids.contains_key(*name));
    found.map_or(TokenizerVersion::V3, |(_, version)| version)
}

/// `bos_token`, `eos_token` and `pad_token` of the `tokenizer_config.json` beside the file, if there is one.
fn config_tokens(path: &Path) -> Result<HashMap<&'static str, String>> {
    let path = path.with_file_name("tokenizer_config.json");
    if !path.is_file() {
        return Ok(HashMap::new());
    }
    let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let config: Value = serde_json::from_slice(&bytes).map_err(|error| Error::Malformed {
        path: path.clone(),
        key: ".".to_owned(),
        reason: error.to_string(),
    })?;
    let mut tokens = HashMap::new();
    for key in ["bos_token", "eos_token", "pad_token"] {
        let token = config[key].as_str().or_else(|| config[key]["content"].as_str());
        if let Some(token) = token {
            tokens.insert(key, token.to_owned());
        }
    }
    Ok(tokens)
}
