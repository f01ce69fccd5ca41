//! Text to token ids and back.

mod bpe;
mod builder;
mod hugging_face;
mod pattern;
mod settings;
mod stream;
mod tekken;
mod version;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use builder::{TekkenBuilder, TekkenFile};
pub use settings::{JsonSchemaBuilder, ModelSettingsBuilder, ReasoningEffortBuilder};
pub use stream::DecodeStream;
pub use version::TokenizerVersion;

use crate::{Error, Result};

/// What decoding does with control tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Leave them out.
    Skip,
    /// Write their text, `[INST]` and so on.
    Keep,
}

/// How the tokenizer file says images are cut into patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// The side of a patch in pixels.
    pub image_patch_size: usize,
    /// The longest side of a prepared image in pixels.
    pub max_image_size: usize,
    /// How many patches along each side join into one image token.
    #[serde(default = "one")]
    pub spatial_merge_size: usize,
}

fn one() -> usize {
    1
}

impl ImageConfig {
    fn zero_field(&self) -> Option<&'static str> {
        let fields = [
            ("image_patch_size", self.image_patch_size),
            ("max_image_size", self.max_image_size),
            ("spatial_merge_size", self.spatial_merge_size),
        ];
        fields.into_iter().find(|(_, value)| *value == 0).map(|(name, _)| name)
    }
}

/// One id's content.
pub(crate) enum Piece<'a> {
    /// A piece of text, not necessarily whole characters.
    Bytes(&'a [u8]),
    /// A control token.
    Special(&'a str),
}

/// The content of every id, in one buffer.
#[derive(Debug, Default)]
struct Pieces {
    text: Vec<u8>,
    ends: Vec<usize>,
    special: Vec<bool>,
}

impl Pieces {
    fn push_bytes(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
        self.ends.push(self.text.len());
        self.special.push(false);
    }

    fn push_special(&mut self, name: &str) {
        self.push_bytes(name.as_bytes());
        *self.special.last_mut().expect("just pushed") = true;
    }

    fn get(&self, id: u32) -> Option<Piece<'_>> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        let bytes = &self.text[start..end];
        Some(if self.special[id] {
            Piece::Special(std::str::from_utf8(bytes).expect("special tokens are pushed as str"))
        } else {
            Piece::Bytes(bytes)
        })
    }
}

/// A byte-level BPE tokenizer with control tokens that text can never spell.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    version: TokenizerVersion,
    pieces: Pieces,
    bpe: bpe::Bpe,
    special_ids: HashMap<String, u32>,
    bos: u32,
    eos: u32,
    pad: Option<u32>,
    settings: Option<ModelSettingsBuilder>,
    image: Option<ImageConfig>,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tekken.json` if it is there, else `tokenizer.json`.
    ///
    /// # Errors
    /// When neither file is there, or the file is broken (the error names file and key).
    pub fn from_dir(dir: &Path) -> Result<Self> {
        for name in ["tekken.json", "tokenizer.json"] {
            let path = dir.join(name);
            if path.is_file() {
                return Self::from_file(&path);
            }
        }
        Err(Error::MissingTokenizer { dir: dir.to_owned() })
    }

    /// Loads a tokenizer file. A name that contains `tekken` is read as `tekken.json`, any other as `tokenizer.json`,
    /// for which a `tokenizer_config.json` beside it names the begin, end and pad tokens.
    ///
    /// # Errors
    /// When the file cannot be read or is broken (the error names file and key).
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.contains("tekken") { tekken::read(&bytes, path) } else { hugging_face::read(&bytes, path) }
    }

    /// Reads the bytes of a `tekken.json`; `path` only appears in error messages.
    ///
    /// # Errors
    /// When the file is broken (the error names file and key).
    pub fn from_tekken_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        tekken::read(bytes, path)
    }

    /// The ids of a text alone: no begin token, and text that looks like a control token stays text.
    ///
    /// # Errors
    /// When the pattern engine gives up on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        self.bpe.encode(text, &mut ids)?;
        Ok(ids)
    }

    /// The text of ids; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::UnknownId`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], special_tokens: SpecialTokens) -> Result<String> {
        let mut out = String::new();
        let mut bytes = Vec::new();
        for id in ids {
            match self.piece(*id)? {
                Piece::Bytes(piece) => bytes.extend_from_slice(piece),
                Piece::Special(text) => {
                    out.push_str(&String::from_utf8_lossy(&bytes));
                    bytes.clear();
                    if special_tokens == SpecialTokens::Keep {
                        out.push_str(text);
                    }
                }
            }
        }
        out.push_str(&String::from_utf8_lossy(&bytes));
        Ok(out)
    }

    /// The text of a single id, control tokens included; a part of a character shows as U+FFFD.
    ///
    /// # Errors
    /// [`Error::UnknownId`] for an id outside the vocabulary.
    pub fn token(&self, id: u32) -> Result<String> {
        self.decode(&[id], SpecialTokens::Keep)
    }

    /// The bytes of a single id, or nothing for a control token or an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        match self.pieces.get(id)? {
            Piece::Bytes(bytes) => Some(bytes),
            Piece::Special(_) => None,
        }
    }

    /// A stream that decodes one id at a time.
    pub fn decode_stream(&self, special_tokens: SpecialTokens) -> DecodeStream<'_> {
        DecodeStream::new(self, special_tokens)
    }

    /// The number of ids, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.pieces.ends.len()
    }

    /// The id of `<s>`, which begins every conversation.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The id of `</s>`, which ends every assistant turn.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The id of the padding token, if the tokenizer has one.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The id of a control token by its text, such as `[INST]`.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.special_ids.get(name).copied()
    }

    /// Whether the id is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The tokenizer's version, which is the chat form's.
    pub fn version(&self) -> TokenizerVersion {
        self.version
    }

    /// The model settings on offer (v15).
    pub fn model_settings_builder(&self) -> Option<&ModelSettingsBuilder> {
        self.settings.as_ref()
    }

    /// The image section of `tekken.json`.
    pub fn image_config(&self) -> Option<ImageConfig> {
        self.image
    }

    /// The file that the tokenizer was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn encode_into(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        self.bpe.encode(text, out)
    }

    pub(crate) fn piece(&self, id: u32) -> Result<Piece<'_>> {
        self.pieces.get(id).ok_or(Error::UnknownId { id, vocab_size: self.vocab_size() })
    }
}

/// What `mistral4 tokenize` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenizedJson {
    /// The token ids.
    pub ids: Vec<u32>,
    /// The text of each id on its own.
    pub tokens: Vec<String>,
    /// The text of all ids together, control tokens included.
    pub text: String,
}

/// Ids with their pieces and their text, as the `tokenize` command prints them.
///
/// # Errors
/// [`Error::UnknownId`] for an id outside the vocabulary.
pub fn tokenize_json(ids: &[u32], tokenizer: &Tokenizer) -> Result<TokenizedJson> {
    Ok(TokenizedJson {
        ids: ids.to_vec(),
        tokens: ids.iter().map(|id| tokenizer.token(*id)).collect::<Result<_>>()?,
        text: tokenizer.decode(ids, SpecialTokens::Keep)?,
    })
}
