//! `mistral4 generate`: continues a prompt or answers a conversation.

mod answer;
mod defaults;

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use mistral4::Mistral4;
use mistral4::generate::{Request, Sampler, SamplingOptions, generate};
use mistral4_checkpoint::config::Config;
use mistral4_processor::{Processor, ReasoningEffort};

pub(super) use self::answer::Answer;
use self::defaults::GenerationDefaults;
use super::prompt;
use crate::arguments::{FloatDType, ModelArguments};
use crate::error::{Error, Result};
use crate::load::{Base, Loaded, Weights, load_folder, model_folder};
use crate::{format, stdout};

/// Arguments of `mistral4 generate`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["prompt", "messages"]))]
pub struct GenerateArguments {
    /// The model.
    #[command(flatten)]
    pub model: ModelArguments,
    /// Number format of the weights; by default as stored, FP8 as bf16
    #[arg(long, value_enum)]
    pub dtype: Option<FloatDType>,
    /// What to answer, or with --raw what to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Conversation: `[{role, content}]` or `{"messages": [..], "tools": [..], "reasoning_effort": ".."}`
    #[arg(long, value_name = "FILE.json")]
    pub messages: Option<PathBuf>,
    /// Image before the prompt, or for the next image part without a path; may be repeated
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    pub image: Vec<PathBuf>,
    /// Continue the prompt as it is, after a begin token, without the chat form
    #[arg(long, conflicts_with_all = ["messages", "system", "reasoning_effort"])]
    pub raw: bool,
    /// Instructions for the model
    #[arg(long, value_name = "TEXT", conflicts_with = "messages", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// How much the model thinks before it answers, as far as it offers a choice: none or high
    #[arg(long, value_name = "EFFORT", conflicts_with = "messages", value_parser = prompt::parse_effort)]
    pub reasoning_effort: Option<ReasoningEffort>,
    /// How the answer is chosen.
    #[command(flatten)]
    pub sampling: SamplingArguments,
}

/// How tokens are chosen. What is not given is taken from the model's generation_config.json.
#[derive(Debug, Clone, Args)]
pub struct SamplingArguments {
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Randomness; 0 always takes the likeliest token [default: generation_config.json, else 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Keep the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Keep tokens at least this likely relative to the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Make tokens that were there before less likely; 1 does nothing
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
    /// Seed of the random choices
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Stop before this text; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}

/// A model with its processor and the choices for answering, ready to answer.
pub(super) struct Generator {
    pub(super) model: Mistral4,
    pub(super) processor: Processor,
    pub(super) sampling: SamplingOptions,
    pub(super) max_new_tokens: usize,
    pub(super) stop: Vec<String>,
    stop_tokens: Vec<u32>,
    longest: usize,
}

/// How long an answer took.
pub(super) struct Timing {
    /// Tokens of the prompt and seconds until the first token.
    pub(super) prompt: (usize, f64),
    /// Tokens after the first and the seconds they took.
    pub(super) rest: (usize, f64),
}

impl Timing {
    pub(super) fn describe(&self) -> String {
        let ((prompt, first), (rest, seconds)) = (self.prompt, self.rest);
        let speed = match rest {
            0 => String::new(),
            n => format!(", then {:.1} tokens/s", n as f64 / seconds.max(1e-9)),
        };
        format!("{prompt} tokens in, {} out; first after {}{speed}", rest + 1, format::seconds(first))
    }
}

impl Generator {
    /// Loads model and processor.
    pub(super) fn load(
        model: &ModelArguments,
        dtype: Option<FloatDType>,
        processor: Processor,
        folder: &std::path::Path,
        sampling: &SamplingArguments,
    ) -> Result<Self> {
        let defaults = GenerationDefaults::read(folder)?;
        let options = defaults.sampling(sampling);
        // What is wrong with them is said before the weights are read.
        Sampler::new(options.clone())?;
        let device = model.compute.device.open()?;
        let dtype = dtype.map(FloatDType::dtype);
        let weights = Weights::from(model.quantize.resolve()?);
        let base = Base { folder, adapter: model.adapter.as_deref() };
        let Loaded { model, checkpoint, .. } =
            load_folder(base, dtype, weights, &model.config_options(), &device)?;
        let stop_tokens = stop_tokens(checkpoint.config(), &processor, &defaults);
        Ok(Generator {
            model: model.pack(),
            processor,
            sampling: options,
            max_new_tokens: sampling.max_new_tokens,
            stop: sampling.stop.clone(),
            stop_tokens,
            longest: checkpoint.config().text.max_position_embeddings,
        })
    }

