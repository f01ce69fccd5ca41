//! The checkpoints in a run's folder: which there are, which is the last and the best, which may go.

use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::ranks::Ranks;
use super::snapshot::{Losses, Snapshot};
use crate::error::{Error, Result};
use crate::recipe::{Recipe, RestoreFrom};

/// End of the names of checkpoints that are being written.
const PARTIAL: &str = ".partial";
/// End of the names of checkpoints that are being removed.
const REMOVED: &str = ".removed";
/// Name of a pointer that is being made.
const NEW_POINTER: &str = ".pointer.new";
const LATEST: &str = "LATEST";
const LOWEST_VAL: &str = "LOWEST_VAL";

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Published {
    step: usize,
    name: String,
}

/// A checkpoint that was written.
pub(crate) struct Completed {
    /// Its folder.
    pub(crate) path: PathBuf,
    /// What other readers will not see as this library does.
    pub(crate) warnings: Vec<String>,
}

/// The checkpoints of a run.
#[derive(Clone)]
pub(crate) struct Checkpoints {
    folder: PathBuf,
    disk: Disk,
    enabled: bool,
    max_recent: Option<usize>,
    best_metric_key: String,
}

impl Checkpoints {
    /// The checkpoints of a recipe's run.
    pub(crate) fn new(recipe: &Recipe, disk: Disk) -> Self {
        let config = &recipe.checkpoint;
        Self {
            folder: config.checkpoint_dir.clone(),
            disk,
            enabled: config.enabled,
            max_recent: config.max_recent_checkpoints,
            best_metric_key: config.best_metric_key.clone(),
        }
    }

    /// Makes the folder, removes what a killed run left unfinished, and sets the pointers right.
    ///
    /// # Errors
    /// A folder that cannot be read or written.
    pub(crate) fn clean(&self) -> Result<()> {
        self.disk.create_folder(&self.folder)?;
        if self.enabled {
            for name in self.names()? {
                let inner = name
                    .strip_prefix('.')
                    .and_then(|name| name.strip_suffix(PARTIAL).or_else(|| name.strip_suffix(REMOVED)));
                if inner.is_some_and(|inner| step_of(inner).is_some()) || name == NEW_POINTER {
                    self.disk.remove(&self.folder.join(name))?;
                }
            }
            self.point()?;
        }
        Ok(())
    }

    /// The checkpoint that a run begins at; `None` for a run from the start.
    ///
    /// # Errors
    /// A checkpoint that was asked for and is not there, and later checkpoints in the folder, which the run would
    /// come to and may not overwrite.
    pub(crate) fn starting_point(&self, restore_from: &RestoreFrom) -> Result<Option<PathBuf>> {
        let published = self.published()?;
        let missing = |asked: &str| Error::NoCheckpoint {
            asked: asked.to_owned(),
            folder: self.folder.clone(),
            found: published.iter().map(|checkpoint| checkpoint.name.clone()).collect(),
        };
        let start = match restore_from {
            RestoreFrom::Latest => published.last().map(|last| self.folder.join(&last.name)),
            RestoreFrom::LowestVal => {
                let best = self.best(&published)?.ok_or_else(|| missing(LOWEST_VAL))?;
                Some(self.folder.join(&best.name))
            }
            RestoreFrom::Named(name) => {
                let places = [self.folder.join(name), PathBuf::from(name)];
                let found = places.into_iter().find(|place| Snapshot::is_at(place));
                Some(found.ok_or_else(|| missing(name))?)
            }
        };
        let first_step =
            start.as_deref().map_or(Ok(0), |start| Snapshot::read_state(start).map(|s| s.step))?;
        let mut later = self.names()?;
        later.retain(|name| step_of(name).is_some_and(|step| step >= first_step));
        if !later.is_empty() {
            later.sort_by_key(|name| step_of(name));
            return Err(Error::LaterCheckpoints { first_step, folder: self.folder.clone(), later });
        }
        Ok(start)
    }

