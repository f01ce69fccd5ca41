//! Mistral's `tekken.json`: special tokens first, then byte pieces ordered by rank.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustc_hash::FxHashMap;
use serde::Deserialize;

use super::bpe::{Bpe, Merges};
use super::pattern::Pattern;
use super::{ImageConfig, ModelSettingsBuilder, Pieces, Tokenizer, TokenizerVersion};
use crate::{Error, Result};

/// No tokenizer has more special tokens; a larger count is a broken file, not a reason to allocate.
const MAX_SPECIAL_TOKENS: usize = 100_000;

/// The special tokens of files up to v7 that list none, by id.
pub(crate) const FIXED_SPECIAL_TOKENS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    config: Config<'a>,
    #[serde(borrow)]
    vocab: Vec<VocabEntry<'a>>,
    #[serde(borrow, default)]
    special_tokens: Option<Vec<SpecialEntry<'a>>>,
    #[serde(default)]
    multimodal: Option<ImageConfig>,
    #[serde(default)]
    image: Option<ImageConfig>,
    #[serde(default)]
    model_settings_builder: Option<ModelSettingsBuilder>,
}

#[derive(Deserialize)]
struct Config<'a> {
    #[serde(borrow)]
    pattern: Cow<'a, str>,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
    #[serde(borrow)]
    version: Cow<'a, str>,
}

#[derive(Deserialize)]
struct VocabEntry<'a> {
    rank: u64,
    #[serde(borrow)]
    token_bytes: Cow<'a, str>,
}

#[derive(Deserialize)]
struct SpecialEntry<'a> {
    rank: u64,
    #[serde(borrow)]
    token_str: Cow<'a, str>,
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
            // Only a broken file pays for the pass that also tracks keys.
            let mut deserializer = serde_json::Deserializer::from_slice(bytes);
            match serde_path_to_error::deserialize::<_, File>(&mut deserializer) {
                Err(error) => self.malformed(error.path().to_string(), error.inner().to_string()),
                Ok(_) => self.malformed(".", "more text after the end of the JSON object"),
            }
        })
    }

    fn version(&self, file: &File) -> Result<TokenizerVersion> {
        TokenizerVersion::parse(&file.config.version).ok_or_else(|| {
            let known = TokenizerVersion::ALL.map(TokenizerVersion::as_str).join(", ");
            self.malformed("config.version", format!("{:?} is not one of {known}", file.config.version))
        })
    }

    fn special_tokens(&self, file: &File, version: TokenizerVersion, count: usize) -> Result<Vec<String>> {
        let mut names: Vec<Option<String>> = vec![None; count];
        match &file.special_tokens {
            Some(entries) => {
                for (index, entry) in entries.iter().enumerate() {
                    let key = || format!("special_tokens[{index}].rank");
                    let slot = usize::try_from(entry.rank).ok().and_then(|rank| names.get_mut(rank));
                    let Some(slot) = slot else {
                        let reason =
                            format!("{} is not below default_num_special_tokens {count}", entry.rank);
                        return Err(self.malformed(key(), reason));
                    };
                    if slot.replace(entry.token_str.clone().into_owned()).is_some() {
                        return Err(self.malformed(key(), format!("rank {} is there twice", entry.rank)));
                    }
                }
            }
            None if version <= TokenizerVersion::V7 => {
                for (name, slot) in FIXED_SPECIAL_TOKENS.iter().zip(&mut names) {
                    *slot = Some((*name).to_owned());
                }
            }
            None => {
                let reason = format!("missing; a {version} file has to list its special tokens");
                return Err(self.malformed("special_tokens", reason));
            }
        }
        Ok(names
            .into_iter()
            .enumerate()
            .map(|(id, name)| name.unwrap_or_else(|| format!("<SPECIAL_{id}>")))
            .collect())
    }

    /// The byte pieces of the first `count` ranks.
    fn add_pieces(&self, file: &File, count: usize, first_id: u32, pieces: &mut Pieces) -> Result<Ids> {
        let mut ids = Ids::with_capacity_and_hasher(count, Default::default());
        let mut bytes = Vec::new();
        for (rank, entry) in file.vocab[..count].iter().enumerate() {
            if entry.rank != rank as u64 {
                let reason = format!("expected rank {rank}, found {}", entry.rank);
                return Err(self.malformed(format!("vocab[{rank}].rank"), reason));
            }
            let key = || format!("vocab[{rank}].token_bytes");
            bytes.clear();
            STANDARD
                .decode_vec(entry.token_bytes.as_bytes(), &mut bytes)
                .map_err(|error| self.malformed(key(), error.to_string()))?;
            if rank < 256 && bytes != [rank as u8] {
                return Err(self.malformed(key(), format!("rank {rank} must be the single byte {rank:#04x}")));
            }
            pieces.push_bytes(&bytes);
            if bytes.is_empty() || ids.insert(bytes.as_slice().into(), first_id + rank as u32).is_some() {
                return Err(self.malformed(key(), "empty, or the same bytes as an earlier rank"));
            }
        }
        Ok(ids)
    }

    fn image(&self, file: &File, version: TokenizerVersion) -> Result<Option<ImageConfig>> {
        let (key, config) = match (&file.multimodal, &file.image) {
            (Some(_), _) if version > TokenizerVersion::V11 => {
                return Err(
                    self.malformed("multimodal", format!("a {version} file calls this section `image`"))
                );
            }
            (Some(config), _) => ("multimodal", config),
            (None, Some(config)) => ("image", config),
            (None, None) => return Ok(None),
        };
        if let Some(name) = config.zero_field() {
            return Err(self.malformed(format!("{key}.{name}"), "must be above 0"));
        }
        Ok(Some(*config))
    }
}

