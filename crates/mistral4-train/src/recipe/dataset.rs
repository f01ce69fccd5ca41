//! `dataset`, `dataloader`, `packed_sequence` and their validation twins.

use std::path::PathBuf;

use super::image_questions::{self, ImageQuestionsConfig};
use super::reader::Section;
use super::report::Effect;
use crate::error::Result;

/// What to do with a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// Stop with the file, line and field.
    #[default]
    Fail,
    /// Leave the row out and count it.
    Skip,
}

/// `dataset`: where samples come from.
#[derive(Debug, Clone, PartialEq)]
pub enum DatasetConfig {
    /// Rows `{"input_ids", "labels"}`.
    PretokenizedJsonl {
        /// Files.
        paths: Vec<PathBuf>,
        /// Whether labels line up with inputs, so that the trainer shifts them.
        unshifted: bool,
    },
    /// Rows of `messages` or ShareGPT `conversations`, with or without images.
    Chat(ChatDatasetConfig),
    /// Rows of an image, a question and its answer.
    ImageQuestions(ImageQuestionsConfig),
    /// Rows of a context, a question and an answer in named columns.
    Instruction(InstructionDatasetConfig),
    /// Plain text, cut into pieces of one length.
    Text(TextDatasetConfig),
    /// The bundled handwritten digits as image conversations.
    OptDigits {
        /// Train or held-out part.
        split: Split,
        /// Side of an image, in pixels.
        image_size: u32,
        /// Placements (turned, zoomed, shifted) in which each image comes.
        variants: usize,
        /// What is asked about it.
        task: DigitsTask,
    },
    /// Random tokens, for benchmarks.
    Mock {
        /// Ids are drawn below this.
        vocab_size: usize,
        /// Tokens of a sample.
        seq_len: usize,
        /// Samples of an epoch.
        num_samples: usize,
    },
    /// A data set of NeMo AutoModel that is fetched from the Hugging Face hub; the report says why it cannot run.
    Hub(&'static str),
}

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// For training.
    Train,
    /// Held out.
    Validation,
}

/// Chat rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatDatasetConfig {
    /// JSON, JSONL or Parquet files, folders or patterns.
    pub paths: Vec<PathBuf>,
    /// Rows `[start, end)` of all rows, from a split such as `train[128:]`.
    pub rows: (Option<usize>, Option<usize>),
    /// Rows with more tokens are cut where `truncation` is on.
    pub seq_length: Option<usize>,
    /// Whether long rows are cut.
    pub truncation: bool,
    /// Whether only the last answer is learned.
    pub mask_history: bool,
    /// Whether thinking is left out of the loss.
    pub mask_reasoning_content: bool,
    /// Folder that image paths are relative to; default the data file's.
    pub media_dir: Option<PathBuf>,
}

/// Column-mapped instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstructionDatasetConfig {
    /// JSON, JSONL or Parquet files, folders or patterns.
    pub paths: Vec<PathBuf>,
    /// Rows `[start, end)` of all rows.
    pub rows: (Option<usize>, Option<usize>),
    /// Column that comes first.
    pub context: Option<String>,
    /// Column that comes second.
    pub question: Option<String>,
    /// Column that is learned.
    pub answer: String,
    /// Whether the prompt is left out of the loss.
    pub answer_only_loss_mask: bool,
    /// Whether rows are rendered as conversations (context as system message).
    pub use_chat_template: bool,
    /// Rows with more tokens are cut where `truncation` is on.
    pub seq_length: Option<usize>,
    /// Whether long rows are cut.
    pub truncation: bool,
}

/// Plain text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextDatasetConfig {
    /// Text files (a document each), JSONL or Parquet files (a document a row), folders or patterns.
    pub paths: Vec<PathBuf>,
    /// Column with the text of a row.
    pub text_column: String,
    /// Most tokens of a piece.
    pub seq_length: usize,
    /// Which part of every file: the last twentieth is held out.
    pub split: Option<Split>,
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// It lies beside the model's weights or configuration.
    Model,
    /// A folder, a file or a hub id.
    Path(String),
    /// It is learned from the training texts.
    Learned {
        /// Most entries, control tokens and bytes included.
        vocab_size: usize,
    },
}

/// A data set with what all data sets share.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetSection {
    /// Where samples come from.
    pub source: DatasetConfig,
    /// Tokenizer.
    pub tokenizer: TokenizerSource,
    /// What to do with unusable rows.
    pub on_error: OnError,
    /// Only the first rows are used.
    pub limit_dataset_samples: Option<usize>,
}