    /// Writes a checkpoint, gives it its name, and brings pointers and older checkpoints up to date; every rank calls it.
    ///
    /// # Errors
    /// On every rank: a checkpoint of this name, and a disk that fails; then nothing that was there before has changed.
    pub(crate) fn save(&self, name: &str, snapshot: &Snapshot, ranks: &Ranks) -> Result<Completed> {
        let path = self.folder.join(name);
        let partial = self.folder.join(format!(".{name}{PARTIAL}"));
        let prepare = || {
            if path.symlink_metadata().is_ok() {
                return Err(Error::CheckpointExists { path: path.clone() });
            }
            self.disk.remove(&partial)
        };
        ranks.agree(if ranks.is_first() { prepare() } else { Ok(()) })?;
        let publish = |warnings| self.disk.rename(&partial, &path).map(|()| warnings);
        let written = ranks.agree(snapshot.write(&self.disk, &partial, ranks));
        let written = ranks.agree(if ranks.is_first() { written.and_then(publish) } else { written });
        let warnings = match written {
            Ok(warnings) => warnings,
            Err(error) => {
                if ranks.is_first() {
                    // Makes room on a full disk; should it fail as well, the next run removes the folder.
                    let _ = self.disk.remove(&partial);
                }
                return Err(error);
            }
        };
        let finish = || {
            self.disk.sync_folder(&self.folder)?;
            self.point()?;
            self.prune()
        };
        ranks.agree(if ranks.is_first() { finish() } else { Ok(()) })?;
        Ok(Completed { path, warnings })
    }

    /// Points `LATEST` at the last checkpoint and `LOWEST_VAL` at the best.
    fn point(&self) -> Result<()> {
        let published = self.published()?;
        let best = self.best(&published)?;
        for (pointer, target) in [(LATEST, published.last()), (LOWEST_VAL, best)] {
            match target {
                Some(target) => self.point_at(pointer, &target.name)?,
                None => {
                    self.disk.remove(&self.folder.join(pointer))?;
                    self.disk.remove(&self.folder.join(format!("{pointer}.txt")))?;
                }
            }
        }
        Ok(())
    }

    /// Points at a checkpoint in one rename: by a symbolic link, or a text file where there are no links.
    fn point_at(&self, pointer: &str, name: &str) -> Result<()> {
        let link = self.folder.join(pointer);
        let text = self.folder.join(format!("{pointer}.txt"));
        if std::fs::read_link(&link).is_ok_and(|target| target == Path::new(name))
            || std::fs::read_to_string(&text).is_ok_and(|target| target == name)
        {
            return Ok(());
        }
        let new = self.folder.join(NEW_POINTER);
        self.disk.remove(&new)?;
        if self.disk.link(Path::new(name), &new)? {
            self.disk.rename(&new, &link)?;
        } else {
            self.disk.write(&new, name.as_bytes())?;
            self.disk.rename(&new, &text)?;
        }
        self.disk.sync_folder(&self.folder)
    }

    /// Removes checkpoints that are neither among the last nor the best.
    fn prune(&self) -> Result<()> {
        let Some(max_recent) = self.max_recent else { return Ok(()) };
        let published = self.published()?;
        let best = self.best(&published)?;
        let old = &published[..published.len().saturating_sub(max_recent)];
        for checkpoint in old.iter().filter(|&checkpoint| Some(checkpoint) != best) {
            let removed = self.folder.join(format!(".{}{REMOVED}", checkpoint.name));
            self.disk.rename(&self.folder.join(&checkpoint.name), &removed)?;
            self.disk.remove(&removed)?;
        }
        Ok(())
    }

    /// The checkpoint with the lowest held-out loss, the first of several.
    fn best<'a>(&self, published: &'a [Published]) -> Result<Option<&'a Published>> {
        let mut best: Option<(f64, &Published)> = None;
        for checkpoint in published {
            let losses = Losses::read(&self.folder.join(&checkpoint.name))?;
            let Some(loss) = losses.metric(&self.best_metric_key) else { continue };
            if best.is_none_or(|(lowest, _)| loss < lowest) {
                best = Some((loss, checkpoint));
            }
        }
        Ok(best.map(|(_, checkpoint)| checkpoint))
    }

    /// The complete checkpoints, in the order of steps.
    fn published(&self) -> Result<Vec<Published>> {
        let names = self.names()?.into_iter();
        let mut published: Vec<Published> = names
            .filter_map(|name| Some(Published { step: step_of(&name)?, name }))
            .filter(|checkpoint| Snapshot::is_at(&self.folder.join(&checkpoint.name)))
            .collect();
        published.sort_by_key(|checkpoint| checkpoint.step);
        Ok(published)
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |source| Error::Read { path: self.folder.clone(), source };
        let entries = std::fs::read_dir(&self.folder).map_err(failed)?;
        let names = entries.map(|entry| Ok(entry.map_err(failed)?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }
}

/// The step of `epoch_E_step_S`.
fn step_of(name: &str) -> Option<usize> {
    let (epoch, step) = name.strip_prefix("epoch_")?.split_once("_step_")?;
    epoch.parse::<usize>().ok()?;
    step.parse().ok()
}
