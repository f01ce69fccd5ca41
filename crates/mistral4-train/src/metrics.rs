//! `training.jsonl`, `validation.jsonl` and the line that a terminal shows for a step.
//!
//! Source: NVIDIA NeMo AutoModel, `components/loggers/metric_logger.py` and `log_train_metrics` of its recipes.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What one optimizer step measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer step, counted from 0.
    pub step: usize,
    /// Pass over the data, counted from 0.
    pub epoch: usize,
    /// When, in UTC (RFC 3339, milliseconds).
    pub timestamp: String,
    /// Exact token mean of the loss over the global batch; null in the file where it is no finite number.
    #[serde(with = "number_or_null")]
    pub loss: f64,
    /// L2 norm of the gradient before clipping; null in the file where it is no finite number.
    #[serde(with = "number_or_null")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Largest memory of this process so far, in GiB; 0 where the system does not tell.
    pub mem: f64,
    /// Tokens (padding left out) a second.
    pub tps: f64,
    /// The same for one device.
    pub tps_per_gpu: f64,
    /// Tokens of the step, padding left out.
    pub num_tokens_per_step: usize,
    /// Positions that were learned.
    pub num_label_tokens: usize,
    /// Anything else that was measured, by name.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// What one validation measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationMetrics {
    /// The optimizer step after which it was measured.
    pub step: usize,
    /// Pass over the data, counted from 0.
    pub epoch: usize,
    /// When, in UTC (RFC 3339, milliseconds).
    pub timestamp: String,
    /// Token mean of the loss over the held-out set; null in the file where it is no finite number.
    #[serde(with = "number_or_null")]
    pub val_loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Positions that were measured.
    pub num_label_tokens: usize,
    /// Largest memory of this process so far, in GiB; 0 where the system does not tell.
    pub mem: f64,
    /// Share of held-out answers that are right, 0 to 1, where answers can be checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

/// JSON has no infinities and no NaN: they are written as null, and null is read as NaN.
pub(crate) mod number_or_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(number: &f64, to: S) -> Result<S::Ok, S::Error> {
        number.is_finite().then_some(*number).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
    }
}

impl fmt::Display for StepMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {} | epoch {} | loss {:.4} | grad_norm {:.4} | lr {} | mem {:.2} GiB | tps {:.2}({:.2}/gpu) | \
             num_label_tokens {}",
            self.step,
            self.epoch,
            self.loss,
            self.grad_norm,
            scientific(self.lr),
            self.mem,
            self.tps,
            self.tps_per_gpu,
            self.num_label_tokens
        )
    }
}

impl fmt::Display for ValidationMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[val] step {} | epoch {} | loss {:.4}", self.step, self.epoch, self.val_loss)?;
        if let Some(accuracy) = self.accuracy {
            write!(f, " | accuracy {:.2}%", accuracy * 100.0)?;
        }
        write!(f, " | lr {} | num_label_tokens {}", scientific(self.lr), self.num_label_tokens)
    }
}

/// `1.00e-03`, as C and Python write it.
fn scientific(value: f64) -> String {
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = match exponent.strip_prefix('-') {
                Some(digits) => ('-', digits),
                None => ('+', exponent),
            };
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    }
}

/// Now, in UTC, to the millisecond: `2026-01-31T12:00:00.000Z`.
pub fn timestamp() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

/// Largest memory that this process has had, in GiB; 0 where the system does not tell.
pub fn peak_memory_gib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0.0);
    kib / (1024.0 * 1024.0)
}

/// Where the tokens of one step went, a line of `expert_load.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertLoad {
    /// Optimizer step, counted from 0.
    pub step: usize,
    /// The layers with experts.
    pub layers: Vec<LayerLoad>,
}

/// Tokens sent to each expert of a layer in one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Its place in the model.
    pub layer: usize,
    /// `[E]`
    pub tokens: Vec<u64>,
}

/// How a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Steps are taken, unless the process was killed.
    Running,
    /// All steps were taken, or it stopped early because a held-out loss no longer fell.
    Finished,
    /// It was asked to stop.
    Stopped,
    /// It ended with an error.
    Failed,
}

/// `status.json` in a run's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunStatus {
    /// How it stands.
    pub state: RunState,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// Those that are trained.
    pub trained_parameters: usize,
    /// Why it ended, where that needs saying.
    pub message: Option<String>,
}

impl RunStatus {
    const FILE: &'static str = "status.json";

    /// Writes it to a run's folder, whole or not at all.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(Self::FILE);
        let failed = |source| Error::Write { path: path.clone(), source };
        let partial = path.with_extension("json.partial");
        let text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))?;
        std::fs::write(&partial, text).map_err(failed)?;
        std::fs::rename(&partial, &path).map_err(failed)
    }

    /// Reads it from a run's folder; `None` where there is none that can be understood.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(Self::FILE);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Read { path, source }),
        }
    }
}

