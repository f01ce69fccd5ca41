//! `mistral4 chat`: a conversation, line by line.

use std::io::{BufRead, IsTerminal, stderr, stdin};
use std::path::Path;

use burn::tensor::Device;
use clap::Args;
use mistral4_processor::chat::{Content, Message, Part};
use mistral4_processor::{Processor, ReasoningEffort, SourceImage, SpecialTokens};

use super::generate::{Generator, SamplingArguments};
use super::prompt;
use crate::arguments::{FloatDType, ModelArguments};
use crate::error::{Error, Result};
use crate::load::model_folder;
use crate::stdout;

/// Arguments of `mistral4 chat`.
#[derive(Debug, Args)]
#[command(after_help = "In the chat: /image FILE, /reset, /help, /quit")]
pub struct ChatArguments {
    /// The model.
    #[command(flatten)]
    pub model: ModelArguments,
    /// Number format of the weights; by default as stored, FP8 as bf16
    #[arg(long, value_enum)]
    pub dtype: Option<FloatDType>,
    /// Instructions for the model
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// How much the model thinks before it answers, as far as it offers a choice: none or high
    #[arg(long, value_name = "EFFORT", value_parser = prompt::parse_effort)]
    pub reasoning_effort: Option<ReasoningEffort>,
    /// How answers are chosen.
    #[command(flatten)]
    pub sampling: SamplingArguments,
}

const HELP: &str = "\
/image FILE  show an image with the next message
/reset       forget the conversation
/help        these commands
/quit        leave (or end the input)";

/// Runs the command.
///
/// # Errors
/// A model that cannot be used. What goes wrong in a turn is told, and the conversation goes on.
pub fn run(arguments: &ChatArguments) -> Result<()> {
    let folder = model_folder(&arguments.model.model)?;
    let processor = Processor::from_dir(&folder)?;
    let generator =
        Generator::load(&arguments.model, arguments.dtype, processor, &folder, &arguments.sampling)?;
    let mut chat = Chat {
        generator,
        device: arguments.model.compute.device.open()?,
        system: arguments.system.clone(),
        reasoning_effort: arguments.reasoning_effort,
        history: Vec::new(),
        images: Vec::new(),
        shown: 0,
    };
    let interactive = stdin().is_terminal() && stderr().is_terminal();
    if interactive {
        eprintln!("talking to {}; /help lists the commands", folder.display());
    }
    chat.converse(stdin().lock(), interactive)
}

struct Chat {
    generator: Generator,
    device: Device,
    system: Option<String>,
    reasoning_effort: Option<ReasoningEffort>,
    history: Vec<Message>,
    /// Images of the conversation, in the order of their messages; those from `shown` on wait for the next message.
    images: Vec<SourceImage>,
    shown: usize,
}

enum Line<'a> {
    Say(&'a str),
    Image(&'a str),
    Reset,
    Help,
    Quit,
    Unknown(&'a str),
    Nothing,
}

impl<'a> Line<'a> {
    fn read(line: &'a str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "" => Line::Nothing,
            "/image" => Line::Image(rest.trim()),
            "/reset" => Line::Reset,
            "/help" => Line::Help,
            "/quit" | "/exit" => Line::Quit,
            word if word.starts_with('/') => Line::Unknown(word),
            _ => Line::Say(line),
        }
    }
}

impl Chat {
    fn converse(&mut self, input: impl BufRead, interactive: bool) -> Result<()> {
        let ask = || {
            if interactive {
                eprint!("\n> ");
            }
        };
        ask();
        for line in input.lines() {
            let line = line.map_err(|error| {
                Error::input(format!("standard input: {error}"), "give lines of text in UTF-8")
            })?;
            match Line::read(&line) {
                Line::Nothing => {}
                Line::Quit => return Ok(()),
                Line::Help => eprintln!("{HELP}"),
                Line::Unknown(word) => eprintln!("{word} is no command\n{HELP}"),
                Line::Reset => {
                    self.history.clear();
                    self.images.clear();
                    self.shown = 0;
                    eprintln!("the conversation is forgotten");
                }
                Line::Image(path) => match self.attach(path) {
                    Ok(()) => eprintln!("the image goes with the next message"),
                    Err(error) => eprintln!("{error}"),
                },
                Line::Say(text) => {
                    if let Err(error) = self.turn(text) {
                        eprintln!("{error}");
                    }
                }
            }
            ask();
        }
        Ok(())
    }

    fn attach(&mut self, path: &str) -> Result<()> {
        if path.is_empty() {
            return Err(Error::input("/image needs a file", "write /image FILE"));
        }
        let image = SourceImage::from_path(Path::new(path))?;
        self.images.push(image);
        Ok(())
    }

    /// One question and its answer. When it fails, the conversation stays as it was, and waiting images are dropped.
    fn turn(&mut self, text: &str) -> Result<()> {
        let result = self.ask(text);
        if result.is_err() {
            self.images.truncate(self.shown);
        }
        result
    }

    fn ask(&mut self, text: &str) -> Result<()> {
        let question = prompt::user_message(text, self.images.len() - self.shown, self.shown);
        let system = self.system.as_deref().map(prompt::system_message);
        let messages = system.into_iter().chain(self.history.iter().cloned()).chain([question.clone()]);
        let request = prompt::request(messages.collect(), self.reasoning_effort);
        let processor = &self.generator.processor;
        let rendered = processor.render(&request, &self.images, &Default::default())?;
        let images = prompt::batch(processor, &rendered.images);
        let images = images.map(|batch| prompt::to_device(batch, &self.device));
        let (ids, _) = self.generator.answer(rendered.ids, images, stdout::print)?;
        stdout::print("\n")?;
        let answer = self.answer_message(&ids)?;
        self.history.extend([question, answer]);
        self.shown = self.images.len();
        self.generator.sampling.seed = self.generator.sampling.seed.wrapping_add(1);
        Ok(())
    }

    /// The answer as a message, thinking kept apart.
    fn answer_message(&self, ids: &[u32]) -> Result<Message> {
        let tokenizer = self.generator.processor.tokenizer();
        let ids: Vec<u32> = ids
            .iter()
            .copied()
            .take_while(|&id| !self.generator.is_end(id))
            .filter(|&id| (id as usize) < tokenizer.vocab_size())
            .collect();
        let place = |name: &str| {
            let id = tokenizer.special_id(name)?;
            ids.iter().position(|&i| i == id)
        };
        let text = |ids: &[u32]| tokenizer.decode(ids, SpecialTokens::Skip);
        let content = match place("[THINK]") {
            None => Content::Text(text(&ids)?),
            Some(begin) => {
                let end = place("[/THINK]").filter(|&end| end > begin);
                let thinking = text(&ids[begin + 1..end.unwrap_or(ids.len())])?;
                let rest = end.map_or(&[][..], |end| &ids[end + 1..]);
                let parts = [
                    Part::Text(text(&ids[..begin])?),
                    Part::Thinking { thinking, closed: end.is_some() },
                    Part::Text(text(rest)?),
                ];
                let filled = |part: &Part| !matches!(part, Part::Text(text) if text.is_empty());
                Content::Parts(parts.into_iter().filter(filled).collect())
            }
        };
        Ok(Message::Assistant { content: Some(content), tool_calls: Vec::new(), prefix: false, weight: None })
    }
}
