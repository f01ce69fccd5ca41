//! `checkpoint`.

use std::path::PathBuf;

use super::reader::Section;
use crate::error::Result;

/// Where a run begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RestoreFrom {
    /// At the run's last checkpoint, or from the start where there is none.
    Latest,
    /// At the run's checkpoint with the lowest held-out loss.
    LowestVal,
    /// At a checkpoint of the run by its name, or at any by its path.
    Named(String),
}

/// `checkpoint`: whether, where and how training is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// Whether checkpoints are saved.
    pub enabled: bool,
    /// Folder of the run: checkpoints, `training.jsonl`, the loss curve.
    pub checkpoint_dir: PathBuf,
    /// Where the run begins.
    pub restore_from: RestoreFrom,
    /// How many of the last checkpoints are kept; the best one is kept besides. `None`: all.
    pub max_recent_checkpoints: Option<usize>,
    /// The held-out set that decides which checkpoint is best, where there are several.
    pub best_metric_key: String,
    /// Whether training goes on while a checkpoint is written.
    pub is_async: bool,
}

impl CheckpointConfig {
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        let mut s = root.section("checkpoint")?;
        let restore_from =
            s.text("restore_from", "the checkpoint to continue from; by default the last one")?;
        let config = Self {
            enabled: s.bool("enabled", "whether checkpoints are saved")?.unwrap_or(true),
            checkpoint_dir: s
                .path("checkpoint_dir", "folder of checkpoints and metrics")?
                .unwrap_or_else(|| PathBuf::from("checkpoints")),
            restore_from: match restore_from.as_deref() {
                None | Some("LATEST") => RestoreFrom::Latest,
                Some("LOWEST_VAL") => RestoreFrom::LowestVal,
                Some(name) => RestoreFrom::Named(name.to_owned()),
            },
            max_recent_checkpoints: s.count(
                "max_recent_checkpoints",
                "how many of the last checkpoints are kept, besides the best one",
            )?,
            best_metric_key: s
                .text("best_metric_key", "the held-out set whose loss decides which checkpoint is best")?
                .unwrap_or_else(|| "default".to_owned()),
            is_async: s.bool("is_async", "training goes on while a checkpoint is written")?.unwrap_or(false),
        };
        if restore_from.is_some() && !config.enabled {
            return Err(s.refuse("restore_from", "no `restore_from` where checkpoints are not `enabled`"));
        }
        s.unsupported_unless("model_save_format", "checkpoints are written as safetensors only", |node| {
            node.to_string() == "safetensors"
        });
        s.unsupported_unless(
            "dequantize_base_checkpoint",
            "FP8 weights are always dequantised before they are trained",
            |node| node.to_string() == "true",
        );
        s.no_effect("is_peft", "adapters are saved where the recipe has a `peft` section");
        s.none_of_effect(
            &[
                "save_consolidated",
                "single_rank_consolidation",
                "staging_dir",
                "consolidation_timeout_minutes",
            ],
            "every checkpoint is a whole Hugging Face folder",
        );
        s.none_of_effect(&["wait_for_staging", "cpu_offload"], "a checkpoint is written from host memory");
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