/// Appends records to a JSONL file, each written through at once, so that a killed run keeps its lines.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens a file for a run that begins at `first_step`: lines of later steps, left by a run that was resumed from
    /// an earlier checkpoint, and a last line that was cut short are taken out.
    ///
    /// # Errors
    /// A folder or file that cannot be made or written.
    pub fn open(path: &Path, first_step: usize) -> Result<Self> {
        let failed = |source| Error::Write { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let kept = match std::fs::read_to_string(path) {
            Ok(text) => kept_lines(&text, first_step),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(failed(error)),
        };
        let partial = path.with_extension("jsonl.partial");
        std::fs::write(&partial, kept).map_err(failed)?;
        std::fs::rename(&partial, path).map_err(failed)?;
        let file = OpenOptions::new().append(true).open(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes one record as a line.
    ///
    /// # Errors
    /// A full disk or a file that went away.
    pub fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let failed = |source| Error::Write { path: self.path.clone(), source };
        let mut line = serde_json::to_string(record).map_err(|error| failed(error.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(failed)?;
        self.file.flush().map_err(failed)
    }

    /// Brings the lines to the medium, so that a checkpoint never knows of steps that the file has lost.
    ///
    /// # Errors
    /// A disk that fails.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::Write { path: self.path.clone(), source })
    }
}

/// The whole lines of steps before `first_step`.
fn kept_lines(text: &str, first_step: usize) -> String {
    #[derive(Deserialize)]
    struct Step {
        step: usize,
    }
    let mut kept = String::new();
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        if serde_json::from_str::<Step>(line).is_ok_and(|record| record.step < first_step) {
            kept.push_str(line);
        }
    }
    kept
}

/// The files of held-out results in a run's folder, with the names of their sets: `default` first, then by name.
///
/// # Errors
/// A folder that cannot be read.
pub fn validation_files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let failed = |source| Error::Read { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| {
            let set = name.strip_prefix("validation")?.strip_suffix(".jsonl")?;
            Some(if set.is_empty() { "default" } else { set.strip_prefix('_')? }.to_owned())
        });
        files.extend(name.map(|name| (name, path)));
    }
    files.sort_by(|(a, _), (b, _)| (a != "default", a).cmp(&(b != "default", b)));
    Ok(files)
}

/// Reads a metrics file; lines that are not records of this kind are left out.
///
/// # Errors
/// A file that cannot be read.
pub fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 0,
            timestamp: timestamp(),
            loss: 2.5,
            grad_norm: 0.75,
            lr: 1e-3,
            mem: 1.5,
            tps: 1234.5,
            tps_per_gpu: 1234.5,
            num_tokens_per_step: 64,
            num_label_tokens: 60,
            more: serde_json::Map::new(),
        }
    }

    #[test]
    fn a_step_is_shown_as_nemo_shows_it() {
        assert_eq!(
            step(3).to_string(),
            "step 3 | epoch 0 | loss 2.5000 | grad_norm 0.7500 | lr 1.00e-03 | mem 1.50 GiB | \
             tps 1234.50(1234.50/gpu) | num_label_tokens 60"
        );
        assert_eq!(scientific(0.0), "0.00e+00");
        assert_eq!(scientific(12345.0), "1.23e+04");
    }

    #[test]
    fn lines_hold_the_keys_of_the_reference() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/training.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        let mut first = step(0);
        first.more.insert("expert_load_entropy".to_owned(), 0.9.into());
        file.write(&first).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        for key in [
            "step",
            "epoch",
            "timestamp",
            "loss",
            "grad_norm",
            "lr",
            "mem",
            "tps",
            "tps_per_gpu",
            "num_tokens_per_step",
            "num_label_tokens",
            "expert_load_entropy",
        ] {
            assert!(line.get(key).is_some(), "{key} is not in {text}");
        }
        let time = line["timestamp"].as_str().unwrap();
        assert_eq!((time.len(), &time[10..11], &time[23..]), (24, "T", "Z"));
        assert_eq!(read::<StepMetrics>(&path).unwrap(), [first]);
    }

    #[test]
    fn a_resumed_run_drops_later_and_broken_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("training.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        for i in 0..5 {
            file.write(&step(i)).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"step\": 1, \"lo")
            .unwrap();
        let mut file = MetricsFile::open(&path, 3).unwrap();
        file.write(&step(3)).unwrap();
        let steps: Vec<_> = read::<StepMetrics>(&path).unwrap().iter().map(|record| record.step).collect();
        assert_eq!(steps, [0, 1, 2, 3]);
    }

    #[test]
    fn losses_that_are_no_number_are_null_and_read_back() {
        let nan = StepMetrics { loss: f64::NAN, grad_norm: f64::INFINITY, ..step(0) };
        let line = serde_json::to_string(&nan).unwrap();
        assert!(line.contains("\"loss\":null,\"grad_norm\":null"), "{line}");
        let back: StepMetrics = serde_json::from_str(&line).unwrap();
        assert!(back.loss.is_nan() && back.lr == nan.lr);
    }

    #[test]
    fn memory_is_measured_on_linux() {
        if cfg!(target_os = "linux") {
            assert!(peak_memory_gib() > 0.0);
        }
    }
}
