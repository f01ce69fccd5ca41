//! Questions about images: NeMo AutoModel's `make_medpix_dataset`, over the files of its data set.

use std::path::PathBuf;

use super::dataset::{row_paths, slice};
use super::reader::Section;
use crate::error::Result;

/// Rows of an image (`image_id`), a `question` and its `answer`.
///
/// Source: `make_medpix_dataset` in NeMo AutoModel (`components/datasets/vlm/datasets.py`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageQuestionsConfig {
    /// JSON, JSONL or Parquet files, folders or patterns.
    pub paths: Vec<PathBuf>,
    /// Of a folder, the files that belong to this split, as the hub names them: `train-00000-of-00002.parquet`.
    pub split: String,
    /// Rows `[start, end)` of the split.
    pub rows: (Option<usize>, Option<usize>),
}

pub(super) fn read(s: &mut Section<'_>) -> Result<ImageQuestionsConfig> {
    let paths = row_paths(s)?;
    let split = s.text("split", "which files of a folder, and which rows, as in `train[:128]`")?;
    let split = split.unwrap_or_else(|| "train".to_owned());
    let Some(rows) = slice(&split) else {
        return Err(s.refuse("split", "a split such as `train` or `train[128:256]`"));
    };
    let split = split.split('[').next().unwrap_or_default().to_owned();
    Ok(ImageQuestionsConfig { paths, split, rows })
}
