//! The versions of Mistral's tokenizers and chat forms.

use std::fmt;

/// A version of the tokenizer, which names the chat form that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TokenizerVersion {
    /// System prompt inside the last user turn, tools before it, JSON tool results.
    V3,
    /// System prompts as turns of their own, tool results with their call id.
    V7,
    /// Tool calls as name, call id and arguments between control tokens.
    V11,
    /// Tools before the first user turn, no call ids, thinking between control tokens.
    V13,
    /// Model settings (reasoning effort) before the first user turn.
    V15,
}

impl TokenizerVersion {
    /// All versions that this crate renders, oldest first.
    pub const ALL: [Self; 5] = [Self::V3, Self::V7, Self::V11, Self::V13, Self::V15];

    /// The version written `v15` and so on, if this crate knows it.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }

    /// The version as tokenizer files write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V3 => "v3",
            Self::V7 => "v7",
            Self::V11 => "v11",
            Self::V13 => "v13",
            Self::V15 => "v15",
        }
    }
}

impl fmt::Display for TokenizerVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}
