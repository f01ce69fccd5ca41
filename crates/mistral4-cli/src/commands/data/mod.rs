//! `mistral4 data`: what training will see.

mod inspect;
mod page;
mod statistics;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::error::Result;

/// Arguments of `mistral4 data`.
#[derive(Debug, Args)]
pub struct DataArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: DataCommand,
}

/// What can be done with data.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Show samples as tokens, which of them are learned, and count
    Inspect(InspectArguments),
}

/// Arguments of `mistral4 data inspect`.
#[derive(Debug, Args)]
#[command(
    after_help = "Learned tokens are green, control tokens bold; without colours learned tokens stand in «».
  mistral4 data inspect recipe.yaml --rows 5 --set packed_sequence.packed_sequence_size=2048
  mistral4 data inspect --data chat.jsonl --model DIR --set dataset.mask_history=true"
)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["recipe", "data"]))]
pub struct InspectArguments {
    /// Recipe whose data to show
    #[arg(value_name = "RECIPE.yaml")]
    pub recipe: Option<PathBuf>,
    /// Data file, folder or pattern, without a recipe; may be repeated
    #[arg(long, value_name = "FILE", requires = "model", conflicts_with = "recipe")]
    pub data: Vec<String>,
    /// Folder (or hub id) with the tokenizer, for --data
    #[arg(long, value_name = "DIR", conflicts_with = "recipe")]
    pub model: Option<String>,
    /// Kind of data set for --data; by default what the first row looks like
    #[arg(long, value_name = "TARGET", requires = "data")]
    pub target: Option<String>,
    /// Held-out set of the recipe, by its name (`default` for validation_dataset)
    #[arg(long, value_name = "NAME", requires = "recipe")]
    pub validation: Option<String>,
    /// Sets a key of the recipe; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Rows (packed rows, where they are packed) to show
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rows: usize,
    /// Samples to count; 0 counts all
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub count: usize,
    /// In the order of the first epoch instead of the file's
    #[arg(long)]
    pub shuffle: bool,
    /// Without colours, as where NO_COLOR is set or the output is no terminal
    #[arg(long)]
    pub no_color: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A recipe, tokenizer or data file that cannot be used.
pub fn run(arguments: &DataArguments) -> Result<()> {
    match &arguments.command {
        DataCommand::Inspect(arguments) => inspect::run(arguments),
    }
}
