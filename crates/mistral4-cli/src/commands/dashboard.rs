//! `mistral4 dashboard`: the live page of a run, under way or done.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;
use mistral4_train::dashboard::{DEFAULT_PORT, Dashboard};

use crate::commands::train::on_interrupt;
use crate::error::{Error, Result};
use crate::stdout;

/// Arguments of `mistral4 dashboard`.
#[derive(Debug, Args)]
pub struct DashboardArguments {
    /// Folder of the run: the recipe's checkpoint.checkpoint_dir
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Port on this machine; 0 takes any that is free
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_PORT)]
    pub port: u16,
}

/// Serves the page until Ctrl-C.
///
/// # Errors
/// A folder without a run, and a port that is taken.
pub fn run(arguments: &DashboardArguments) -> Result<()> {
    if !arguments.run.join("training.jsonl").is_file() {
        return Err(Error::input(
            format!("{}: there is no training.jsonl in it", arguments.run.display()),
            "give the folder of a run, its recipe's checkpoint.checkpoint_dir",
        ));
    }
    let dashboard = Dashboard::start(&arguments.run, arguments.port)?;
    stdout::print(&format!("{}\n", dashboard.url()))?;
    let interrupted = on_interrupt("leaving")?;
    while !interrupted.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
