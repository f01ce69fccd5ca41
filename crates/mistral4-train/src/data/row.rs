//! One row of a data file, and data sets of rows: by index from JSONL, streamed from Parquet.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use mistral4_processor::json::Json;

use super::jsonl::JsonlFiles;
use super::parquet::{ParquetFiles, ParquetRows};
use super::stream::{SampleStream, StreamDataset, StreamPlace, StreamedSample, part_order};
use super::{DataSource, Dataset, Sample, paths};
use crate::error::{Error, Result, RowPlace};

/// One row and where it stands.
#[derive(Debug, Clone)]
pub struct Row {
    pub(crate) path: Arc<PathBuf>,
    pub(crate) place: RowPlace,
    pub(crate) value: Json,
}

impl Row {
    pub(crate) fn error(&self, field: impl Into<String>, message: impl Into<String>) -> Error {
        Error::Row {
            path: self.path.as_ref().clone(),
            place: self.place,
            field: field.into(),
            message: message.into(),
        }
    }
}

/// What the rows of a data set mean.
pub(crate) trait RowForm: Send + Sync {
    /// The sample of a row.
    ///
    /// # Errors
    /// A row that cannot be used, with file, place and field.
    fn sample(&self, row: Row) -> Result<Sample>;
}

/// Rows `[start, end)` of all rows of some files; `None` is the first and the end.
pub(crate) type RowBounds = (Option<usize>, Option<usize>);

/// Opens the rows of JSONL, JSON or Parquet files: JSON rows by index, Parquet rows as a stream.
///
/// # Errors
/// Files that cannot be read or hold no row, files of both kinds, and bounds that leave no row.
pub(crate) fn open(files: &[PathBuf], bounds: RowBounds, form: Arc<dyn RowForm>) -> Result<DataSource> {
    let files = paths::expand(files, &["jsonl", "json", "parquet"])?;
    let is_parquet = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "parquet");
    match files.iter().filter(is_parquet).count() {
        0 => {
            let rows = JsonlFiles::open(&files)?;
            let range = within(bounds, rows.len(), &files[0])?;
            Ok(DataSource::Indexed(Arc::new(IndexedRows { rows, range, form })))
        }
        count if count == files.len() => {
            let files = ParquetFiles::open(&files, None)?;
            let range = within(bounds, files.len(), files.first_path())?;
            Ok(DataSource::Streamed(Arc::new(ParquetDataset { files: files.slice(range), form })))
        }
        _ => {
            let message =
                "one data set reads JSON or Parquet, not both; make two of them or convert one".to_owned();
            Err(Error::Dataset { path: files[0].clone(), message })
        }
    }
}

fn within((start, end): RowBounds, rows: usize, path: &std::path::Path) -> Result<Range<usize>> {
    let range = start.unwrap_or(0).min(rows)..end.unwrap_or(rows).min(rows);
    if range.is_empty() {
        let message = format!("the split leaves no row of {rows}");
        return Err(Error::Dataset { path: path.to_owned(), message });
    }
    Ok(range)
}

struct IndexedRows {
    rows: JsonlFiles,
    range: Range<usize>,
    form: Arc<dyn RowForm>,
}

impl Dataset for IndexedRows {
    fn len(&self) -> usize {
        self.range.len()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        self.form.sample(self.rows.row(self.range.start + index)?)
    }
}

struct ParquetDataset {
    files: ParquetFiles,
    form: Arc<dyn RowForm>,
}

impl StreamDataset for ParquetDataset {
    fn num_rows(&self) -> Option<usize> {
        Some(self.files.len())
    }

    fn read(&self, shuffle: Option<(u64, usize)>, from: StreamPlace) -> Result<Box<dyn SampleStream>> {
        let order = part_order(self.files.parts(), shuffle);
        Ok(Box::new(RowStream { files: self.files.clone(), order, rows: None, place: from }))
    }

    fn sample(&self, row: Row) -> Result<Sample> {
        self.form.sample(row)
    }
}

/// Parquet rows, row group after row group.
struct RowStream {
    files: ParquetFiles,
    order: Vec<usize>,
    rows: Option<ParquetRows>,
    /// Of the next row.
    place: StreamPlace,
}

impl SampleStream for RowStream {
    fn next(&mut self) -> Option<Result<StreamedSample>> {
        loop {
            let part = *self.order.get(self.place.part)?;
            let rows = match &mut self.rows {
                Some(rows) => rows,
                none => match self.files.rows(part, self.place.position as usize) {
                    Ok(rows) => none.insert(rows),
                    Err(error) => return Some(Err(error)),
                },
            };
            match rows.next() {
                Some(row) => {
                    self.place.position += 1;
                    self.place.sample += 1;
                    return Some(row.map(StreamedSample::Row));
                }
                None => {
                    self.rows = None;
                    self.place = StreamPlace {
                        sample: self.place.sample,
                        ..StreamPlace::of_part(self.place.part + 1)
                    };
                }
            }
        }
    }

    fn place(&self) -> StreamPlace {
        self.place
    }
}
