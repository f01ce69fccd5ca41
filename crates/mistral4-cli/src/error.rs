//! The one error type of the program: a kind, which is the exit code, a chain of messages and a hint.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use mistral4_checkpoint::Error as CheckpointError;
use mistral4_processor::Error as ProcessorError;
use mistral4_train::Error as TrainError;

/// Result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who has to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The run failed: the disk, the device, the program itself.
    Failed,
    /// Wrong usage or bad input: a flag, a file, a configuration.
    Input,
}

impl ErrorKind {
    /// The program's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Failed => 1,
            ErrorKind::Input => 2,
        }
    }
}

/// Why a command did not finish. Shown as one chain, `error: outer: inner`, and one line `hint: ...`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    chain: Vec<String>,
    hint: String,
}

impl Error {
    /// Wrong usage or bad input.
    pub fn input(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Input, chain: vec![message.into()], hint: hint.into() }
    }

    /// A failed run.
    pub fn failed(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Failed, chain: vec![message.into()], hint: hint.into() }
    }

    /// A file given by the user that cannot be read.
    pub fn unreadable(path: &Path, source: &io::Error) -> Self {
        Error::input(
            format!("{}: cannot read: {source}", path.display()),
            match source.kind() {
                io::ErrorKind::NotFound => "check the path",
                io::ErrorKind::PermissionDenied => "check the file's permissions",
                io::ErrorKind::IsADirectory => "give a file, not a folder",
                io::ErrorKind::InvalidData => "give a text file in UTF-8",
                _ => "check the file",
            },
        )
    }

    /// A file that cannot be written.
    pub fn unwritable(path: &Path, source: &io::Error) -> Self {
        Error::failed(
            format!("{}: cannot write: {source}", path.display()),
            "check that the folder exists, may be written to and has space",
        )
    }

    /// Who has to act.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Puts what was being done before the chain.
    #[must_use]
    pub fn context(mut self, doing: impl Into<String>) -> Self {
        self.chain.insert(0, doing.into());
        self
    }

    /// Replaces the hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// A library's error with the chain of its sources, those left out that its own message already holds.
    fn from_library(kind: ErrorKind, error: &dyn std::error::Error, hint: impl Into<String>) -> Self {
        let mut chain = vec![error.to_string()];
        let mut source = error.source();
        while let Some(inner) = source {
            let message = inner.to_string();
            if !chain.last().is_some_and(|outer| outer.contains(&message)) {
                chain.push(message);
            }
            source = inner.source();
        }
        Error { kind, chain, hint: hint.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}\nhint: {}", self.chain.join(": "), self.hint)
    }
}

impl std::error::Error for Error {}

impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Self {
        use CheckpointError as E;
        let input = |message: String, hint: &str| Error::input(message, hint);
        match &error {
            E::Io { action, source, .. } => {
                let kind = match *action {
                    "read" | "open" | "list" | "map" => ErrorKind::Input,
                    _ => ErrorKind::Failed,
                };
                let hint = match (kind, source.kind()) {
                    (ErrorKind::Input, io::ErrorKind::NotFound) => "check the path",
                    (ErrorKind::Input, io::ErrorKind::PermissionDenied) => "check the file's permissions",
                    (ErrorKind::Input, _) => "check the file",
                    (ErrorKind::Failed, _) => {
                        "check that the folder may be written to and that the disk has space"
                    }
                };
                Error::from_library(kind, &error, hint)
            }
            E::Json { .. } => Error::from_library(
                ErrorKind::Input,
                &error,
                "the file may be cut off or not what it seems; fetch or write it again",
            ),
            E::Config { file, key, value, problem, fix } => {
                input(format!("{}: `{key}` is {value}: {problem}", file.display()), fix)
            }
            E::NotAModel { path, problem, fix } => input(format!("{}: {problem}", path.display()), fix),
            E::UnknownPreset { name, known } => {
                input(format!("unknown preset `{name}`"), &format!("the presets are {known}"))
            }
            E::Header { .. } => Error::from_library(
                ErrorKind::Input,
                &error,
                "the file is probably incomplete; fetch or copy it again and compare its size",
            ),
            E::Tensor { .. } => Error::from_library(
                ErrorKind::Input,
                &error,
                "the weights do not belong to this configuration, or the file is damaged",
            ),
            E::MissingShards { .. } => {
                Error::from_library(ErrorKind::Input, &error, "copy the missing files into the folder")
            }
            E::Mismatch { .. } => Error::from_library(
                ErrorKind::Input,
                &error,
                "weights and config.json belong to different models; `mistral4 inspect FOLDER --all` lists the tensors",
            ),
            E::Unrepresentable { format, .. } => {
                Error::from_library(ErrorKind::Input, &error, format!("choose a form other than {format}"))
            }
            E::AdapterSettings { .. } => {
                Error::from_library(ErrorKind::Input, &error, "change the recipe's `peft` section")
            }
            E::Adapter { .. } => Error::from_library(
                ErrorKind::Input,
                &error,
                "give the adapter's own base model, and an adapter in the form of the peft library",
            ),
            E::Hub { model, problem, fix } => input(format!("{model}: {problem}"), fix),
            _ => Error::from_library(ErrorKind::Input, &error, "check the model folder"),
        }
    }
}