/// What is asked about an image of a digit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DigitsTask {
    /// Which digit it is.
    #[default]
    Name,
    /// Which digit comes after it; zero after nine.
    Next,
}

#[derive(Clone, Copy, PartialEq)]
enum Target {
    Pretokenized,
    Chat,
    ImageQuestions,
    Instruction,
    Text,
    OptDigits,
    Mock,
    Hub(&'static str),
}

const TASKS: [(&str, DigitsTask); 2] = [("name", DigitsTask::Name), ("next", DigitsTask::Next)];

const TARGETS: [(&str, Target); 28] = [
    ("pretokenized_jsonl", Target::Pretokenized),
    ("nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset", Target::Chat),
    ("ChatDataset", Target::Chat),
    ("chat_jsonl", Target::Chat),
    ("chat_parquet", Target::Chat),
    ("vlm_chat_jsonl", Target::Chat),
    ("text", Target::Text),
    ("optdigits", Target::OptDigits),
    ("nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset", Target::Mock),
    ("MockIterableDataset", Target::Mock),
    ("nemo_automodel.components.datasets.vlm.datasets.make_medpix_dataset", Target::ImageQuestions),
    ("make_medpix_dataset", Target::ImageQuestions),
    ("nemo_automodel.components.datasets.vlm.datasets.make_rdr_dataset", Target::Hub("rdr")),
    ("make_rdr_dataset", Target::Hub("rdr")),
    ("nemo_automodel.components.datasets.vlm.datasets.make_cord_v2_dataset", Target::Hub("cord-v2")),
    ("make_cord_v2_dataset", Target::Hub("cord-v2")),
    ("nemo_automodel.components.datasets.vlm.datasets.make_tulu3_dataset", Target::Hub("tulu3")),
    ("make_tulu3_dataset", Target::Hub("tulu3")),
    ("nemo_automodel.components.datasets.vlm.datasets.make_unimm_chat_dataset", Target::Hub("unimm-chat")),
    ("make_unimm_chat_dataset", Target::Hub("unimm-chat")),
    ("nemo_automodel.components.datasets.vlm.datasets.make_meta_dataset", Target::Hub("meta")),
    ("make_meta_dataset", Target::Hub("meta")),
    ("nemo_automodel.components.datasets.llm.squad.make_squad_dataset", Target::Hub("squad")),
    ("make_squad_dataset", Target::Hub("squad")),
    ("nemo_automodel.components.datasets.llm.hellaswag.HellaSwag", Target::Hub("hellaswag")),
    ("HellaSwag", Target::Hub("hellaswag")),
    (
        "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset",
        Target::Instruction,
    ),
    ("ColumnMappedTextInstructionDataset", Target::Instruction),
];

const SPLITS: [(&str, Split); 4] = [
    ("train", Split::Train),
    ("validation", Split::Validation),
    ("test", Split::Validation),
    ("heldout", Split::Validation),
];

impl DatasetSection {
    /// Reads `dataset` or a `validation_dataset*`; `None` when the recipe has no such section.
    pub(crate) fn read(root: &mut Section<'_>, key: &str) -> Result<Option<Self>> {
        let Some(mut s) = root.optional_section(key)? else { return Ok(None) };
        let Some(target) = s.name("_target_", "the kind of data set", &TARGETS)? else {
            return Err(s.missing("_target_", "the kind of data set, such as `pretokenized_jsonl`"));
        };
        let source = match target {
            Target::Pretokenized => DatasetConfig::PretokenizedJsonl {
                paths: paths(&mut s, "path_or_dataset")?,
                unshifted: s
                    .bool("unshifted", "labels line up with inputs; they are shifted here")?
                    .unwrap_or(false),
            },
            Target::Chat => DatasetConfig::Chat(read_chat(&mut s)?),
            Target::ImageQuestions => DatasetConfig::ImageQuestions(image_questions::read(&mut s)?),
            Target::Instruction => DatasetConfig::Instruction(read_instruction(&mut s)?),
            Target::Text => DatasetConfig::Text(TextDatasetConfig {
                paths: paths(&mut s, "path_or_dataset")?,
                text_column: s
                    .text("text_column", "column with the text of a JSONL or Parquet row")?
                    .unwrap_or_else(|| "text".to_owned()),
                seq_length: match s.count("seq_length", "most tokens of a piece")? {
                    Some(length) => length,
                    None => return Err(s.missing("seq_length", "most tokens of a piece")),
                },
                split: s.name("split", "train, or the last twentieth of every file", &SPLITS)?,
            }),
            Target::OptDigits => DatasetConfig::OptDigits {
                split: s
                    .name("split", "train, or the last fifth of the images", &SPLITS)?
                    .unwrap_or(Split::Train),
                image_size: read_image_size(&mut s)?,
                variants: s
                    .count_up_to("variants", "placements (turned, zoomed, shifted) of each image", 1000)?
                    .unwrap_or(1),
                task: s
                    .name("task", "what is asked: the digit's name, or the digit after it", &TASKS)?
                    .unwrap_or_default(),
            },
            Target::Mock => DatasetConfig::Mock {
                vocab_size: s.count("vocab_size", "random ids are drawn below this")?.unwrap_or(1024),
                seq_len: s.count_up_to("seq_len", "tokens of a sample", 1 << 24)?.unwrap_or(1024),
                num_samples: s
                    .count_up_to("num_samples", "samples of an epoch", 1 << 27)?
                    .unwrap_or(1_000_000),
            },
            Target::Hub(name) => {
                read_hub(&mut s);
                DatasetConfig::Hub(name)
            }
        };
        let section = Self {
            source,
            tokenizer: read_tokenizer(&mut s)?,
            on_error: s
                .name(
                    "on_error",
                    "whether an unusable row stops the run",
                    &[("fail", OnError::Fail), ("skip", OnError::Skip)],
                )?
                .unwrap_or_default(),
            limit_dataset_samples: s.count("limit_dataset_samples", "only the first rows are used")?,
        };
        s.finish()?;
        Ok(Some(section))
    }
}

fn read_image_size(s: &mut Section<'_>) -> Result<u32> {
    match s.count("image_size", "side of an image, in pixels")? {
        Some(side) if !(8..=1024).contains(&side) => {
            Err(s.refuse("image_size", "a side of 8 to 1024 pixels"))
        }
        side => Ok(side.unwrap_or(32) as u32),
    }
}

fn paths(s: &mut Section<'_>, key: &'static str) -> Result<Vec<PathBuf>> {
    match s.texts(key, "the data files")? {
        Some(paths) if !paths.is_empty() => Ok(paths.into_iter().map(PathBuf::from).collect()),
        _ => Err(s.missing(key, "the data file, or a list of them")),
    }
}

impl DatasetConfig {
    /// Its files, folders and patterns; made-up and bundled data have none.
    pub fn paths(&self) -> &[PathBuf] {
        match self {
            Self::PretokenizedJsonl { paths, .. } => paths,
            Self::Chat(config) => &config.paths,
            Self::ImageQuestions(config) => &config.paths,
            Self::Instruction(config) => &config.paths,
            Self::Text(config) => &config.paths,
            Self::OptDigits { .. } | Self::Mock { .. } | Self::Hub(_) => &[],
        }
    }
}

/// `path_or_dataset`, or the longer name that NeMo AutoModel has for some data sets.
pub(super) fn row_paths(s: &mut Section<'_>) -> Result<Vec<PathBuf>> {
    let what = "the data files";
    let short = s.texts("path_or_dataset", what)?;
    let long = s.texts("path_or_dataset_id", what)?;
    match short.or(long) {
        Some(paths) if !paths.is_empty() => Ok(paths.into_iter().map(PathBuf::from).collect()),
        _ => Err(s.missing("path_or_dataset", "the data file, or a list of them")),
    }
}

fn read_rows(s: &mut Section<'_>) -> Result<(Option<usize>, Option<usize>)> {
    match s.text("split", "which rows, as in `train[:128]`")? {
        Some(split) => match slice(&split) {
            Some(rows) => Ok(rows),
            None => Err(s.refuse("split", "a split such as `train` or `train[128:256]`")),
        },
        None => Ok((None, None)),
    }
}

fn read_truncation(s: &mut Section<'_>) -> Result<bool> {
    let truncation = s.name(
        "truncation",
        "whether rows longer than seq_length are cut",
        &[
            ("true", true),
            ("True", true),
            ("longest_first", true),
            ("false", false),
            ("False", false),
            ("do_not_truncate", false),
        ],
    )?;
    Ok(truncation.unwrap_or(false))
}

fn read_instruction(s: &mut Section<'_>) -> Result<InstructionDatasetConfig> {
    let (paths, rows) = (row_paths(s)?, read_rows(s)?);
    let mut mapping = s.section("column_mapping")?;
    let context = mapping.text("context", "column that comes first")?;
    let question = mapping.text("question", "column that comes second")?;
    let Some(answer) = mapping.text("answer", "column that is learned")? else {
        return Err(mapping.missing("answer", "the column that is learned"));
    };
    if context.is_none() && question.is_none() {
        return Err(mapping.missing("question", "a column to answer (or `context`)"));
    }
    mapping.finish()?;
    let config = InstructionDatasetConfig {
        paths,
        rows,
        context,
        question,
        answer,
        answer_only_loss_mask: s
            .bool("answer_only_loss_mask", "the prompt is left out of the loss")?
            .unwrap_or(true),
        use_chat_template: s
            .bool("use_hf_chat_template", "rows are rendered in the chat form")?
            .unwrap_or(false),
        seq_length: s.count("seq_length", "rows with more tokens are cut where truncation is on")?,
        truncation: read_truncation(s)?,
    };
    s.no_effect("padding", "a batch is padded to its longest row; padding changes no result");
    s.unsupported("name", "read from files, which have no subsets");
    Ok(config)
}

fn read_chat(s: &mut Section<'_>) -> Result<ChatDatasetConfig> {
    let (paths, rows, truncation) = (row_paths(s)?, read_rows(s)?, read_truncation(s)?);
    let config = ChatDatasetConfig {
        paths,
        rows,
        seq_length: s.count("seq_length", "rows with more tokens are cut where truncation is on")?,
        truncation,
        mask_history: s.bool("mask_history", "only the last answer is learned")?.unwrap_or(false),
        mask_reasoning_content: s
            .bool("mask_reasoning_content", "thinking is left out of the loss")?
            .unwrap_or(false),
        media_dir: s.path("media_dir", "folder that image paths are relative to")?,
    };
    s.no_effect("padding", "a batch is padded to its longest row; padding changes no result");
    s.no_effect("unshifted", "labels are shifted once, here or there");
    s.no_effect("start_of_turn_token", "answers are found by their place in the rendered form");
    s.unsupported("chat_template", "the chat form of the tokenizer's own version is rendered");
    s.unsupported(
        "shuffle_seed",
        "rows are shuffled by the dataloader; shuffle the file before a split is cut",
    );
    s.unsupported("name", "read from files, which have no subsets");
    s.unsupported_unless("skip_invalid_samples", "write `on_error: skip`", |node| {
        node.to_string() == "false"
    });
    Ok(config)
}

/// `train[a:b]` as row bounds; a bare name is all rows.
pub(super) fn slice(split: &str) -> Option<(Option<usize>, Option<usize>)> {
    let bound = |text: &str| match text {
        "" => Some(None),
        text => text.parse().ok().map(Some),
    };
    match split.split_once('[') {
        None => split.chars().all(|c| c.is_alphanumeric() || c == '_').then_some((None, None)),
        Some((_, rest)) => {
            let (start, end) = rest.strip_suffix(']')?.split_once(':')?;
            Some((bound(start)?, bound(end)?))
        }
    }
}

/// A data set that would be downloaded: every key is accepted, and the target blocks a run.
fn read_hub(s: &mut Section<'_>) {
    let reason = "this build reads local files only; export the rows to JSONL (`messages`, with image paths) and use \
                  `_target_: chat_jsonl`";
    s.mark("_target_", Effect::Unsupported(reason.to_owned()));
    s.none_of_effect(
        &[
            "path_or_dataset",
            "path_or_dataset_id",
            "dataset_name",
            "split",
            "seq_length",
            "start_of_turn_token",
            "fp8",
            "column_mapping",
            "answer_only_loss_mask",
            "num_samples_limit",
            "shuffle_seed",
            "max_length",
            "name",
            "root_path",
        ],
        "read only by a data set that this build does not have",
    );
}

fn read_tokenizer(s: &mut Section<'_>) -> Result<TokenizerSource> {
    const NAMES: [(&str, bool); 5] = [
        ("transformers.AutoTokenizer.from_pretrained", false),
        ("nemo_automodel._transformers.auto_tokenizer.NeMoAutoTokenizer.from_pretrained", false),
        ("nemo_automodel.NeMoAutoTokenizer.from_pretrained", false),
        ("AutoTokenizer.from_pretrained", false),
        ("learned", true),
    ];
    let what = "the tokenizer, where it is not the model's";
    if !s.is_section("tokenizer") {
        return Ok(s.text("tokenizer", what)?.map_or(TokenizerSource::Model, TokenizerSource::Path));
    }
    let mut t = s.section("tokenizer")?;
    let learned = t.name("_target_", "reads a tokenizer, or learns one from the training texts", &NAMES)?;
    let source = if learned == Some(true) {
        match t.count("vocab_size", "most entries of the vocabulary that is learned")? {
            Some(vocab_size) => TokenizerSource::Learned { vocab_size },
            None => return Err(t.missing("vocab_size", "most entries of the vocabulary that is learned")),
        }
    } else {
        let path = t.text("pretrained_model_name_or_path", what)?;
        path.map_or(TokenizerSource::Model, TokenizerSource::Path)
    };
    t.none_of_effect(&["trust_remote_code", "use_fast"], "no foreign code is run");
    t.finish()?;
    Ok(source)
}

/// `dataloader`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataloaderConfig {
    /// Whether each epoch has its own order.
    pub shuffle: bool,
    /// Whether a last batch that is not full is left out.
    pub drop_last: bool,
    /// Rows with more tokens are left out.
    pub max_length: Option<usize>,
    /// Tokens that a micro-batch may hold, in place of `local_batch_size` rows.
    pub max_tokens_per_micro_batch: Option<usize>,
    /// Rows of a stream that are shuffled among each other.
    pub shuffle_buffer_size: usize,
    /// Threads that make batches ahead of the step.
    pub num_workers: usize,
    /// Micro-batches that each of them makes ahead.
    pub prefetch_factor: usize,
}

