//! Low-rank adapters (LoRA, DoRA) beside a checkpoint: which modules they are for, their first values, the files of the
//! `peft` library, and merging.

mod initial;
mod merge;
mod nemo_experts;
mod peft_config;
mod peft_files;
mod targets;

use std::collections::BTreeMap;

use crate::weights::HostTensor;

pub use initial::{LoraInit, LoraSettings};
pub use merge::{merge, merged_tensor};
pub use peft_files::AdapterFiles;
pub use targets::{Target, targets};

/// File with an adapter's matrices.
pub const ADAPTER_MODEL: &str = "adapter_model.safetensors";
/// File with an adapter's settings.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The adapters of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// By the canonical name of the linear map (`model.layers.0.self_attn.o_proj`), or of the stack of experts
    /// (`model.layers.0.mlp.experts.down_proj`).
    pub modules: BTreeMap<String, LoraTensors>,
    /// Weights of the base that an adapter's file brings along and that replace the base's own, by canonical key: peft
    /// saves that of an adapted output projection.
    pub replaced: BTreeMap<String, HostTensor>,
    /// Rank of those that have no other; of each, the tensors tell.
    pub rank: usize,
    /// Numerator of the scale of those that have no other.
    pub alpha: f64,
    /// The model it belongs to: a folder or a hub id.
    pub base_model: Option<String>,
}

/// The adapter of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTensors {
    /// `[r, in]`, or `[E, r, in]` for a stack of experts.
    pub a: HostTensor,
    /// `[out, r]`, or `[E, out, r]`.
    pub b: HostTensor,
    /// Lengths of the rows of the adapted weight (DoRA), `[out]`.
    pub magnitude: Option<HostTensor>,
    /// Factor on `B A`: alpha over the rank.
    pub scale: f64,
}

impl LoraTensors {
    /// Rank.
    pub fn rank(&self) -> usize {
        self.a.shape[self.a.shape.len() - 2]
    }

    /// Shape of the weight that it adapts: `[out, in]` or `[E, out, in]`.
    pub fn weight_shape(&self) -> Vec<usize> {
        let mut shape = self.b.shape.clone();
        shape.pop();
        shape.extend(self.a.shape.last());
        shape
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.a.len() + self.b.len() + self.magnitude.as_ref().map_or(0, HostTensor::len)
    }
}
