//! Messages and images in, token ids and pixel values out: tokenizer, chat form, image processor.
//!
//! - [`tokenizer`] reads `tekken.json` and byte-level `tokenizer.json` files and turns text into ids and back.
//! - [`chat`] validates, normalises and renders conversations as `mistral_common` does, control tokens as ids.
//! - [`image`] decodes pictures and prepares the pixel values of the Pixtral tower.
//! - [`Processor`] joins the three for one model folder.

pub mod chat;
mod error;
pub mod image;
pub mod json;
mod processor;
pub mod tokenizer;

pub use chat::{ChatRequest, ReasoningEffort, Refusal, ValidationMode};
pub use error::Error;
pub use image::{ImageBatch, ImageProcessor, ProcessedImage, SourceImage};
pub use processor::{Processor, RenderOptions, Rendered};
pub use tokenizer::{SpecialTokens, TokenizedJson, Tokenizer, TokenizerVersion, tokenize_json};

/// The result of everything in this crate that reads outside input.
pub type Result<T> = std::result::Result<T, Error>;
