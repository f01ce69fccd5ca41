//! `checkpoint`.

use std::path::PathBuf;

use super::reader::Section;
use crate::error::Result;

/// `checkpoint`: whether, where and how training is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// Whether checkpoints are saved.
    pub enabled: bool,
    /// Folder of the run: checkpoints, `training.jsonl`, the loss curve.
    pub checkpoint_dir: PathBuf,
}

impl CheckpointConfig {
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        let mut s = root.section("checkpoint")?;
        let config = Self {
            enabled: s.bool("enabled", "whether checkpoints are saved")?.unwrap_or(true),
            checkpoint_dir: s
                .path("checkpoint_dir", "folder of checkpoints and metrics")?
                .unwrap_or_else(|| PathBuf::from("checkpoints")),
        };
        s.unsupported_unless("model_save_format", "checkpoints are written as safetensors only", |node| {
            node.to_string() == "safetensors"
        });
        s.unsupported_unless(
            "dequantize_base_checkpoint",
            "FP8 weights are always dequantised before they are trained",
            |node| node.to_string() == "true",
        );
        s.unsupported("is_peft", "LoRA is not supported yet");
        s.unsupported("restore_from", "resuming is not supported yet");
        s.unsupported("max_recent_checkpoints", "old checkpoints are not removed yet");
        s.unsupported_unless("best_metric_key", "the best checkpoint is not tracked yet", |node| {
            node.to_string() == "default"
        });
        s.none_of_effect(
            &[
                "save_consolidated",
                "single_rank_consolidation",
                "staging_dir",
                "consolidation_timeout_minutes",
            ],
            "every checkpoint is a whole Hugging Face folder",
        );
        s.none_of_effect(&["is_async", "wait_for_staging", "cpu_offload"], "saving waits until it is done");
        s.none_of_effect(
            &["model_cache_dir", "model_repo_id", "original_model_root_dir", "model_state_dict_keys"],
            "found from model.pretrained_model_name_or_path",
        );
        s.none_of_effect(
            &["v4_compatible", "diffusers_compatible", "allow_legacy_pickle_restore"],
            "the folder is in transformers' form; no pickle is ever read",
        );
        s.none_of_effect(&["skip_task_head_prefixes_for_base_model"], "the model has one head");
        s.finish()?;
        Ok(config)
    }
}
