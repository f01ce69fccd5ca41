//! What the page is told, read from the files of a run as they grow.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::metrics::{ExpertLoad, RunStatus, StepMetrics, ValidationMetrics, validation_files};

/// An answer to the page.
#[derive(Debug, Serialize)]
pub(super) struct News {
    /// Changes when the files begin anew.
    generation: i64,
    status: Status,
    /// Columns: step, loss, rate, tokens a second, gradient norm, memory, MFU, time in milliseconds, tokens, entropy of
    /// the experts' load, its largest over its mean.
    steps: Vec<[Option<f64>; 11]>,
    /// `[step, loss]` of every validation, by the name of the set.
    validations: BTreeMap<String, Vec<(usize, Option<f64>)>>,
    load: Option<ExpertLoad>,
}

#[derive(Debug, Serialize)]
struct Status {
    title: String,
    #[serde(flatten)]
    run: Option<RunStatus>,
}

/// The files of a run.
pub(super) struct Feed {
    folder: PathBuf,
    generation: i64,
    steps: Tail<StepMetrics>,
    validations: BTreeMap<String, Tail<ValidationMetrics>>,
    load: Tail<ExpertLoad>,
}

impl Feed {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            generation: 0,
            steps: Tail::new(folder.join("training.jsonl")),
            validations: BTreeMap::new(),
            load: Tail::new(folder.join("expert_load.jsonl")),
        }
    }

    /// What is new to a client that has seen every step up to `after` of a generation.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(super) fn news(&mut self, generation: i64, after: i64) -> Result<News> {
        if self.steps.refresh()? {
            self.generation += 1;
        }
        self.load.refresh()?;
        self.load.records.drain(..self.load.records.len().saturating_sub(1));
        self.find_validations();
        for tail in self.validations.values_mut() {
            tail.refresh()?;
        }
        let after = if generation == self.generation { after } else { -1 };
        let first = self.steps.records.partition_point(|step| (step.step as i64) <= after);
        let losses = |tail: &Tail<ValidationMetrics>| {
            tail.records.iter().map(|v| (v.step, finite(v.val_loss))).collect::<Vec<_>>()
        };
        let name = std::fs::canonicalize(&self.folder).unwrap_or_else(|_| self.folder.clone());
        let title =
            name.file_name().map_or_else(|| "training".to_owned(), |n| n.to_string_lossy().into_owned());
        Ok(News {
            generation: self.generation,
            status: Status { title, run: RunStatus::read(&self.folder)? },
            steps: self.steps.records[first..].iter().map(columns).collect(),
            validations: self.validations.iter().map(|(name, tail)| (name.clone(), losses(tail))).collect(),
            load: self.load.records.last().cloned(),
        })
    }

    /// Held-out sets write their first line later than the training does.
    fn find_validations(&mut self) {
        for (name, path) in validation_files(&self.folder).unwrap_or_default() {
            self.validations.entry(name).or_insert_with(|| Tail::new(path));
        }
    }
}

fn columns(step: &StepMetrics) -> [Option<f64>; 11] {
    let more = |key: &str| step.more.get(key).and_then(serde_json::Value::as_f64);
    let time = step.timestamp.parse::<jiff::Timestamp>().ok().map(|time| time.as_millisecond() as f64);
    [
        Some(step.step as f64),
        finite(step.loss),
        finite(step.lr),
        finite(step.tps),
        finite(step.grad_norm),
        finite(step.mem),
        more("mfu"),
        time,
        Some(step.num_tokens_per_step as f64),
        more("expert_load_entropy"),
        more("expert_load_max_over_mean"),
    ]
}

fn finite(number: f64) -> Option<f64> {
    number.is_finite().then_some(number)
}

/// A file of JSON lines that grows.
struct Tail<T> {
    path: PathBuf,
    records: Vec<T>,
    read: u64,
    /// What tells this file from another that took its name.
    identity: u64,
}

impl<T: DeserializeOwned> Tail<T> {
    fn new(path: PathBuf) -> Self {
        Self { path, records: Vec::new(), read: 0, identity: 0 }
    }

    /// Reads the lines that were added; true when the file is another one or shorter, and was read anew.
    fn refresh(&mut self) -> Result<bool> {
        let failed = |source| Error::Read { path: self.path.clone(), source };
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        let is_new = metadata.len() < self.read || identity(&metadata) != self.identity;
        if is_new {
            self.records.clear();
            self.read = 0;
            self.identity = identity(&metadata);
        }
        file.seek(SeekFrom::Start(self.read)).map_err(failed)?;
        let mut added = Vec::new();
        file.read_to_end(&mut added).map_err(failed)?;
        // A line without its end is still being written.
        let whole = added.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        self.read += whole as u64;
        let lines = added[..whole].split(|&byte| byte == b'\n');
        self.records.extend(lines.filter_map(|line| serde_json::from_slice(line).ok()));
        Ok(is_new)
    }
}

#[cfg(unix)]
fn identity(metadata: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn identity(_: &std::fs::Metadata) -> u64 {
    0
}
