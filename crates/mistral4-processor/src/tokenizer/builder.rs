//! Learning a small byte-pair vocabulary and writing it as `tekken.json`.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustc_hash::FxHashMap;
use serde::Serialize;

use super::pattern::{Pattern, TEKKEN_PATTERN};
use super::tekken::FIXED_SPECIAL_TOKENS;
use super::{ImageConfig, Tokenizer};
use crate::{Error, Result};

/// The control tokens above the fixed ones that a v15 chat form uses, from id 32 on.
const NAMED_SPECIAL_TOKENS: [&str; 6] =
    ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"];

const FIRST_NAMED: usize = 32;

/// How many ids a built tokenizer keeps for control tokens.
const SPECIAL_TOKENS: usize = 40;

/// Learns a byte-pair vocabulary from text and writes a v15 `tekken.json` that `mistral_common` loads too.
///
/// Ids 0 to 39 are control tokens with Mistral's ids for the first twenty, 40 to 295 the bytes, the rest learned.
#[derive(Debug, Clone)]
pub struct TekkenBuilder {
    vocab_size: usize,
    image: Option<ImageConfig>,
}

impl TekkenBuilder {
    /// The least vocabulary: control tokens and bytes.
    pub const MIN_VOCAB_SIZE: usize = SPECIAL_TOKENS + 256;

    /// Starts a builder that learns at most `vocab_size` ids in total.
    ///
    /// # Panics
    /// When `vocab_size` is below [`MIN_VOCAB_SIZE`](Self::MIN_VOCAB_SIZE).
    pub fn new(vocab_size: usize) -> Self {
        assert!(vocab_size >= Self::MIN_VOCAB_SIZE, "vocab_size must be at least {}", Self::MIN_VOCAB_SIZE);
        Self { vocab_size, image: None }
    }

    /// Adds the image section.
    pub fn image(mut self, image: ImageConfig) -> Self {
        self.image = Some(image);
        self
    }

    /// Learns the merges: the most frequent neighbours join first, the smaller bytes first among equals.
    ///
    /// Fewer ids than asked for come out when the texts hold no pair twice.
    ///
    /// # Errors
    /// When the pattern engine gives up on a text.
    pub fn train<'t>(&self, texts: impl IntoIterator<Item = &'t str>) -> Result<TekkenFile> {
        let mut words = count_words(texts)?;
        let mut tokens: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
        let mut ids: FxHashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
        while SPECIAL_TOKENS + tokens.len() < self.vocab_size {
            let Some(best) = most_frequent_pair(&words, &tokens) else { break };
            let joined = [tokens[best.0 as usize].as_slice(), tokens[best.1 as usize].as_slice()].concat();
            // Two pairs can spell the same token; the later one then only joins.
            let id = *ids.entry(joined).or_insert_with_key(|joined| {
                tokens.push(joined.clone());
                tokens.len() as u32 - 1
            });
            for word in &mut words {
                word.merge(id, &tokens);
            }
        }
        Ok(TekkenFile { pieces: tokens, image: self.image })
    }
}

/// A distinct piece of text as tokens, and how often it occurs.
struct Word {
    tokens: Vec<u32>,
    count: u64,
}

impl Word {
    /// Joins, from the left, all neighbours that spell the new token.
    fn merge(&mut self, id: u32, tokens: &[Vec<u8>]) {
        let bytes = &tokens[id as usize];
        let mut at = 0;
        while at + 1 < self.tokens.len() {
            let (left, right) = (&tokens[self.tokens[at] as usize], &tokens[self.tokens[at + 1] as usize]);
            let spells =
                left.len() + right.len() == bytes.len() && bytes.starts_with(left) && bytes.ends_with(right);
            if spells {
                self.tokens[at] = id;
                self.tokens.remove(at + 1);
            }
            at += 1;
        }
    }
}

