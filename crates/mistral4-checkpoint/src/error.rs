//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a configuration, a checkpoint folder or the hub; each names the file and the key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file that should be JSON is not.
    #[error("{}: not valid JSON: {problem}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What the parser found, with line and column.
        problem: String,
    },
    /// A configuration value that this library rejects.
    #[error("{}: `{key}` is {value}: {problem}; {fix}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// Dotted key.
        key: String,
        /// The value found, as JSON, or `absent`.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// A file that is no Mistral 4 configuration at all.
    #[error("{}: {problem}; {fix}", path.display())]
    NotAModel {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// No preset has this name.
    #[error("unknown preset `{name}`; the presets are {known}")]
    UnknownPreset {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A safetensors file whose header cannot be trusted.
    #[error("{}: malformed safetensors file: {problem}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An index of shards that cannot be used.
    #[error("{}: malformed index: {problem}", file.display())]
    Index {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A tensor that cannot be used as stored.
    #[error("{}: tensor `{key}`: {problem}", file.display())]
    Tensor {
        /// The file that holds it, or the folder.
        file: PathBuf,
        /// Its key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// The index names shards that are not there.
    #[error("{}: {} of {total} shards are missing: {}", index.display(), missing.len(), list(missing))]
    MissingShards {
        /// The index file.
        index: PathBuf,
        /// Shards not found.
        missing: Vec<String>,
        /// Shards named.
        total: usize,
    },
    /// The tensors of a checkpoint are not those of the model.
    #[error("{}: the tensors do not fit the model: {report}", folder.display())]
    Mismatch {
        /// The checkpoint.
        folder: PathBuf,
        /// Everything that differs.
        report: crate::weights::CheckReport,
    },
    /// The model cannot be written in the format asked for.
    #[error("cannot write `{key}` in {format} form: {problem}")]
    Unrepresentable {
        /// Key of the configuration or of a tensor.
        key: String,
        /// The format.
        format: &'static str,
        /// Why.
        problem: String,
    },
    /// Settings of adapters that contradict each other or the model.
    #[error("`{key}: {value}`: {problem}")]
    AdapterSettings {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An adapter that does not belong to the model, or of a kind that is not read.
    #[error("{}: `{key}`: {problem}", file.display())]
    Adapter {
        /// The file.
        file: PathBuf,
        /// Key of the setting or tensor.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The hub did not deliver.
    #[error("{model}: {problem}; {fix}")]
    Hub {
        /// Model asked for.
        model: String,
        /// What happened.
        problem: String,
        /// What to do.
        fix: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error + use<> {
        let path = path.to_path_buf();
        move |source| Error::Io { path, action, source }
    }
}

/// The first names of a list, with how many were left out.
pub(crate) fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
