//! The file operations of a save, each of which may fail.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// A file operation that changes what a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A folder is made.
    CreateFolder,
    /// A file is made or emptied.
    Create,
    /// Bytes are added to a file.
    Write,
    /// A file or folder is brought to the medium.
    Sync,
    /// A file or folder gets its name.
    Rename,
    /// A symbolic link is made.
    Link,
    /// A file or folder is removed.
    Remove,
}

/// Allows or refuses an operation before it is done.
type Gate = dyn Fn(Operation, &Path) -> io::Result<()> + Send + Sync;

/// A disk, with an optional gate before every operation, so that the failure of any of them can be tried out.
#[derive(Clone, Default)]
pub struct Disk {
    gate: Option<Arc<Gate>>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("gated", &self.gate.is_some()).finish()
    }
}

impl Disk {
    /// A disk on which `gate` is asked before every operation; what it refuses fails with its error.
    pub fn gated(gate: impl Fn(Operation, &Path) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { gate: Some(Arc::new(gate)) }
    }

    /// Asks the gate about an operation that is done elsewhere.
    pub(crate) fn ask(&self, operation: Operation, path: &Path) -> Result<()> {
        let answer = self.gate.as_ref().map_or(Ok(()), |gate| gate(operation, path));
        answer.map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    fn attempt<T>(
        &self,
        operation: Operation,
        path: &Path,
        work: impl FnOnce() -> io::Result<T>,
    ) -> Result<T> {
        self.ask(operation, path)?;
        work().map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// Makes a folder and those above it.
    pub(crate) fn create_folder(&self, path: &Path) -> Result<()> {
        self.attempt(Operation::CreateFolder, path, || fs::create_dir_all(path))
    }

    /// Opens a new file.
    pub(crate) fn create(&self, path: &Path) -> Result<NewFile<'_>> {
        let file = self.attempt(Operation::Create, path, || File::create(path))?;
        Ok(NewFile { disk: self, path: path.to_owned(), file })
    }

    /// Opens a file that another rank made, to write parts of it.
    pub(crate) fn open(&self, path: &Path) -> Result<NewFile<'_>> {
        let file = self.attempt(Operation::Write, path, || File::options().write(true).open(path))?;
        Ok(NewFile { disk: self, path: path.to_owned(), file })
    }

    /// Writes a whole file and brings it to the medium.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(path)?;
        file.write(bytes)?;
        file.finish()
    }

    /// Brings the names in a folder to the medium.
    pub(crate) fn sync_folder(&self, path: &Path) -> Result<()> {
        self.attempt(Operation::Sync, path, || match cfg!(unix) {
            true => File::open(path)?.sync_all(),
            false => Ok(()),
        })
    }

    /// Gives a file or folder another name.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.attempt(Operation::Rename, to, || fs::rename(from, to))
    }

    /// Makes a symbolic link; false where the file system has none.
    pub(crate) fn link(&self, target: &Path, link: &Path) -> Result<bool> {
        self.attempt(Operation::Link, link, || match symlink(target, link) {
            Ok(()) => Ok(true),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        })
    }

    /// Removes a file, a link, or a folder with all it holds; nothing is done where there is nothing.
    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
        self.attempt(Operation::Remove, path, || match metadata.is_dir() {
            true => fs::remove_dir_all(path),
            false => fs::remove_file(path),
        })
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A file that is being written.
pub(crate) struct NewFile<'a> {
    disk: &'a Disk,
    path: PathBuf,
    file: File,
}

impl NewFile<'_> {
    /// Adds bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.disk.attempt(Operation::Write, &self.path, || self.file.write_all(bytes))
    }

    /// Writes bytes in their place.
    pub(crate) fn write_at(&mut self, place: u64, bytes: &[u8]) -> Result<()> {
        self.disk.attempt(Operation::Write, &self.path, || {
            self.file.seek(SeekFrom::Start(place))?;
            self.file.write_all(bytes)
        })
    }

    /// Brings the file to the medium.
    pub(crate) fn finish(self) -> Result<()> {
        self.disk.attempt(Operation::Sync, &self.path, || self.file.sync_all())
    }
}
