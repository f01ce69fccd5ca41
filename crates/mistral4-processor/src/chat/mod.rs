//! Conversations: reading, checking, normalising and rendering them as `mistral_common` does.
//!
//! A request passes three steps, in this order: it is read and its types checked ([`ChatRequest::from_json`]), the rules
//! of the tokenizer's version are checked ([`validate`]), and neighbouring messages of one role are joined before the
//! turns are written as token ids ([`ChatRenderer::render`]). Control tokens are written as ids and never by encoding
//! their text, so a message that spells `[INST]` stays a message.
//!
//! Source: `mistral_common` 1.13.1, `protocol/instruct` and `tokens/tokenizers/instruct.py`.

mod normalize;
mod python_regex;
mod read;
mod render;
mod request;
mod schema;
mod validate;

pub use render::{ChatRenderer, ImagePlaceholders, RenderedChat, TokenKind};
pub use request::{
    ChatRequest, Content, ImageSource, Message, Part, ReasoningEffort, Refusal, ResponseFormat, Tool,
    ToolCall, ValidationMode,
};
pub use validate::validate;
