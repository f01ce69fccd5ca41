//! Configuration and weights of Mistral 4 checkpoints: config.json, params.json, safetensors, FP8, hub.

pub mod adapter;
pub mod config;
mod error;
pub mod hub;
pub mod init;
pub mod inspect;
mod json;
pub mod weights;

pub use error::{Error, Result};
pub use init::initial_tensor;
