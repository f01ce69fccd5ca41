//! Writing one safetensors file, and files that appear under their name only when they are whole.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::layout::Item;
use crate::error::{Error, Result};

/// End of temporary names, which also start with a dot.
pub(crate) const PARTIAL: &str = ".partial";

/// A file under a temporary name in its own folder; dropped before [`PendingFile::publish`], it is removed.
#[derive(Debug)]
pub(crate) struct PendingFile {
    temporary: PathBuf,
    target: PathBuf,
    published: bool,
}

impl PendingFile {
    /// Creates the temporary file; one that a killed save left behind is overwritten.
    pub(crate) fn create(target: &Path) -> Result<(PendingFile, File)> {
        let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let temporary = target.with_file_name(format!(".{name}{PARTIAL}"));
        let file = File::create(&temporary).map_err(Error::io(&temporary, "create"))?;
        Ok((PendingFile { temporary, target: target.to_path_buf(), published: false }, file))
    }

    /// Writes a small file whole and to the disk.
    pub(crate) fn write(target: &Path, bytes: &[u8]) -> Result<PendingFile> {
        let (pending, mut file) = PendingFile::create(target)?;
        file.write_all(bytes).map_err(Error::io(&pending.temporary, "write"))?;
        file.sync_all().map_err(Error::io(&pending.temporary, "sync"))?;
        Ok(pending)
    }

    /// Gives the file its name.
    pub(crate) fn publish(mut self) -> Result<()> {
        std::fs::rename(&self.temporary, &self.target)
            .map_err(Error::io(&self.target, "rename a finished file to"))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.published {
            // A failure here leaves a file that no reader looks at and the next save overwrites.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Makes renames in a folder last through a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder, "sync"))?;
    }
    Ok(())
}

/// A safetensors file whose header is written and whose tensors are put in any order.
#[derive(Debug)]
pub(crate) struct ShardWriter {
    file: File,
    pending: PendingFile,
    places: HashMap<String, (u64, u64)>,
}

impl ShardWriter {
    /// Writes the header of a file that will hold these tensors.
    pub(crate) fn create(target: &Path, items: &[Item]) -> Result<ShardWriter> {
        let (pending, mut file) = PendingFile::create(target)?;
        let (header, spans, length) = header(items);
        let start = header.len() as u64;
        file.write_all(&header).map_err(Error::io(target, "write"))?;
        file.set_len(start + length).map_err(Error::io(target, "grow"))?;
        let places = spans.into_iter().map(|(key, (from, to))| (key, (start + from, to - from))).collect();
        Ok(ShardWriter { file, pending, places })
    }

    /// A writer of a tensor's bytes.
    ///
    /// # Panics
    /// When the header has no such tensor.
    pub(crate) fn tensor(&mut self, key: &str) -> Result<TensorWriter<'_>> {
        let (offset, length) = self.places[key];
        let path = &self.pending.target;
        self.file.seek(SeekFrom::Start(offset)).map_err(Error::io(path, "write"))?;
        Ok(TensorWriter { file: &mut self.file, path, left: length })
    }

    /// Brings the file to the disk, still under its temporary name.
    pub(crate) fn finish(self) -> Result<PendingFile> {
        self.file.sync_all().map_err(Error::io(&self.pending.temporary, "sync"))?;
        Ok(self.pending)
    }
}

/// Takes the bytes of one tensor, in order.
#[derive(Debug)]
pub(crate) struct TensorWriter<'a> {
    file: &'a mut File,
    path: &'a Path,
    left: u64,
}

impl TensorWriter<'_> {
    /// Leaves the next bytes as they are.
    pub(crate) fn skip(&mut self, bytes: u64) -> Result<()> {
        assert!(bytes <= self.left, "more bytes than the tensor has");
        self.left -= bytes;
        self.file.seek_relative(bytes as i64).map_err(Error::io(self.path, "write"))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() as u64 <= self.left, "more bytes than the tensor has");
        self.left -= bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io(self.path, "write"))
    }
}

/// A key with the start and end of its bytes in a file's data.
type Span = (String, (u64, u64));

/// The bytes before the data, the place of every tensor in the data, and the length of the data.
///
/// Tensors of wide numbers come first, so that every tensor is aligned to its own numbers.
pub(crate) fn header(items: &[Item]) -> (Vec<u8>, Vec<Span>, u64) {
    let mut order: Vec<&Item> = items.iter().collect();
    order.sort_by_key(|item| std::cmp::Reverse(item.dtype.size()));
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut spans = Vec::with_capacity(items.len());
    let mut end = 0;
    for item in order {
        let start = end;
        end += item.bytes();
        let entry = json!({"dtype": item.dtype.name(), "shape": item.shape, "data_offsets": [start, end]});
        entries.insert(item.key.clone(), entry);
        spans.push((item.key.clone(), (start, end)));
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    (bytes, spans, end)
}