impl From<mistral4::Error> for Error {
    fn from(error: mistral4::Error) -> Self {
        use mistral4::Error as E;
        let hint = match error {
            E::Checkpoint(inner) => return inner.into(),
            E::ImageTokens { .. } => {
                "each image needs one image token for each of its merged patches; `mistral4 tokenize --outputs` writes matching inputs"
            }
            E::NoVision => "use a multimodal checkpoint, or leave the images out",
            E::Range { name: "input_ids", .. } => {
                "the ids come from another tokenizer than the model's; check that folder and tokenizer belong together"
            }
            _ => "correct the input",
        };
        Error::from_library(ErrorKind::Input, &error, hint)
    }
}

impl From<ProcessorError> for Error {
    fn from(error: ProcessorError) -> Self {
        use ProcessorError as E;
        let hint = match &error {
            E::Io { .. } => "check the path",
            E::Malformed { .. } | E::MissingControlToken { .. } => {
                "use the tokenizer and processor files that belong to the model"
            }
            E::MissingTokenizer { .. } => {
                "text needs the model's tekken.json or tokenizer.json in its folder"
            }
            E::UnknownId { .. } => "the tokenizer does not belong to these ids",
            E::Pattern { .. } => "split the text into shorter pieces",
            E::Refused { .. } => "change the conversation; the chat form follows mistral_common",
            E::Image { .. } => "give a PNG, JPEG, WebP, GIF or BMP file",
            E::ImageCount { .. } => "repeat --image FILE once for each image part without a path",
            _ => "check the model folder and the input",
        };
        Error::from_library(ErrorKind::Input, &error, hint)
    }
}

impl From<TrainError> for Error {
    fn from(error: TrainError) -> Self {
        use TrainError as E;
        let error = match error {
            E::Processor(inner) => return (*inner).into(),
            E::Model(inner) => return (*inner).into(),
            E::Checkpoint(inner) => return (*inner).into(),
            other => other,
        };
        let (kind, hint) = match &error {
            E::NotFinite { .. } | E::LossSpike { .. } => {
                (ErrorKind::Failed, "the last checkpoint is untouched; start from it with other settings")
            }
            E::OtherRank { .. } => (ErrorKind::Failed, "that rank says more"),
            E::Read { .. } => (ErrorKind::Input, "check the path"),
            E::Port { .. } => (ErrorKind::Input, "give another port; 0 takes any that is free"),
            E::Write { .. } => (ErrorKind::Failed, "check that the folder may be written to and has space"),
            E::Yaml { .. } => (ErrorKind::Input, "correct the recipe at this line"),
            E::UnknownKey { .. } => (
                ErrorKind::Input,
                "keys follow NeMo AutoModel; `mistral4 train RECIPE.yaml --dry-run` lists what each key does",
            ),
            E::UnknownName { .. } => (ErrorKind::Input, "write one of the accepted names"),
            E::Override { .. } => (ErrorKind::Input, "overrides read `--section.key value`"),
            E::NotRunnable { .. } => (ErrorKind::Input, "remove or change these settings"),
            E::Missing { .. } => (ErrorKind::Input, "download the data, and point these keys at them"),
            E::Row { .. } | E::Dataset { .. } => (ErrorKind::Input, "correct the data"),
            E::Resume { .. } => (
                ErrorKind::Input,
                "continue with the recipe and data of the saved run, or start a new folder",
            ),
            _ => (ErrorKind::Input, "correct the recipe"),
        };
        Error::from_library(kind, &error, hint)
    }
}

/// Turns a panic, which is a defect of the program, into an error, so that the exit code stays one of the three.
pub(crate) fn catch_panics(run: impl FnOnce() -> Result<()>) -> Result<()> {
    let place = Arc::new(Mutex::new(String::new()));
    let noted = Arc::clone(&place);
    let default_hook = Arc::new(std::panic::take_hook());
    let hook = Arc::clone(&default_hook);
    std::panic::set_hook(Box::new(move |info| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            hook(info);
        }
        let at = info.location().map(|location| format!(" ({location})")).unwrap_or_default();
        *noted.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }));
    let result = catch_unwind(AssertUnwindSafe(run));
    std::panic::set_hook(Box::new(move |info| default_hook(info)));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        let place = place.lock().unwrap_or_else(PoisonError::into_inner);
        Err(Error::failed(
            format!("the program met a state that it should not: {text}{place}"),
            "this is a defect; please report it with the command line and what RUST_BACKTRACE=1 adds",
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_the_message_already_holds_is_not_repeated() {
        let source = io::Error::other("disk on fire");
        let error = CheckpointError::Io { path: "a/b".into(), action: "write", source };
        let error = Error::from(error).context("saving");
        assert_eq!(error.kind(), ErrorKind::Failed);
        let text = error.to_string();
        assert!(text.starts_with("error: saving: a/b: cannot write: disk on fire\nhint: "), "{text}");
    }

    #[test]
    fn reading_is_input_and_writing_is_a_failed_run() {
        let of = |action| {
            let source = io::Error::from(io::ErrorKind::NotFound);
            Error::from(CheckpointError::Io { path: "x".into(), action, source }).kind().exit_code()
        };
        assert_eq!((of("open"), of("sync")), (2, 1));
    }

    #[test]
    fn panics_become_failed_runs() {
        let error = catch_panics(|| panic!("broken {}", 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed);
        assert!(error.to_string().contains("broken 1"));
    }
}
