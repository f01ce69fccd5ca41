//! `mistral4 tokenize`: the token ids of a text or a conversation.

use std::path::PathBuf;

use clap::Args;
use mistral4_processor::{ImageBatch, Processor, tokenize_json};

use super::prompt;
use crate::error::{Error, Result};
use crate::load::model_folder;
use crate::stdout;
use crate::tensors::{self, NamedArray};

/// Arguments of `mistral4 tokenize`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["prompt", "prompt_file", "messages"]))]
pub struct TokenizeArguments {
    /// Checkpoint folder, or an id of the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Text to encode alone: no begin token, no chat form
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// File with the text
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Conversation: `[{role, content}]` or `{"messages": [..], "tools": [..], "reasoning_effort": ".."}`
    #[arg(long, value_name = "FILE.json")]
    pub messages: Option<PathBuf>,
    /// Image for the next image part without a path; may be repeated
    #[arg(long, value_name = "FILE", requires = "messages")]
    pub image: Vec<PathBuf>,
    /// Also write input_ids i64 `[1,S]`, pixel_values f32 and image_sizes i64 as the model takes them
    #[arg(long, value_name = "OUT.safetensors")]
    pub outputs: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A tokenizer, conversation or image that cannot be used.
pub fn run(arguments: &TokenizeArguments) -> Result<()> {
    let processor = Processor::from_dir(&model_folder(&arguments.model)?)?;
    let tokenizer = processor.tokenizer();
    let (ids, images) = match (&arguments.messages, &arguments.prompt, &arguments.prompt_file) {
        (Some(file), ..) => {
            let images = prompt::read_images(&arguments.image)?;
            let rendered = prompt::render_file(&processor, file, &images)?;
            (rendered.ids, prompt::batch(&processor, &rendered.images))
        }
        (None, Some(text), _) => (tokenizer.encode(text)?, None),
        (None, None, Some(file)) => (tokenizer.encode(&prompt::read_text(file)?)?, None),
        (None, None, None) => {
            return Err(Error::input(
                "there is nothing to encode",
                "give --prompt, --prompt-file or --messages",
            ));
        }
    };
    if let Some(path) = &arguments.outputs {
        tensors::write(path, &arrays(&ids, images))?;
    }
    stdout::print_json(&tokenize_json(&ids, tokenizer)?)
}

fn arrays(ids: &[u32], images: Option<ImageBatch>) -> Vec<NamedArray> {
    let values = ids.iter().map(|&id| i64::from(id)).collect();
    let mut arrays = vec![NamedArray::i64("input_ids", [1, ids.len()], values)];
    if let Some(ImageBatch { pixel_values, height, width, image_sizes }) = images {
        let count = image_sizes.len();
        let sizes = image_sizes.into_iter().flatten().map(|side| side as i64).collect();
        arrays.push(NamedArray::f32("pixel_values", [count, 3, height, width], pixel_values));
        arrays.push(NamedArray::i64("image_sizes", [count, 2], sizes));
    }
    arrays
}