    /// Answers, handing each piece of text to `on_text` as soon as it is certain; returns the answer's ids.
    pub(super) fn answer(
        &self,
        input_ids: Vec<u32>,
        images: Option<mistral4::Images>,
        mut on_text: impl FnMut(&str) -> Result<()>,
    ) -> Result<(Vec<u32>, Timing)> {
        if input_ids.len() + self.max_new_tokens > self.longest {
            eprintln!(
                "warning: {} prompt tokens and up to {} new ones pass the {} positions that the model is meant for",
                input_ids.len(),
                self.max_new_tokens,
                self.longest
            );
        }
        let prompt_tokens = input_ids.len();
        let request = Request {
            input_ids,
            images,
            sampling: self.sampling.clone(),
            max_new_tokens: self.max_new_tokens,
            stop_tokens: self.stop_tokens.clone(),
        };
        let mut answer = Answer::new(self.processor.tokenizer(), &self.stop);
        let mut failure = None;
        let begin = Instant::now();
        let mut first = None;
        let ids = generate(&self.model, request, |token| {
            first.get_or_insert_with(|| begin.elapsed().as_secs_f64());
            if self.stop_tokens.contains(&token) {
                return std::ops::ControlFlow::Break(());
            }
            let text = answer.push(token);
            match on_text(&text) {
                Err(error) => failure = Some(error),
                Ok(()) if !answer.stopped() => return std::ops::ControlFlow::Continue(()),
                Ok(()) => {}
            }
            std::ops::ControlFlow::Break(())
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        on_text(&answer.finish())?;
        let total = begin.elapsed().as_secs_f64();
        let first = first.unwrap_or(total);
        let rest = (ids.len().saturating_sub(1), total - first);
        Ok((ids, Timing { prompt: (prompt_tokens, first), rest }))
    }

    /// Whether a token ends an answer.
    pub(super) fn is_end(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }
}

fn stop_tokens(config: &Config, processor: &Processor, defaults: &GenerationDefaults) -> Vec<u32> {
    let mut tokens = config.text.eos_token_id.clone();
    tokens.extend(&defaults.eos_token_id);
    tokens.push(processor.tokenizer().eos());
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Runs the command.
///
/// # Errors
/// A model, prompt or image that cannot be used.
pub fn run(arguments: &GenerateArguments) -> Result<()> {
    let folder = model_folder(&arguments.model.model)?;
    let processor = Processor::from_dir(&folder)?;
    let images = prompt::read_images(&arguments.image)?;
    let (ids, prepared) = match (&arguments.messages, &arguments.prompt) {
        (Some(file), _) => {
            let rendered = prompt::render_file(&processor, file, &images)?;
            (rendered.ids, rendered.images)
        }
        (None, Some(text)) if arguments.raw => {
            let tokenizer = processor.tokenizer();
            let ids = std::iter::once(tokenizer.bos()).chain(tokenizer.encode(text)?).collect();
            (ids, Vec::new())
        }
        (None, Some(text)) => {
            let system = arguments.system.as_deref().map(prompt::system_message);
            let user = prompt::user_message(text, images.len(), 0);
            let messages = system.into_iter().chain([user]).collect();
            let request = prompt::request(messages, arguments.reasoning_effort);
            let rendered = processor.render(&request, &images, &Default::default())?;
            (rendered.ids, rendered.images)
        }
        (None, None) => {
            return Err(Error::input("there is nothing to answer", "give --prompt or --messages"));
        }
    };
    let batch = prompt::batch(&processor, &prepared);
    let generator =
        Generator::load(&arguments.model, arguments.dtype, processor, &folder, &arguments.sampling)?;
    let device = arguments.model.compute.device.open()?;
    let images = batch.map(|batch| prompt::to_device(batch, &device));
    let (_, timing) = generator.answer(ids, images, stdout::print)?;
    stdout::print("\n")?;
    eprintln!("{}", timing.describe());
    Ok(())
}
