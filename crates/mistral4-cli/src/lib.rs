//! The command `mistral4`: training, generation, conversion, comparison and measurement from a shell.
//!
//! [`run`] is the whole program. Every command is a function of its arguments in [`commands`], so that tests call it
//! without a process.

mod arguments;
pub mod commands;
mod curve;
mod device;
mod error;
mod format;
mod launch;
mod load;
mod progress;
pub mod quantize;
mod stdout;
mod tensors;

use std::ffi::OsString;
use std::process::ExitCode;

pub use arguments::{Arguments, Command, ComputeArguments, FloatDType, ModelArguments};
pub use device::DeviceChoice;
pub use error::{Error, ErrorKind, Result};
pub use load::{Loaded, load_model};
pub use tensors::{NamedArray, Values};

/// Runs the program with these arguments, the first being its name, and returns its exit code: 0 done, 1 a run failed,
/// 2 wrong usage or bad input.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match arguments::parse(arguments) {
        Ok(arguments) => arguments,
        Err(arguments::Stop::Text(text)) => {
            return report(stdout::print(&text));
        }
        Err(arguments::Stop::Usage(error)) => return report(Err(error)),
    };
    report(error::catch_panics(|| commands::run(arguments)))
}

fn report(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}
