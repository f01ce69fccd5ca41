//! The cache folder of `huggingface_hub`: `models--owner--name/{blobs,refs,snapshots}`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{Client, Failure, RemoteFile};
use super::hub_error;
use crate::error::{Error, Result};

/// Tries at one file without any progress, before giving up.
const ATTEMPTS: u32 = 5;

/// Bytes read at a time.
const PIECE: usize = 1 << 18;

/// One model in the cache.
pub(super) struct Repository {
    folder: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, model: &str) -> Self {
        let name = format!("models--{}", model.replace('/', "--"));
        Repository { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The folder of a revision, if it was downloaded.
    pub(super) fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let commit = std::fs::read_to_string(self.folder.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
        let folder = self.folder.join("snapshots").join(commit);
        folder.is_dir().then_some(folder)
    }

    /// Notes which commit a revision is, once all its files are there.
    pub(super) fn complete(&self, revision: &str, commit: &str) -> Result<PathBuf> {
        let reference = self.folder.join("refs").join(revision);
        create_parent(&reference)?;
        std::fs::write(&reference, commit).map_err(Error::io(&reference, "write"))?;
        Ok(self.folder.join("snapshots").join(commit))
    }

    /// Downloads a file unless it is there; what an earlier run left is continued.
    pub(super) fn fetch(
        &self,
        client: &Client<'_>,
        commit: &str,
        file: &RemoteFile,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let blob = self.folder.join("blobs").join(&file.blob);
        let link = self.folder.join("snapshots").join(commit).join(&file.name);
        create_parent(&blob)?;
        create_parent(&link)?;
        let lock = self.locks.join(format!("{}.lock", file.blob));
        create_parent(&lock)?;
        let lock_file = File::create(&lock).map_err(Error::io(&lock, "create"))?;
        // Held until the file is dropped; another process that wants the same file waits and then finds it.
        lock_file.lock().map_err(Error::io(&lock, "lock"))?;
        if !is_whole(&blob, file.size) {
            self.download(client, commit, file, &blob, progress)?;
        }
        let size = blob.metadata().map_err(Error::io(&blob, "read"))?.len();
        progress(size, size);
        place(&blob, &link, &file.blob)
    }

    fn download(
        &self,
        client: &Client<'_>,
        commit: &str,
        file: &RemoteFile,
        blob: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let incomplete = blob.with_file_name(format!("{}.incomplete", file.blob));
        let mut failures = 0;
        loop {
            let before = length(&incomplete);
            let problem = match attempt(client, commit, file, &incomplete, progress) {
                Ok(()) => {
                    return std::fs::rename(&incomplete, blob)
                        .map_err(Error::io(blob, "rename a finished download to"));
                }
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Unreachable(problem)) => problem,
            };
            failures = if length(&incomplete) > before { 1 } else { failures + 1 };
            if failures >= ATTEMPTS {
                return Err(hub_error(
                    client.model,
                    &format!("downloading `{}` failed {ATTEMPTS} times ({problem})", file.name),
                    "run it again to go on where it stopped",
                ));
            }
            std::thread::sleep(Duration::from_millis(50 << failures));
        }
    }
}

/// One request for the rest of a file.
fn attempt(
    client: &Client<'_>,
    commit: &str,
    file: &RemoteFile,
    incomplete: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<(), Failure> {
    let refused = |error: Error| Failure::Refused(error);
    let mut done = length(incomplete);
    if file.size.is_some_and(|size| done > size) {
        done = 0;
    }
    if file.size != Some(done) || done == 0 {
        let mut download = client.download(commit, file, done)?;
        if !download.resumed {
            done = 0;
        }
        let mut target = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(incomplete)
            .map_err(Error::io(incomplete, "create"))
            .map_err(refused)?;
        target.set_len(done).map_err(Error::io(incomplete, "write")).map_err(refused)?;
        std::io::Seek::seek(&mut target, std::io::SeekFrom::Start(done))
            .map_err(Error::io(incomplete, "write"))
            .map_err(refused)?;
        let mut piece = vec![0; PIECE];
        loop {
            let count =
                download.body.read(&mut piece).map_err(|error| Failure::Unreachable(error.to_string()))?;
            if count == 0 {
                break;
            }
            target.write_all(&piece[..count]).map_err(Error::io(incomplete, "write")).map_err(refused)?;
            done += count as u64;
            progress(done, file.size.unwrap_or(done));
        }
        target.sync_all().map_err(Error::io(incomplete, "sync")).map_err(refused)?;
    }
    match file.size {
        Some(size) if done < size => Err(Failure::Unreachable(format!("{done} of {size} bytes arrived"))),
        Some(size) if done > size => {
            // A longer answer is another file; nothing of it can be used.
            std::fs::remove_file(incomplete).map_err(Error::io(incomplete, "remove")).map_err(refused)?;
            Err(Failure::Refused(hub_error(
                client.model,
                &format!("`{}` has {done} bytes, though the hub's list says {size}", file.name),
                "check HF_ENDPOINT; the mirror may be out of date",
            )))
        }
        _ => Ok(()),
    }
}

fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

fn is_whole(blob: &Path, size: Option<u64>) -> bool {
    blob.is_file() && size.is_none_or(|size| length(blob) == size)
}

fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => std::fs::create_dir_all(parent).map_err(Error::io(parent, "create")),
        None => Ok(()),
    }
}

/// Makes the file of a snapshot out of a blob.
fn place(blob: &Path, link: &Path, name: &str) -> Result<()> {
    if link.exists() {
        return Ok(());
    }
    // A link to a blob that has gone still occupies the name.
    if link.is_symlink() {
        std::fs::remove_file(link).map_err(Error::io(link, "replace"))?;
    }
    #[cfg(unix)]
    let made = {
        let _ = blob;
        std::os::unix::fs::symlink(Path::new("../../blobs").join(name), link)
    };
    #[cfg(not(unix))]
    let made = {
        let _ = name;
        std::fs::hard_link(blob, link)
    };
    made.map_err(Error::io(link, "link"))
}