impl DataloaderConfig {
    /// Reads `dataloader` or `validation_dataloader`; `shuffle` is the default of that key.
    pub(crate) fn read(root: &mut Section<'_>, key: &str, shuffle: bool) -> Result<Self> {
        let mut s = root.section(key)?;
        s.name(
            "_target_",
            "batches in a seeded, resumable order",
            &[
                ("torchdata.stateful_dataloader.StatefulDataLoader", ()),
                ("torch.utils.data.DataLoader", ()),
                ("StatefulDataLoader", ()),
                ("DataLoader", ()),
            ],
        )?;
        let max_length = read_collate(&mut s)?;
        let config = Self {
            shuffle: s.bool("shuffle", "whether each epoch has its own order")?.unwrap_or(shuffle),
            drop_last: s
                .bool("drop_last", "whether a last batch that is not full is left out")?
                .unwrap_or(false),
            max_length,
            max_tokens_per_micro_batch: s.count(
                "max_tokens_per_micro_batch",
                "tokens that a micro-batch may hold, in place of local_batch_size rows",
            )?,
            shuffle_buffer_size: s
                .count_up_to("shuffle_buffer_size", "rows of a stream that are shuffled together", 1 << 24)?
                .unwrap_or(1024),
            num_workers: s.usize_up_to("num_workers", "threads that make batches ahead", 256)?.unwrap_or(1),
            prefetch_factor: s
                .count_up_to("prefetch_factor", "micro-batches that each worker makes ahead", 1024)?
                .unwrap_or(2),
        };
        s.none_of_effect(
            &["pin_memory", "persistent_workers", "multiprocessing_context"],
            "changes how batches are fetched, not which",
        );
        s.unsupported("batch_size", "set step_scheduler.local_batch_size instead");
        s.unsupported("group_by_length", "rows are not grouped by length");
        s.finish()?;
        Ok(config)
    }
}

