//! The command `mistral4`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mistral4_cli::run(std::env::args_os())
}
