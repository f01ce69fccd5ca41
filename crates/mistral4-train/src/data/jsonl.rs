//! Lines of JSONL files, found once and read when they are needed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use mistral4_processor::json::Json;
use serde_json::value::RawValue;

use super::row::Row;
use crate::error::{Error, Result, RowPlace};

/// Longest line, in bytes: a longer one is no row.
pub(super) const MAX_LINE: u64 = 1 << 28;

/// Every non-empty line of some JSONL files; a `.json` file that holds one list is one row an element.
pub(crate) struct JsonlFiles {
    files: Vec<(Arc<PathBuf>, Mutex<File>)>,
    rows: Vec<Span>,
}

struct Span {
    file: usize,
    line: usize,
    start: u64,
    length: u64,
}

/// One row's text and where it stands.
pub(crate) struct Line {
    pub(crate) path: Arc<PathBuf>,
    pub(crate) number: usize,
    pub(crate) text: String,
}

impl Line {
    pub(crate) fn error(&self, field: impl Into<String>, message: impl Into<String>) -> Error {
        Error::Row {
            path: self.path.as_ref().clone(),
            place: RowPlace::Line(self.number),
            field: field.into(),
            message: message.into(),
        }
    }

    /// Reads the row.
    pub(crate) fn row(self) -> Result<Row> {
        match Json::parse(&self.text) {
            Ok(value @ Json::Object(_)) => {
                Ok(Row { path: self.path, place: RowPlace::Line(self.number), value })
            }
            Ok(other) => Err(self.error("(row)", format!("must be an object, not {}", other.type_name()))),
            Err(error) => Err(self.error("(row)", error.to_string())),
        }
    }

    /// Reads the row as `T`; the error names the field that does not fit.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        let mut reader = serde_json::Deserializer::from_str(&self.text);
        let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let field = match error.path().to_string() {
                path if path == "." || path == "?" => "(row)".to_owned(),
                path => path,
            };
            self.error(field, column_only(&error.into_inner()))
        })?;
        reader.end().map_err(|error| self.error("(row)", column_only(&error)))?;
        Ok(value)
    }
}

/// The message with its column; the line it counts is always the row's first.
fn column_only(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

impl JsonlFiles {
    /// Finds the rows of some files.
    ///
    /// # Errors
    /// A file that cannot be read, a line of more than 256 MiB, and files without a single row.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut found = Self { files: Vec::new(), rows: Vec::new() };
        for path in paths {
            match path.extension().is_some_and(|extension| extension == "json") {
                true => found.index_list(path)?,
                false => found.index_lines(path)?,
            }
        }
        if found.rows.is_empty() {
            let path = paths.first().cloned().unwrap_or_default();
            return Err(Error::Dataset { path, message: "there is no row in it".to_owned() });
        }
        Ok(found)
    }

    fn index_lines(&mut self, path: &Path) -> Result<()> {
        let failed = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        let (mut start, mut line, mut text) = (0, 0, Vec::new());
        loop {
            text.clear();
            let length =
                (&mut reader).take(MAX_LINE + 1).read_until(b'\n', &mut text).map_err(failed)? as u64;
            if length == 0 {
                break;
            }
            line += 1;
            if length > MAX_LINE {
                let message = format!("line {line} is longer than {MAX_LINE} bytes");
                return Err(Error::Dataset { path: path.to_owned(), message });
            }
            if text.iter().any(|byte| !byte.is_ascii_whitespace()) {
                self.rows.push(Span { file: self.files.len(), line, start, length });
            }
            start += length;
        }
        self.files.push((Arc::new(path.to_owned()), Mutex::new(file)));
        Ok(())
    }

    /// The elements of a `.json` file's list, or its one object.
    fn index_list(&mut self, path: &Path) -> Result<()> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let elements: Vec<&RawValue> = match text.trim_start().starts_with('[') {
            true => serde_json::from_str(&text),
            false => serde_json::from_str(&text).map(|object| vec![object]),
        }
        .map_err(|error| Error::Dataset { path: path.to_owned(), message: format!("not JSON: {error}") })?;
        let (mut line, mut counted) = (1, 0);
        for element in elements {
            let element = element.get();
            // An element is a part of the text, so its address tells its place.
            let start = element.as_ptr() as usize - text.as_ptr() as usize;
            line += text[counted..start].matches('\n').count();
            counted = start;
            self.rows.push(Span {
                file: self.files.len(),
                line,
                start: start as u64,
                length: element.len() as u64,
            });
        }
        let file = File::open(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        self.files.push((Arc::new(path.to_owned()), Mutex::new(file)));
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// A row.
    pub(crate) fn row(&self, index: usize) -> Result<Row> {
        self.line(index)?.row()
    }

    /// The text of a row.
    pub(crate) fn line(&self, index: usize) -> Result<Line> {
        let row = &self.rows[index];
        let (path, file) = &self.files[row.file];
        let failed = |source| Error::Read { path: path.as_ref().clone(), source };
        let mut bytes = vec![0; row.length as usize];
        {
            // A poisoned lock only means that another thread panicked between seek and read; both are redone here.
            let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            file.seek(SeekFrom::Start(row.start)).map_err(failed)?;
            file.read_exact(&mut bytes).map_err(failed)?;
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Line { path: path.clone(), number: row.line, text: text.trim_end().to_owned() }),
            Err(_) => Err(Error::Row {
                path: path.as_ref().clone(),
                place: RowPlace::Line(row.line),
                field: "(row)".to_owned(),
                message: "not UTF-8 text".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(name: &str, text: &[u8]) -> (tempfile::TempDir, Result<JsonlFiles>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let files = JsonlFiles::open(&[path]);
        (folder, files)
    }

    #[test]
    fn a_json_list_has_a_row_an_element() {
        let (_folder, files) = open("rows.json", b"[\n {\"a\": 1},\n\n {\"a\": [2,\n 3]}]");
        let files = files.unwrap();
        let lines: Vec<_> = (0..files.len()).map(|i| files.line(i).unwrap()).collect();
        assert_eq!(lines.iter().map(|line| line.number).collect::<Vec<_>>(), [2, 4]);
        assert_eq!(lines[1].text, "{\"a\": [2,\n 3]}");
        assert_eq!(open("row.json", b" {\"a\": 1}").1.unwrap().len(), 1);
        assert!(open("rows.json", b"[{]").1.err().unwrap().to_string().contains("not JSON"));
        assert!(open("rows.json", b"[]").1.err().unwrap().to_string().contains("no row"));
    }

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), list in any::<bool>()) {
            let (_folder, files) = open(if list { "rows.json" } else { "rows.jsonl" }, &bytes);
            if let Ok(files) = files {
                for i in 0..files.len() {
                    let _ = files.line(i).and_then(|line| line.json::<serde_json::Value>());
                }
            }
        }
    }
}
