//! Configuration and weights of Mistral 4 checkpoints: config.json, params.json, safetensors, FP8, hub.

pub mod config;
