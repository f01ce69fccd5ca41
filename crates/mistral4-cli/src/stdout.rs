//! Writing to standard output, where a closed pipe is no failure.

use std::io::{self, ErrorKind, IsTerminal, Write};

use crate::error::{Error, Result};

/// Writes a text and flushes. A reader that has gone (`mistral4 inspect M | head`) ends the program quietly.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Error::failed(
            format!("cannot write to standard output: {error}"),
            "check where the output goes and that the disk has space",
        )),
    }
}

/// Whether bold letters are welcome: on a terminal, unless NO_COLOR is set.
pub(crate) fn is_styled() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Writes one JSON value on one line.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|error| {
        Error::failed(format!("cannot write JSON: {error}"), "this is a defect; please report it")
    })?;
    print(&format!("{text}\n"))
}
