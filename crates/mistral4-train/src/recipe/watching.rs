//! `early_stopping`, `tensorboard`, `mfu`, `moe_metrics`, and the loggers that send metrics away.

use std::path::PathBuf;

use super::reader::Section;
use crate::error::Result;

/// `early_stopping`: when a run ends before its last step.
#[derive(Debug, Clone, PartialEq)]
pub struct EarlyStoppingConfig {
    /// Validations without a lower loss after which the run ends.
    pub patience: usize,
    /// How much lower a loss must be to count as lower.
    pub min_delta: f64,
    /// The held-out set whose loss counts; `None`: the one that decides which checkpoint is best.
    pub monitor: Option<String>,
}

impl EarlyStoppingConfig {
    /// Reads the section; `None` when the recipe has none.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Option<Self>> {
        let Some(mut s) = root.optional_section("early_stopping")? else { return Ok(None) };
        let patience = s.count("patience", "validations without a lower loss after which the run ends")?;
        let Some(patience) = patience else {
            return Err(s.missing("patience", "validations without a lower loss after which the run ends"));
        };
        let config = Self {
            patience,
            min_delta: s.non_negative("min_delta", "how much lower a loss must be to count")?.unwrap_or(0.0),
            monitor: s.text("monitor", "the held-out set whose loss counts")?,
        };
        s.finish()?;
        Ok(Some(config))
    }
}

/// `tensorboard`: event files beside the metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorBoardConfig {
    /// Where they go; `None`: `tensorboard` in the run's folder.
    pub log_dir: Option<PathBuf>,
}

impl TensorBoardConfig {
    /// Reads the section; `None` when the recipe has none, or switches it off.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Option<Self>> {
        let Some(mut s) = root.optional_section("tensorboard")? else { return Ok(None) };
        let enable = s.bool("enable", "writes TensorBoard event files")?.unwrap_or(true);
        let log_dir = s.path("log_dir", "folder of the event files")?;
        s.finish()?;
        Ok(enable.then_some(Self { log_dir }))
    }
}

/// Steps between two records of every expert's load, where `moe_metrics` does not say.
const LOAD_EVERY: usize = 10;

/// Reads `moe_metrics`: steps between two records of every expert's load.
pub(crate) fn read_moe_metrics(root: &mut Section<'_>) -> Result<usize> {
    let mut s = root.section("moe_metrics")?;
    let every = s.count("detailed_every_steps", "steps between two records in expert_load.jsonl")?;
    s.none_of_effect(
        &["enabled", "mode", "top_k_experts"],
        "the load of the experts is always measured, and written in whole to expert_load.jsonl",
    );
    s.finish()?;
    Ok(every.unwrap_or(LOAD_EVERY))
}

/// Reads `mfu.peak_tflops`: what model FLOPs are compared with; `None`: the CPU's measured peak.
pub(crate) fn read_mfu(root: &mut Section<'_>) -> Result<Option<f64>> {
    let mut s = root.section("mfu")?;
    let peak = s.non_negative("peak_tflops", "the device's peak, for the MFU in training.jsonl")?;
    if peak == Some(0.0) {
        return Err(s.refuse("peak_tflops", "a number above 0"));
    }
    s.no_effect("device", "give peak_tflops; without it the peak of the CPU is measured");
    s.finish()?;
    Ok(peak)
}

/// Sections of services that metrics are sent to.
pub(crate) fn read_remote_loggers(root: &mut Section<'_>) {
    root.no_effect(
        "wandb",
        "nothing is sent anywhere: tools/export_to_wandb.py makes an offline run of a run's files",
    );
    root.none_of_effect(&["mlflow", "comet"], "metrics are written to files; nothing is sent anywhere");
}
