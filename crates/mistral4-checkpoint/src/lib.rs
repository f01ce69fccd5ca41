//! Configuration and weights of Mistral 4 checkpoints: config.json, params.json, safetensors, FP8, hub.

pub mod config;
mod error;
mod json;
pub mod weights;

pub use error::{Error, Result};
