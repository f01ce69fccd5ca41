//! What can go wrong, with the file, the line and the key where it did.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where a recipe's value was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// On this line of the recipe, counted from 1.
    Line(usize),
    /// In an override on the command line.
    Override,
}

/// A place in a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The recipe's name, as it was given.
    pub file: Arc<str>,
    /// Line, or override.
    pub origin: Origin,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin {
            Origin::Line(line) => write!(f, "{}:{line}", self.file),
            Origin::Override => write!(f, "{} (override)", self.file),
        }
    }
}

/// Where a row stands in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowPlace {
    /// On this line, counted from 1.
    Line(usize),
    /// In a Parquet file, both counted from 0.
    Parquet {
        /// The row group.
        row_group: usize,
        /// The row of that group.
        row: usize,
    },
}

impl fmt::Display for RowPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RowPlace::Line(line) => write!(f, ":{line}"),
            RowPlace::Parquet { row_group, row } => write!(f, ": row group {row_group}, row {row}"),
        }
    }
}

/// A setting that a recipe may hold but that this build cannot honour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// Where it was set.
    pub location: Location,
    /// Dotted key.
    pub key: String,
    /// The value as written.
    pub value: String,
    /// Why it cannot be honoured, and what to do instead.
    pub reason: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: `{}: {}`: {}", self.location, self.key, self.value, self.reason)
    }
}

/// A closed list of names, and the one that was probably meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcceptedNames {
    /// Every name on the list, the longer forms with module paths left out.
    pub names: Vec<String>,
    /// The name that is spelt most like the one that was written.
    pub nearest: Option<String>,
}

