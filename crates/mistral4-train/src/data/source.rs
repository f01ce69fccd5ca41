//! From a recipe's `dataset` section to the data set itself.

use std::path::PathBuf;
use std::sync::Arc;

use mistral4_processor::Processor;
use mistral4_processor::tokenizer::{ImageConfig, TekkenBuilder, TekkenFile};

use super::chat::ChatForm;
use super::instruction::InstructionForm;
use super::jsonl::JsonlFiles;
use super::optdigits::{self, OptDigitsDataset};
use super::parquet::ParquetFiles;
use super::text::TextDataset;
use super::{
    DataSource, Dataset, LoaderOptions, MockDataset, PretokenizedJsonl, image_questions, paths, row,
};
use crate::error::{Error, Result};
use crate::recipe::{DatasetConfig, DatasetSection, Recipe};

/// What data sets need to know of the model.
#[derive(Debug, Clone)]
pub struct DataContext {
    /// Tokenizer, chat form and image processor; data that is tokens already does without.
    pub processor: Option<Arc<Processor>>,
    /// Entries of the embedding table, which ids are checked against.
    pub vocab_size: usize,
    /// Seed of made-up data.
    pub seed: u64,
}

/// Opens the data set of a recipe's section.
///
/// # Errors
/// Files that cannot be read, a data set that needs a tokenizer where there is none, and data sets that this build
/// cannot fetch (which [`Recipe::check_runnable`] names first).
pub fn open(section: &DatasetSection, context: &DataContext) -> Result<DataSource> {
    let processor = || {
        context.processor.clone().ok_or_else(|| Error::Inconsistent {
            key: "dataset.tokenizer".to_owned(),
            value: "none".to_owned(),
            message:
                "this data set needs a tokenizer: one beside the model's weights, or `dataset.tokenizer`"
                    .to_owned(),
        })
    };
    let dataset: Arc<dyn Dataset> = match &section.source {
        DatasetConfig::PretokenizedJsonl { paths, unshifted } => {
            let files = paths::expand(paths, &["jsonl", "json"])?;
            Arc::new(PretokenizedJsonl::open(&files, *unshifted, Some(context.vocab_size))?)
        }
        DatasetConfig::Chat(config) => {
            let form = Arc::new(ChatForm { config: config.clone(), processor: processor()? });
            return row::open(&config.paths, config.rows, form);
        }
        DatasetConfig::ImageQuestions(config) => return image_questions::open(config, processor()?),
        DatasetConfig::Instruction(config) => {
            let form = Arc::new(InstructionForm { config: config.clone(), processor: processor()? });
            return row::open(&config.paths, config.rows, form);
        }
        DatasetConfig::Text(config) => {
            return Ok(DataSource::Streamed(Arc::new(TextDataset::open(config, processor()?)?)));
        }
        DatasetConfig::OptDigits { split, image_size, variants, task } => {
            Arc::new(OptDigitsDataset::new(*split, *image_size, *variants, processor()?).with_task(*task))
        }
        DatasetConfig::Mock { vocab_size, seq_len, num_samples } => Arc::new(MockDataset {
            vocab_size: (*vocab_size).min(context.vocab_size),
            seq_len: *seq_len,
            num_samples: *num_samples,
            seed: context.seed,
        }),
        DatasetConfig::Hub(name) => {
            return Err(Error::Inconsistent {
                key: "dataset._target_".to_owned(),
                value: (*name).to_owned(),
                message: "this build reads local files only".to_owned(),
            });
        }
    };
    Ok(DataSource::Indexed(dataset))
}

/// The `_target_` that fits some files, by the first row of the first of them.
///
/// # Errors
/// Files that cannot be read, and rows of no known form.
pub fn guess_target(files: &[String]) -> Result<&'static str> {
    let files: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
    let files = paths::expand(&files, &["jsonl", "json", "parquet", "txt"])?;
    let first = match files[0].extension().and_then(|extension| extension.to_str()) {
        Some("parquet") => ParquetFiles::open(&files[..1], None)?.rows(0, 0)?.next(),
        Some("jsonl" | "json") => Some(JsonlFiles::open(&files[..1])?.row(0)),
        _ => return Ok("text"),
    };
    let Some(row) = first.transpose()? else { return Ok("text") };
    let forms = [
        ("messages", "chat_jsonl"),
        ("conversations", "chat_jsonl"),
        ("conversation", "chat_jsonl"),
        ("input_ids", "pretokenized_jsonl"),
        ("text", "text"),
    ];
    match forms.iter().find(|(key, _)| row.value.get(key).is_some()) {
        Some((_, target)) => Ok(target),
        None => Err(row.error(
            "(row)",
            "is of no known form: it has no `messages`, `conversations`, `input_ids` or `text` \
             (ColumnMappedTextInstructionDataset takes any columns)",
        )),
    }
}

