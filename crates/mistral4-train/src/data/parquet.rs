//! Rows of Parquet files, read row group by row group.

use std::fs::File;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mistral4_processor::json::Json;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::schema::types::{SchemaDescriptor, Type};

use super::row::Row;
use crate::error::{Error, Result, RowPlace};

/// Rows that a column holds decoded at a time: few, as one may be a large image.
const ROWS_AT_A_TIME: usize = 16;

/// Row groups of some Parquet files.
#[derive(Debug, Clone)]
pub(crate) struct ParquetFiles {
    parts: Arc<[RowGroup]>,
    /// The only column that is read, if not all are.
    column: Option<Arc<str>>,
}

/// Some rows of one row group.
#[derive(Debug, Clone)]
struct RowGroup {
    path: Arc<PathBuf>,
    group: usize,
    rows: Range<usize>,
}

impl ParquetFiles {
    /// Reads the footers.
    ///
    /// # Errors
    /// A file that cannot be read, that is no Parquet file or that lacks the column, and files without a row.
    pub(crate) fn open(paths: &[PathBuf], column: Option<&str>) -> Result<Self> {
        let mut parts = Vec::new();
        for path in paths {
            let path = Arc::new(path.clone());
            let reader = open(&path)?;
            let metadata = reader.metadata();
            if let Some(column) = column {
                let fields = metadata.file_metadata().schema().get_fields();
                if !fields.iter().any(|field| field.name() == column) {
                    let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
                    let message = format!("there is no column `{column}`; there are {}", names.join(", "));
                    return Err(Error::Dataset { path: path.as_ref().clone(), message });
                }
            }
            for (group, metadata) in metadata.row_groups().iter().enumerate() {
                let rows = 0..usize::try_from(metadata.num_rows()).unwrap_or(0);
                parts.push(RowGroup { path: path.clone(), group, rows });
            }
        }
        parts.retain(|part| !part.rows.is_empty());
        if parts.is_empty() {
            let path = paths.first().cloned().unwrap_or_default();
            return Err(Error::Dataset { path, message: "there is no row in it".to_owned() });
        }
        Ok(Self { parts: parts.into(), column: column.map(Arc::from) })
    }

    /// The row groups, cut down to some of all rows.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        let mut first = 0;
        let cut = self.parts.iter().filter_map(|part| {
            let before = first;
            first += part.rows.len();
            let start = range.start.saturating_sub(before).min(part.rows.len());
            let end = range.end.saturating_sub(before).min(part.rows.len());
            (start < end)
                .then(|| RowGroup { rows: part.rows.start + start..part.rows.start + end, ..part.clone() })
        });
        Self { parts: cut.collect(), column: self.column.clone() }
    }

    /// Row groups.
    pub(crate) fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Rows.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.rows.len()).sum()
    }

    pub(crate) fn first_path(&self) -> &Path {
        &self.parts[0].path
    }

    /// The rows of a row group, without the first `skip` ones.
    ///
    /// # Errors
    /// A file that cannot be read, or that is damaged.
    pub(crate) fn rows(&self, part: usize, skip: usize) -> Result<ParquetRows> {
        let RowGroup { path, group, rows } = self.parts[part].clone();
        let rows_of = || -> std::result::Result<ReaderIter, ParquetError> {
            let reader = open(&path).map_err(|error| ParquetError::External(Box::new(error)))?;
            let schema = reader.metadata().file_metadata().schema();
            let projected = match &self.column {
                None => schema.clone(),
                Some(column) => {
                    let wanted = |field: &&Arc<Type>| field.name() == column.as_ref();
                    let fields = schema.get_fields().iter().filter(wanted).cloned().collect();
                    Type::group_type_builder(schema.name()).with_fields(fields).build()?
                }
            };
            let schema = Arc::new(SchemaDescriptor::new(Arc::new(projected)));
            let group = reader.get_row_group(group)?;
            TreeBuilder::new().with_batch_size(ROWS_AT_A_TIME).as_iter(schema, group.as_ref())
        };
        let iter = guarded(rows_of).map_err(|message| damaged(&path, group, message))?;
        let mut rows = ParquetRows { path, group, iter, next: 0, end: rows.end, start: rows.start + skip };
        while rows.next < rows.start {
            match rows.read() {
                Some(row) => drop(row?),
                None => break,
            }
        }
        Ok(rows)
    }
}

/// The rest of a row group.
pub(crate) struct ParquetRows {
    path: Arc<PathBuf>,
    group: usize,
    iter: ReaderIter,
    next: usize,
    start: usize,
    end: usize,
}

impl ParquetRows {
    /// The next row as JSON: binary values in base64, nulls left out.
    pub(crate) fn next(&mut self) -> Option<Result<Row>> {
        if self.next >= self.end {
            return None;
        }
        Some(self.read()?.map(|(place, value)| Row { path: self.path.clone(), place, value }))
    }

    fn read(&mut self) -> Option<Result<(RowPlace, Json)>> {
        let place = RowPlace::Parquet { row_group: self.group, row: self.next };
        let row = guarded(|| self.iter.next().transpose());
        self.next += 1;
        match row {
            Ok(None) => None,
            Ok(Some(row)) => {
                let value = serde_json::from_value(row.to_json_value());
                let failed = |error: serde_json::Error| damaged(&self.path, self.group, error.to_string());
                Some(value.map_err(failed).map(|value| (place, without_nulls(value))))
            }
            Err(message) => Some(Err(damaged(&self.path, self.group, message))),
        }
    }
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let failed =
        |message| Error::Dataset { path: path.to_owned(), message: format!("no Parquet file: {message}") };
    guarded(|| SerializedFileReader::new(file)).map_err(failed)
}

fn damaged(path: &Path, group: usize, message: String) -> Error {
    let message = format!("row group {group} cannot be read: {message}");
    Error::Dataset { path: path.to_owned(), message }
}

/// The Parquet reader panics at some damaged files and at types that it does not know.
fn guarded<T>(work: impl FnOnce() -> std::result::Result<T, ParquetError>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(match panic.downcast_ref::<String>() {
            Some(message) => message.clone(),
            None => panic.downcast_ref::<&str>().copied().unwrap_or("a defect of the reader").to_owned(),
        }),
    }
}

/// A column of structures gives every row all keys; those that are null were absent when it was written.
fn without_nulls(value: Json) -> Json {
    match value {
        Json::Object(entries) => {
            let entries = entries.into_iter().filter(|(_, value)| !value.is_null());
            Json::Object(entries.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Json::Array(items) => Json::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}