fn count_words<'t>(texts: impl IntoIterator<Item = &'t str>) -> Result<Vec<Word>> {
    let pattern = Pattern::new(TEKKEN_PATTERN).map_err(|reason| Error::Pattern { reason })?;
    let mut counts: FxHashMap<&str, u64> = FxHashMap::default();
    for text in texts {
        pattern.for_each_piece(text, false, |piece| *counts.entry(piece).or_default() += 1)?;
    }
    let words = counts
        .into_iter()
        .map(|(piece, count)| Word { tokens: piece.bytes().map(u32::from).collect(), count });
    Ok(words.collect())
}

/// The pair that occurs most often, at least twice.
fn most_frequent_pair(words: &[Word], tokens: &[Vec<u8>]) -> Option<(u32, u32)> {
    let mut counts: FxHashMap<(u32, u32), u64> = FxHashMap::default();
    for word in words {
        for pair in word.tokens.windows(2) {
            *counts.entry((pair[0], pair[1])).or_default() += word.count;
        }
    }
    let spelling = |pair: &(u32, u32)| (&tokens[pair.0 as usize], &tokens[pair.1 as usize]);
    counts
        .into_iter()
        .filter(|(_, count)| *count >= 2)
        .max_by(|(a, count_a), (b, count_b)| count_a.cmp(count_b).then_with(|| spelling(b).cmp(&spelling(a))))
        .map(|(pair, _)| pair)
}

/// A learned vocabulary, ready to be written.
#[derive(Debug, Clone)]
pub struct TekkenFile {
    pieces: Vec<Vec<u8>>,
    image: Option<ImageConfig>,
}

#[derive(Serialize)]
struct VocabEntry<'a> {
    rank: usize,
    token_bytes: String,
    token_str: Option<&'a str>,
}

impl TekkenFile {
    /// The number of ids, control tokens included.
    pub fn vocab_size(&self) -> usize {
        SPECIAL_TOKENS + self.pieces.len()
    }

    /// The text of the `tekken.json`.
    pub fn to_json(&self) -> String {
        let vocab: Vec<VocabEntry> = self
            .pieces
            .iter()
            .enumerate()
            .map(|(rank, bytes)| VocabEntry {
                rank,
                token_bytes: STANDARD.encode(bytes),
                token_str: std::str::from_utf8(bytes).ok(),
            })
            .collect();
        let fillers = (FIXED_SPECIAL_TOKENS.len()..FIRST_NAMED).map(|id| format!("<SPECIAL_{id}>"));
        let names = FIXED_SPECIAL_TOKENS.iter().map(|name| (*name).to_owned()).chain(fillers);
        let names = names.chain(NAMED_SPECIAL_TOKENS.iter().map(|name| (*name).to_owned()));
        let special_tokens: Vec<_> = names
            .enumerate()
            .map(|(rank, name)| serde_json::json!({"rank": rank, "token_str": name, "is_control": true}))
            .collect();
        let mut file = serde_json::json!({
            "config": {
                "pattern": TEKKEN_PATTERN,
                "num_vocab_tokens": self.pieces.len(),
                "default_vocab_size": self.vocab_size(),
                "default_num_special_tokens": SPECIAL_TOKENS,
                "version": "v15",
            },
            "vocab": vocab,
            "special_tokens": special_tokens,
            "model_settings_builder": {
                "reasoning_effort": {
                    "type": "enum", "values": ["none", "high"], "accepts_none": true, "default": "none"
                },
            },
            "version": 1,
            "type": "Tekken",
        });
        if let Some(image) = &self.image {
            file["image"] = serde_json::to_value(image).expect("three integers are JSON");
        }
        serde_json::to_string_pretty(&file).expect("a JSON value is always written")
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_json()).map_err(|source| Error::Io { path: path.to_owned(), source })
    }

    /// The tokenizer that reading the written file gives.
    ///
    /// # Errors
    /// Never for a vocabulary that [`TekkenBuilder::train`] made.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::from_tekken_bytes(self.to_json().as_bytes(), Path::new("tekken.json"))
    }
}
