//! Decoding one id at a time without splitting characters.

use super::{Piece, SpecialTokens, Tokenizer};
use crate::Result;

/// Turns a stream of ids into text as soon as whole characters are there.
///
/// The concatenation of everything that [`push`](Self::push) and [`finish`](Self::finish) return is exactly what
/// [`Tokenizer::decode`] returns for the same ids.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    special_tokens: SpecialTokens,
    pending: Vec<u8>,
}

impl<'a> DecodeStream<'a> {
    /// Starts a stream.
    pub fn new(tokenizer: &'a Tokenizer, special_tokens: SpecialTokens) -> Self {
        Self { tokenizer, special_tokens, pending: Vec::new() }
    }

    /// Takes one id and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// [`Error::UnknownId`](crate::Error::UnknownId) for an id outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut out = String::new();
        match self.tokenizer.piece(id)? {
            Piece::Bytes(bytes) => {
                self.pending.extend_from_slice(bytes);
                self.drain(&mut out);
            }
            Piece::Special(text) => {
                out.push_str(&self.finish());
                if self.special_tokens == SpecialTokens::Keep {
                    out.push_str(text);
                }
            }
        }
        Ok(out)
    }

    /// Returns what is left, an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// Moves everything but an unfinished character at the end from `pending` to `out`.
    fn drain(&mut self, out: &mut String) {
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            let end = done + chunk.valid().len() + chunk.invalid().len();
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            if end == self.pending.len() && is_unfinished(chunk.invalid()) {
                break;
            }
            out.push(char::REPLACEMENT_CHARACTER);
            done = end;
        }
        self.pending.drain(..done);
    }
}

/// Whether these bytes, invalid on their own, could become a character with more bytes.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
