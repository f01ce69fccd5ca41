//! Saving now, or on a thread of its own while training goes on.

use std::thread::JoinHandle;

use super::{Checkpoints, Completed, Ranks, Snapshot};
use crate::error::Result;

/// Writes checkpoints, one at a time.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    ranks: Ranks,
    is_async: bool,
    under_way: Option<JoinHandle<Result<Completed>>>,
}

impl Saver {
    /// A saver that waits for each save, or, with `is_async`, for the one before.
    pub(crate) fn new(checkpoints: Checkpoints, ranks: Ranks, is_async: bool) -> Self {
        Self { checkpoints, ranks, is_async, under_way: None }
    }

    /// Saves, or begins to; returns the checkpoint that was completed by this call: this one, or the one before.
    ///
    /// # Errors
    /// A save that failed: this one, or the one before.
    pub(crate) fn save(&mut self, name: String, snapshot: Snapshot) -> Result<Option<Completed>> {
        let before = self.wait()?;
        if !self.is_async {
            return self.checkpoints.save(&name, &snapshot, &self.ranks).map(Some);
        }
        let (checkpoints, ranks) = (self.checkpoints.clone(), self.ranks.clone());
        self.under_way = Some(std::thread::spawn(move || checkpoints.save(&name, &snapshot, &ranks)));
        Ok(before)
    }

    /// Waits for the save under way, if there is one.
    ///
    /// # Errors
    /// When it failed.
    pub(crate) fn wait(&mut self) -> Result<Option<Completed>> {
        let Some(thread) = self.under_way.take() else { return Ok(None) };
        match thread.join() {
            Ok(saved) => saved.map(Some),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Saver {
    /// A run that ends with an error still completes the save under way.
    fn drop(&mut self) {
        if let Some(thread) = self.under_way.take() {
            // The run's own error is the one to report.
            let _ = thread.join();
        }
    }
}
