//! Questions about images, each a conversation of two turns.
//!
//! Source: `make_medpix_dataset` in NVIDIA NeMo AutoModel (`components/datasets/vlm/datasets.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mistral4_processor::Processor;
use mistral4_processor::json::Json;

use super::chat::ChatForm;
use super::row::{Row, RowForm};
use super::{DataSource, Sample, images, paths, row};
use crate::error::{Error, Result};
use crate::recipe::{ChatDatasetConfig, ImageQuestionsConfig};

/// Opens the rows of a data set's split.
///
/// # Errors
/// Files that cannot be read, and a folder without a file of the split.
pub(super) fn open(config: &ImageQuestionsConfig, processor: Arc<Processor>) -> Result<DataSource> {
    let files: Vec<PathBuf> =
        config.paths.iter().map(|path| of_split(path, &config.split)).collect::<Result<Vec<_>>>()?.concat();
    let chat = ChatDatasetConfig {
        paths: files.clone(),
        rows: config.rows,
        seq_length: None,
        truncation: false,
        mask_history: false,
        mask_reasoning_content: false,
        media_dir: None,
    };
    let chat = ChatForm { config: chat, processor };
    row::open(&files, config.rows, Arc::new(ImageQuestions { chat }))
}

/// The files of a folder that belong to a split; anything else as it is named.
fn of_split(path: &Path, split: &str) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = paths::expand(&[path.to_owned()], &["jsonl", "json", "parquet"])?;
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(split).is_some_and(|rest| rest.starts_with(['-', '.']))
    });
    if files.is_empty() {
        let message = format!(
            "the folder holds no file of the split `{split}`, such as {split}-00000-of-00001.parquet"
        );
        return Err(Error::Dataset { path: path.to_owned(), message });
    }
    Ok(files)
}

struct ImageQuestions {
    chat: ChatForm,
}

impl RowForm for ImageQuestions {
    fn sample(&self, row: Row) -> Result<Sample> {
        let column = |name: &str| match row.value.get(name) {
            Some(value) if !value.is_null() => Ok(value),
            _ => Err(row.error(name, "is missing")),
        };
        let text = |name: &str| match column(name)? {
            Json::String(text) => Ok(images::text_part(text.clone())),
            other => Err(row.error(name, format!("must be text, not {}", other.type_name()))),
        };
        let image = images::image_part(&row, "image_id", column("image_id")?)?;
        let turn = |role: &str, content| {
            let entries = [("role", Json::String(role.to_owned())), ("content", Json::Array(content))];
            Json::Object(entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect())
        };
        let turns =
            vec![turn("user", vec![image, text("question")?]), turn("assistant", vec![text("answer")?])];
        let messages = std::iter::once(("messages".to_owned(), Json::Array(turns))).collect();
        self.chat.sample(Row { value: Json::Object(messages), ..row })
    }
}
