//! One module a command. Each has its arguments and a `run` that does the work.

pub mod bench;
pub mod chat;
pub mod convert;
pub mod dashboard;
pub mod data;
pub mod forward;
pub mod generate;
pub mod init;
pub mod inspect;
pub mod merge;
pub mod plot;
mod prompt;
pub mod quickstart;
pub mod recipe;
pub mod tokenize;
pub mod train;

use crate::arguments::{Arguments, Command};
use crate::error::{Error, Result};
use crate::launch;

/// Runs a command.
///
/// # Errors
/// The command's own.
pub fn run(arguments: Arguments) -> Result<()> {
    mistral4_kernels::Isa::from_env().map_err(|error| {
        Error::input(error.to_string(), "unset MISTRAL4_ISA to use the widest instruction set")
    })?;
    if let Some(threads) = arguments.threads.map(usize::from).or_else(launch::threads_of_a_rank) {
        use_threads(threads)?;
    }
    match arguments.command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Chat(arguments) => chat::run(&arguments),
        Command::Tokenize(arguments) => tokenize::run(&arguments),
        Command::Forward(arguments) => forward::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Merge(arguments) => merge::run(&arguments),
        Command::Init(arguments) => init::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Quickstart(arguments) => quickstart::run(&arguments),
        Command::Train(train) => train::run(&train, arguments.threads),
        Command::Plot(arguments) => plot::run(&arguments),
        Command::Dashboard(arguments) => dashboard::run(&arguments),
        Command::Data(arguments) => data::run(&arguments),
        Command::Recipe(arguments) => recipe::run(&arguments),
    }
}

/// Sets the number of threads of the process.
fn use_threads(threads: usize) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|error| {
        Error::failed(format!("cannot start {threads} threads: {error}"), "ask for fewer with --threads")
    })
}