type Ids = FxHashMap<Box<[u8]>, u32>;

/// Reads the bytes of a `tekken.json`; `path` is for error messages.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let reader = Reader { path };
    let file = reader.parse(bytes)?;
    let version = reader.version(&file)?;
    let (vocab_size, specials) = (file.config.default_vocab_size, file.config.default_num_special_tokens);
    if specials > MAX_SPECIAL_TOKENS {
        let reason = format!("{specials} is above the limit of {MAX_SPECIAL_TOKENS}");
        return Err(reader.malformed("config.default_num_special_tokens", reason));
    }
    if vocab_size < specials + 256 || vocab_size > file.vocab.len() + specials {
        let reason = format!(
            "{vocab_size} must hold {specials} special tokens and the 256 bytes, and at most the {} entries of `vocab`",
            file.vocab.len()
        );
        return Err(reader.malformed("config.default_vocab_size", reason));
    }
    let names = reader.special_tokens(&file, version, specials)?;
    let mut special_ids = HashMap::with_capacity(specials);
    let mut pieces = Pieces::default();
    for (id, name) in names.into_iter().enumerate() {
        pieces.push_special(&name);
        if let Some(other) = special_ids.insert(name, id as u32) {
            return Err(
                reader.malformed("special_tokens", format!("ids {other} and {id} have the same text"))
            );
        }
    }
    let ids = reader.add_pieces(&file, vocab_size - specials, specials as u32, &mut pieces)?;
    let pattern =
        Pattern::new(&file.config.pattern).map_err(|reason| reader.malformed("config.pattern", reason))?;
    let bpe = Bpe::new(Some(pattern), ids, Merges::ByRank)
        .expect("the first 256 ranks were checked to be the bytes");
    let settings = file.model_settings_builder.clone();
    if let Some(builder) = &settings {
        if version < TokenizerVersion::V15 {
            return Err(
                reader.malformed("model_settings_builder", format!("not allowed in a {version} file"))
            );
        }
        if let Some((key, reason)) = builder.problem() {
            return Err(reader.malformed(format!("model_settings_builder.{key}"), reason));
        }
    }
    let image = reader.image(&file, version)?;
    let find = |name: &str| {
        special_ids
            .get(name)
            .copied()
            .ok_or_else(|| reader.malformed("special_tokens", format!("{name} is missing")))
    };
    let (bos, eos) = (find("<s>")?, find("</s>")?);
    let pad = special_ids.get("<pad>").copied();
    Ok(Tokenizer { path: path.to_owned(), version, pieces, bpe, special_ids, bos, eos, pad, settings, image })
}
