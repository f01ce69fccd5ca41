//! What can go wrong between a checkpoint, an input and an answer.

/// Result of the model library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the model library.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither or both of `input_ids` and `inputs_embeds` were given.
    #[error("give exactly one of input_ids and inputs_embeds, got {given}")]
    InputChoice {
        /// `neither` or `both`.
        given: &'static str,
    },
    /// A tensor or list has the wrong number of entries.
    #[error("{name} has {got} entries, expected {expected} ({why})")]
    Length {
        /// Name of the input.
        name: &'static str,
        /// Entries it has.
        got: usize,
        /// Entries it should have.
        expected: usize,
        /// Where the expectation comes from.
        why: String,
    },
    /// A value is outside its range.
    #[error("{name} is {value} at index {index}, allowed is {allowed}")]
    Range {
        /// Name of the input.
        name: &'static str,
        /// The value.
        value: i64,
        /// Where it stands.
        index: usize,
        /// What is allowed.
        allowed: String,
    },
    /// Image tokens in the prompt and features from the tower differ in number.
    #[error(
        "the prompt holds {tokens} image tokens (id {image_token_index}), but the images give {features} features"
    )]
    ImageTokens {
        /// Image tokens in the prompt.
        tokens: usize,
        /// Features from the projector.
        features: usize,
        /// The image token.
        image_token_index: u32,
    },
    /// Images were given to a text-only model.
    #[error("images were given, but this model has no vision tower")]
    NoVision,
    /// A combination of inputs that has no meaning.
    #[error("{0}")]
    Unsupported(String),
    /// Reading or writing a checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] mistral4_checkpoint::Error),
}
