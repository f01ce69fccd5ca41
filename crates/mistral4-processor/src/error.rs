//! The one error type of this crate.

use std::path::PathBuf;

use crate::chat::Refusal;

/// What can go wrong with tokenizer files, conversations and images.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot access {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file's content is not what its format asks for.
    #[error("{}: `{key}`: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The key inside the file.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A folder holds none of the tokenizer files that this crate reads.
    #[error("{} holds neither tekken.json nor tokenizer.json; copy the model's tokenizer file there", dir.display())]
    MissingTokenizer {
        /// The folder.
        dir: PathBuf,
    },
    /// A control token that the chat form needs is not in the tokenizer.
    #[error("the tokenizer {} has no control token {name}, which chat form {version} needs", path.display())]
    MissingControlToken {
        /// The tokenizer file.
        path: PathBuf,
        /// The token's text.
        name: String,
        /// The chat form's version.
        version: String,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownId {
        /// The id.
        id: u32,
        /// The number of ids.
        vocab_size: usize,
    },
    /// The text could not be split by the tokenizer's pattern.
    #[error("the tokenizer's pattern failed on the text: {reason}")]
    Pattern {
        /// What the regular expression engine said.
        reason: String,
    },
    /// A conversation that the chat form does not allow.
    #[error("{refusal}: {reason}")]
    Refused {
        /// Which rule was broken.
        refusal: Refusal,
        /// How.
        reason: String,
    },
    /// An image that cannot be decoded or prepared.
    #[error("image {name}: {reason}")]
    Image {
        /// Where the image came from.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The number of bare image parts differs from the number of images supplied.
    #[error(
        "the messages hold {parts} bare image parts but {supplied} images were supplied; give one image for each"
    )]
    ImageCount {
        /// Image parts without a path or data.
        parts: usize,
        /// Images given beside the messages.
        supplied: usize,
    },
}

impl Error {
    pub(crate) fn refused(refusal: Refusal, reason: impl Into<String>) -> Self {
        Self::Refused { refusal, reason: reason.into() }
    }
}