fn read_collate(s: &mut Section<'_>) -> Result<Option<usize>> {
    const NAMES: [(&str, ()); 10] = [
        ("nemo_automodel.components.datasets.utils.default_collater", ()),
        ("nemo_automodel.components.datasets.utils.packed_sequence_thd_collater", ()),
        ("nemo_automodel.components.datasets.vlm.collate_fns.default_collate_fn", ()),
        ("nemo_automodel.components.datasets.vlm.collate_fns.pad_collate_fn", ()),
        ("nemo_automodel.components.datasets.vlm.collate_fns.neat_packed_vlm_collater", ()),
        ("default_collater", ()),
        ("packed_sequence_thd_collater", ()),
        ("default_collate_fn", ()),
        ("pad_collate_fn", ()),
        ("neat_packed_vlm_collater", ()),
    ];
    let what = "rows are padded, or packed where packed_sequence says so";
    if !s.is_section("collate_fn") {
        s.name("collate_fn", what, &NAMES)?;
        return Ok(None);
    }
    let mut c = s.section("collate_fn")?;
    c.name("_target_", what, &NAMES)?;
    let max_length = c.count("max_length", "rows with more tokens are left out")?;
    c.none_of_effect(&["pad_seq_len_divisible", "drop_overlong"], "padding changes no result");
    c.finish()?;
    Ok(max_length)
}
