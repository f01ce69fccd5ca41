//! Progress of long work: a bar on a terminal, a plain line now and then elsewhere; always on standard error.

use std::io::{IsTerminal, stderr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines come at most this often; work that is done sooner prints none.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Work of a known number of steps. May be advanced from several threads.
pub(crate) struct Progress {
    what: String,
    total: u64,
    style: Style,
}

enum Style {
    Bar(ProgressBar),
    Plain(Mutex<Plain>),
}

struct Plain {
    done: u64,
    next_line: Instant,
}

impl Progress {
    /// Begins work; `what` names it, as `loading weights`.
    pub(crate) fn new(what: &str, total: u64) -> Self {
        let style = if stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
            let template = "{msg} [{bar:30}] {pos}/{len} {elapsed} (left {eta})";
            bar.set_style(
                ProgressStyle::with_template(template).expect("the template is valid").progress_chars("=> "),
            );
            bar.set_message(what.to_owned());
            Style::Bar(bar)
        } else {
            Style::Plain(Mutex::new(Plain { done: 0, next_line: Instant::now() + PLAIN_INTERVAL }))
        };
        Progress { what: what.to_owned(), total, style }
    }

    /// Counts finished steps.
    pub(crate) fn advance(&self, steps: u64) {
        match &self.style {
            Style::Bar(bar) => bar.inc(steps),
            Style::Plain(plain) => {
                let mut plain = plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                plain.done += steps;
                if Instant::now() >= plain.next_line {
                    plain.next_line = Instant::now() + PLAIN_INTERVAL;
                    eprintln!("{}: {} of {}", self.what, plain.done, self.total);
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }
}