/// Everything that can go wrong between a recipe and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A step gave no number, so that going on would destroy the weights.
    #[error(
        "step {step}: the loss is {loss} and the gradient's norm {grad_norm}; look at rows {rows:?} of the data, lower the learning rate, clip, or set step_scheduler.on_non_finite to skip"
    )]
    NotFinite {
        /// The step.
        step: usize,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Rows of the data set that gave it.
        rows: Vec<usize>,
    },
    /// A step's loss is far above those before it, and the recipe asks to stop then.
    #[error(
        "step {step}: the loss {loss} is above {limit}, the highest that is usual now; look at rows {rows:?} of the data"
    )]
    LossSpike {
        /// The step.
        step: usize,
        /// Its loss.
        loss: f64,
        /// Where a spike begins.
        limit: f64,
        /// Rows of the micro-batch with the highest loss.
        rows: Vec<usize>,
    },
    /// There is no such checkpoint to begin at.
    #[error(
        "checkpoint.restore_from: `{asked}` is no checkpoint, neither in {} ({}) nor as a path",
        folder.display(),
        listed(found)
    )]
    NoCheckpoint {
        /// What was asked for.
        asked: String,
        /// The run's folder.
        folder: PathBuf,
        /// The checkpoints that it holds.
        found: Vec<String>,
    },
    /// The run would come to steps whose checkpoints exist.
    #[error(
        "{} holds checkpoints that a run from step {first_step} would come to and not overwrite: {}; move them away, or choose another checkpoint.checkpoint_dir (to go on from the last one, leave checkpoint.restore_from out)",
        folder.display(),
        later.join(", ")
    )]
    LaterCheckpoints {
        /// The first step of the run.
        first_step: usize,
        /// The run's folder.
        folder: PathBuf,
        /// The checkpoints of that step and later ones.
        later: Vec<String>,
    },
    /// Another rank failed.
    #[error("rank {rank}: {message}")]
    OtherRank {
        /// The rank.
        rank: usize,
        /// What it said.
        message: String,
    },
    /// A checkpoint is never overwritten.
    #[error("{} exists already and is not overwritten; move it away, or choose another checkpoint.checkpoint_dir", path.display())]
    CheckpointExists {
        /// The checkpoint.
        path: PathBuf,
    },
    /// A checkpoint belongs to another run.
    #[error(
        "the run cannot go on from {}: {key} was {saved}, is {current}; use the recipe and data of that run, or choose another checkpoint.checkpoint_dir",
        checkpoint.display()
    )]
    Incompatible {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs.
        key: String,
        /// Value when saved.
        saved: String,
        /// Value now.
        current: String,
    },
    /// A file of a checkpoint is not what was written.
    #[error("{} is damaged: {message}; begin at another checkpoint with checkpoint.restore_from", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The tokenizer or the image processor refused something.
    #[error(transparent)]
    Processor(Box<mistral4_processor::Error>),
    /// The model refused its inputs or its weights.
    #[error(transparent)]
    Model(Box<mistral4::Error>),
    /// A checkpoint could not be read or written.
    #[error(transparent)]
    Checkpoint(Box<mistral4_checkpoint::Error>),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The live page cannot be served.
    #[error("cannot serve the live page on 127.0.0.1:{port}; choose another port")]
    Port {
        /// The port.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// The recipe is not YAML, or YAML of a kind that a recipe may not hold.
    #[error("{location}: {message}")]
    Yaml {
        /// Where.
        location: Location,
        /// What is wrong.
        message: String,
    },
    /// A recipe holds a key that does not exist.
    #[error("{location}: unknown key `{key}`{}", did_you_mean(nearest))]
    UnknownKey {
        /// Where.
        location: Location,
        /// Dotted key.
        key: String,
        /// The known key that is spelt most like it.
        nearest: Option<String>,
    },
    /// A `_target_` (or another name from a closed list) is not on the list.
    #[error(
        "{location}: `{key}: {value}` is not one of the names that a recipe may use{}; accepted: {}",
        did_you_mean(&accepted.nearest),
        accepted.names.join(", ")
    )]
    UnknownName {
        /// Where.
        location: Location,
        /// Dotted key.
        key: String,
        /// The name.
        value: String,
        /// What would be accepted.
        accepted: Box<AcceptedNames>,
    },
    /// A value has the wrong type or range.
    #[error("{location}: `{key}: {value}`: expected {expected}")]
    Value {
        /// Where.
        location: Location,
        /// Dotted key.
        key: String,
        /// The value as written.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A required key is absent.
    #[error("{file}: the recipe needs `{key}`: {purpose}")]
    MissingKey {
        /// The recipe.
        file: Arc<str>,
        /// Dotted key.
        key: String,
        /// What the key is for.
        purpose: String,
    },
    /// A `${VAR}` names an environment variable that is not set.
    #[error(
        "{location}: `{key}` needs the environment variable {variable}, which is not set; set it, or write a default as ${{{variable},default}}"
    )]
    MissingVariable {
        /// Where.
        location: Location,
        /// Dotted key.
        key: String,
        /// The variable.
        variable: String,
    },
    /// A command-line override cannot be understood.
    #[error("override `{argument}`: {message}")]
    Override {
        /// The argument.
        argument: String,
        /// What is wrong.
        message: String,
    },
    /// The recipe is well formed but asks for what this build does not do.
    #[error("this recipe cannot run here:{}", lines(blockers))]
    NotRunnable {
        /// Each setting, with its reason.
        blockers: Vec<Blocker>,
    },
    /// The recipe names data that must be downloaded first.
    #[error("this recipe names data that are not here:{}", lines(missing))]
    Missing {
        /// Each setting, with what to do.
        missing: Vec<Blocker>,
    },
    /// Numbers of a recipe contradict each other.
    #[error("`{key}: {value}`: {message}")]
    Inconsistent {
        /// Dotted key.
        key: String,
        /// The value.
        value: String,
        /// What contradicts it, with the arithmetic.
        message: String,
    },
    /// The ranks of a pipeline read different batches.
    #[error(
        "rank {from} of the pipeline sent {got}, and {expected} were due: the ranks' data or recipes differ"
    )]
    Pipeline {
        /// The sender.
        from: usize,
        /// What it sent.
        got: String,
        /// What this rank's own batch calls for.
        expected: String,
    },
    /// A row of a data file is malformed.
    #[error("{}{place}: field `{field}`: {message}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// Where in it.
        place: RowPlace,
        /// The field of the row.
        field: String,
        /// What is wrong.
        message: String,
    },
    /// A data set as a whole cannot be used.
    #[error("{}: {message}", path.display())]
    Dataset {
        /// The data file or folder.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A saved position does not belong to this data.
    #[error("the saved data position does not fit this run: {field} was {saved}, is {current}")]
    Resume {
        /// What differs.
        field: &'static str,
        /// Value when saved.
        saved: String,
        /// Value now.
        current: String,
    },
}

impl From<mistral4::Error> for Error {
    fn from(error: mistral4::Error) -> Self {
        Error::Model(Box::new(error))
    }
}

impl From<mistral4_checkpoint::Error> for Error {
    fn from(error: mistral4_checkpoint::Error) -> Self {
        Error::Checkpoint(Box::new(error))
    }
}

impl From<mistral4_processor::Error> for Error {
    fn from(error: mistral4_processor::Error) -> Self {
        Error::Processor(Box::new(error))
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "which holds none".to_owned() } else { format!("which holds {}", names.join(", ")) }
}

fn lines(blockers: &[Blocker]) -> String {
    blockers.iter().map(|blocker| format!("\n  {blocker}")).collect()
}