/// Learns a vocabulary of at most `vocab_size` ids from the texts of a data set.
///
/// # Errors
/// Files that cannot be read, and data sets whose texts are not at hand.
pub fn learn_tokenizer(
    section: &DatasetSection,
    vocab_size: usize,
    image: Option<ImageConfig>,
) -> Result<TekkenFile> {
    let refuse = |key: &str, value: String, message: String| Error::Inconsistent {
        key: key.to_owned(),
        value,
        message,
    };
    if vocab_size < TekkenBuilder::MIN_VOCAB_SIZE {
        let message = format!("a vocabulary has at least {} entries", TekkenBuilder::MIN_VOCAB_SIZE);
        return Err(refuse("dataset.tokenizer.vocab_size", vocab_size.to_string(), message));
    }
    let texts = match &section.source {
        DatasetConfig::Text(config) => {
            let read = |path: &std::path::PathBuf| {
                std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.clone(), source })
            };
            paths::expand(&config.paths, &["txt", "text", "md"])?
                .iter()
                .map(read)
                .collect::<Result<Vec<_>>>()?
        }
        DatasetConfig::OptDigits { .. } => optdigits::texts(),
        _ => {
            let message =
                "a vocabulary is learned from `text` and `optdigits` data only; give a tokenizer".to_owned();
            return Err(refuse("dataset.tokenizer", "learned".to_owned(), message));
        }
    };
    let mut builder = TekkenBuilder::new(vocab_size);
    if let Some(image) = image {
        builder = builder.image(image);
    }
    let learned = builder.train(texts.iter().map(String::as_str));
    learned.map_err(|error| refuse("dataset.tokenizer", "learned".to_owned(), error.to_string()))
}

impl LoaderOptions {
    /// How a recipe batches its training data.
    pub fn training(recipe: &Recipe, pad_id: u32) -> Self {
        Self {
            global_batch_size: recipe.step_scheduler.global_batch_size,
            local_batch_size: recipe.step_scheduler.local_batch_size,
            shuffle: recipe.dataloader.shuffle,
            seed: recipe.rng.seed,
            drop_last: recipe.dataloader.drop_last,
            on_error: recipe.dataset.on_error,
            limit: recipe.dataset.limit_dataset_samples,
            max_length: recipe.dataloader.max_length,
            packing: recipe.packed_sequence,
            max_tokens_per_micro_batch: recipe.dataloader.max_tokens_per_micro_batch,
            shuffle_buffer_size: recipe.dataloader.shuffle_buffer_size,
            num_workers: recipe.dataloader.num_workers,
            prefetch_factor: recipe.dataloader.prefetch_factor,
            pad_id,
        }
    }

    /// How a recipe batches one of its validation sets: never packed, which changes no loss, and in steps as large as
    /// those of training.
    pub fn validation(recipe: &Recipe, section: &DatasetSection, pad_id: u32) -> Self {
        Self {
            global_batch_size: recipe.step_scheduler.global_batch_size,
            local_batch_size: recipe.step_scheduler.local_batch_size,
            shuffle: recipe.validation_dataloader.shuffle,
            seed: recipe.rng.seed,
            drop_last: recipe.validation_dataloader.drop_last,
            on_error: section.on_error,
            limit: section.limit_dataset_samples,
            max_length: recipe.validation_dataloader.max_length,
            packing: None,
            max_tokens_per_micro_batch: recipe.validation_dataloader.max_tokens_per_micro_batch,
            shuffle_buffer_size: recipe.validation_dataloader.shuffle_buffer_size,
            num_workers: recipe.validation_dataloader.num_workers,
            prefetch_factor: recipe.validation_dataloader.prefetch_factor,
            pad_id,
        }
    }
}
