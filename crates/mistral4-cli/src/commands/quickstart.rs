//! `mistral4 quickstart`: a small multimodal model, from nothing to an answer about an image.

use std::path::PathBuf;

use clap::Args;
use mistral4_train::quickstart;

use super::train::{Watcher, on_interrupt, summarise};
use crate::arguments::ComputeArguments;
use crate::error::Result;
use crate::stdout;

/// Steps between two lines where there is no terminal.
const LINE_EVERY: usize = 20;

/// Arguments of `mistral4 quickstart`.
#[derive(Debug, Args)]
pub struct QuickstartArguments {
    /// Folder for the checkpoint, the metrics and the pictures
    #[arg(long, value_name = "DIR", default_value = "quickstart-out")]
    pub out: PathBuf,
    /// Optimizer steps; by default enough to read most digits
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: Option<u32>,
    /// Seed of weights and data order
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArguments,
}

/// Runs the command.
///
/// # Errors
/// A folder that cannot be written.
pub fn run(arguments: &QuickstartArguments) -> Result<()> {
    let device = arguments.compute.device.open()?;
    let interrupted = on_interrupt("finishing this step and saving; once more to leave at once")?;
    let mut watcher = Watcher::new(LINE_EVERY);
    let steps = arguments.steps.map(|steps| steps as usize);
    let outcome =
        quickstart::run(&arguments.out, steps, arguments.seed, &device, &interrupted, &mut |event| {
            watcher.see(event)
        })?;
    drop(watcher);
    summarise(&outcome.run)?;
    let (correct, all) = outcome.correct;
    let example = &outcome.example;
    let dir = outcome.model_dir.display();
    let image = example.image.display();
    stdout::print(&format!(
        "\nheld-out accuracy: {correct} of {all} digits ({:.1} %), by the checkpoint read back from disk\n\
         \nimage:    {image} (a {})\nquestion: {}\nanswer:   {}\n\
         \nask it yourself:\n  mistral4 generate --model {dir} --image {image} --prompt \"{}\"\n",
        100.0 * correct as f64 / all.max(1) as f64,
        example.digit,
        example.question,
        example.answer.trim(),
        example.question
    ))
}
