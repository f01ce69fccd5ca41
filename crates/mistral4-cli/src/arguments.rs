//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::error::ErrorKind as ClapErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use mistral4_checkpoint::config::{ConfigOptions, SoftmaxScalePolicy};
use mistral4_checkpoint::weights::DType;

use crate::commands;
use crate::device::DeviceChoice;
use crate::error::Error;
use crate::quantize::QuantizeArguments;
use crate::stdout;

/// The Mistral 4 model family in Rust: train, generate, chat, convert, inspect, compare, measure.
#[derive(Debug, Parser)]
#[command(name = "mistral4", version, max_term_width = 100, subcommand_required = true)]
pub struct Arguments {
    /// Threads for CPU work; by default one a core, or what RAYON_NUM_THREADS says
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A command with its arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a small multimodal model from scratch on bundled images, and ask it about one
    Quickstart(commands::quickstart::QuickstartArguments),
    /// Run a training recipe
    Train(commands::train::TrainArguments),
    /// Draw a run: loss, learning rate, throughput, load of the experts
    Plot(commands::plot::PlotArguments),
    /// Serve the live page of a run, under way or done, to this machine
    Dashboard(commands::dashboard::DashboardArguments),
    /// Show what training will see
    Data(commands::data::DataArguments),
    /// Show what a recipe may hold
    Recipe(commands::recipe::RecipeArguments),
    /// Continue a prompt or answer a conversation
    Generate(commands::generate::GenerateArguments),
    /// Talk to a model
    Chat(commands::chat::ChatArguments),
    /// Show the token ids of a text or a conversation
    Tokenize(commands::tokenize::TokenizeArguments),
    /// Run one forward (and backward) pass on tensors of a file, to compare implementations
    Forward(commands::forward::ForwardArguments),
    /// Show what a checkpoint or a configuration is
    Inspect(commands::inspect::InspectArguments),
    /// Write a checkpoint in another form or number format
    Convert(commands::convert::ConvertArguments),
    /// Fold an adapter into the weights of its base model
    Merge(commands::merge::MergeArguments),
    /// Write a checkpoint with random weights
    Init(commands::init::InitArguments),
    /// Measure speed and memory with random weights
    Bench(commands::bench::BenchArguments),
}

/// Number formats for computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatDType {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

impl FloatDType {
    /// The same format in the libraries.
    pub fn dtype(self) -> DType {
        match self {
            FloatDType::F32 => DType::F32,
            FloatDType::Bf16 => DType::BF16,
        }
    }

    /// The format's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FloatDType::F32 => "f32",
            FloatDType::Bf16 => "bf16",
        }
    }
}

impl ValueEnum for FloatDType {
    fn value_variants<'a>() -> &'a [Self] {
        &[FloatDType::F32, FloatDType::Bf16]
    }

    // Written by hand, since derived values carry their documentation into a page-long help.
    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// Where and how to compute.
#[derive(Debug, Clone, Copy, Args)]
pub struct ComputeArguments {
    /// flex (the CPU), vulkan, cuda, cuda:N, metal or rocm
    #[arg(long, value_name = "DEVICE", default_value = "flex")]
    pub device: DeviceChoice,
}

/// Which model, and how it is read.
#[derive(Debug, Clone, Args)]
pub struct ModelArguments {
    /// Checkpoint folder, or an id of the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Folder of a low-rank adapter to use with it, in the form of the peft library
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Softmax scale, whatever the model's configuration says: standard or yarn-mscale
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    pub softmax_scale: Option<SoftmaxScalePolicy>,
    /// How weights are quantised.
    #[command(flatten)]
    pub quantize: QuantizeArguments,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArguments,
}

impl ModelArguments {
    /// The choices that win over the configuration.
    pub fn config_options(&self) -> ConfigOptions {
        ConfigOptions { softmax_scale: self.softmax_scale }
    }
}

pub(crate) fn parse_policy(text: &str) -> Result<SoftmaxScalePolicy, String> {
    SoftmaxScalePolicy::from_name(text).ok_or_else(|| "use standard or yarn-mscale".to_owned())
}

/// Why there is no command to run.
pub(crate) enum Stop {
    /// Help or version was asked for: print this and leave.
    Text(String),
    /// The command line is wrong.
    Usage(Error),
}

/// Reads the command line.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Arguments, Stop> {
    let mut command = Arguments::command();
    let arguments = own_options_first(arguments.into_iter().collect());
    let matches = command.try_get_matches_from_mut(&arguments);
    matches.and_then(|matches| Arguments::from_arg_matches(&matches)).map_err(|error| {
        let named = arguments.iter().filter_map(|argument| command.find_subcommand(argument)).next();
        stop(&error, named.map(clap::Command::get_name))
    })
}

/// Moves the options of `train` itself in front of the recipe, since all that follows it is taken for overrides.
fn own_options_first(arguments: Vec<OsString>) -> Vec<OsString> {
    const WITH_VALUE: [&str; 3] = ["--device", "--nproc", "--threads"];
    const ALONE: [&str; 4] = ["--dry-run", "--dashboard", "--help", "-h"];
    let is_command = |argument: &OsString| Arguments::command().find_subcommand(argument).is_some();
    let Some(train) = arguments.iter().position(is_command) else { return arguments };
    if arguments[train] != "train" {
        return arguments;
    }
    let mut first: Vec<OsString> = arguments[..=train].to_vec();
    let mut rest = Vec::new();
    let mut remaining = arguments.into_iter().skip(train + 1).peekable();
    while let Some(argument) = remaining.next() {
        let text = argument.to_string_lossy();
        let is_pair = |name: &&str| text.strip_prefix(*name).is_some_and(|value| value.starts_with('='));
        let port = |argument: &OsString| argument.to_string_lossy().parse::<u16>().is_ok();
        if text == "--dashboard"
            && let Some(port) = remaining.next_if(port)
        {
            first.push(format!("--dashboard={}", port.to_string_lossy()).into());
        } else if text.starts_with("--dashboard=")
            || ALONE.contains(&text.as_ref())
            || WITH_VALUE.iter().any(is_pair)
        {
            first.push(argument);
        } else if WITH_VALUE.contains(&text.as_ref()) {
            first.push(argument);
            first.extend(remaining.next());
        } else {
            rest.push(argument);
        }
    }
    first.extend(rest);
    first
}

fn stop(error: &clap::Error, command: Option<&str>) -> Stop {
    use ClapErrorKind as K;
    match error.kind() {
        K::DisplayHelp | K::DisplayVersion | K::DisplayHelpOnMissingArgumentOrSubcommand => {
            let text = error.render();
            Stop::Text(if stdout::is_styled() { text.ansi().to_string() } else { text.to_string() })
        }
        _ => Stop::Usage(usage_error(&error.render().to_string(), command)),
    }
}

/// One chain and one hint out of clap's paragraphs.
fn usage_error(text: &str, command: Option<&str>) -> Error {
    let first: Vec<&str> = text.split("\n\n").next().unwrap_or_default().lines().map(str::trim).collect();
    let message = first.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")).map(str::to_owned);
    let help = || match command {
        Some(command) => format!("see `mistral4 {command} --help`"),
        None => "see `mistral4 --help`".to_owned(),
    };
    Error::input(message, tip.unwrap_or_else(help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_of_train_may_follow_the_recipe() {
        let line = "mistral4 train r.yaml --a.b 1 --device=cuda:2 --dry-run --dashboard 0 --threads 3 --nproc 2 --c.device x";
        let Ok(arguments) = parse(line.split(' ').map(OsString::from)) else { panic!("{line} is right") };
        assert_eq!(arguments.threads, Some(3));
        let Command::Train(train) = arguments.command else { panic!("the command is train") };
        assert!(train.dry_run && train.nproc == Some(2));
        assert_eq!(train.compute.device, DeviceChoice::Cuda(2));
        assert_eq!(train.overrides, ["--a.b", "1", "--c.device", "x"]);
        assert_eq!(train.dashboard, Some(0));
        for (line, port) in
            [("--dashboard r.yaml", 6480), ("--dashboard=7 r.yaml", 7), ("r.yaml --dashboard", 6480)]
        {
            let line = format!("mistral4 train {line}");
            let Ok(arguments) = parse(line.split(' ').map(OsString::from)) else { panic!("{line} is right") };
            let Command::Train(train) = arguments.command else { panic!("the command is train") };
            assert_eq!((train.dashboard, train.recipe.to_str()), (Some(port), Some("r.yaml")), "{line}");
        }
    }

    #[test]
    fn the_word_train_means_the_command_only_in_its_place() {
        let line = ["mistral4", "tokenize", "--model", "m", "--prompt", "train", "--threads", "2"];
        let Ok(arguments) = parse(line.map(OsString::from)) else { panic!("the line is right") };
        let Command::Tokenize(tokenize) = arguments.command else { panic!("the command is tokenize") };
        assert_eq!(tokenize.prompt.as_deref(), Some("train"));
    }
}
