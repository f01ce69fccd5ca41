//! The quickstart: a small multimodal Mistral 4 learns to read handwritten digits, from scratch, on the bundled images.
//!
//! It is the recipe `recipes/digits_vlm.yaml`, run by the trainer like any other; what is added here is the question at
//! the end: how many held-out images does the saved checkpoint, read back from disk, answer correctly?

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use mistral4::generate::{Generation, Request, SamplingOptions};
use mistral4::model::Mistral4;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::CheckpointSource;
use mistral4_checkpoint::config::ConfigOptions;
use mistral4_checkpoint::weights::{Checkpoint, DType};
use mistral4_processor::{Processor, RenderOptions, SourceImage, SpecialTokens};

use crate::backward::images;
use crate::data::optdigits::{OptDigits, QUESTIONS, read_answer};
use crate::error::{Error, Result};
use crate::recipe::{DatasetConfig, DigitsTask, Override, Recipe, Split};
use crate::trainer::{self, Event, Run};

/// The recipe, as `mistral4 train` runs it.
pub const RECIPE: &str = include_str!("../../../recipes/digits_vlm.yaml");
/// The model's configuration.
const CONFIG: &str = include_str!("../../../recipes/configs/digits.json");

/// Images answered at once.
const BATCH: usize = 60;
/// Most tokens of an answer.
const ANSWER_TOKENS: usize = 24;

/// What the quickstart showed.
pub struct Outcome {
    /// The run.
    pub run: Run,
    /// The checkpoint's Hugging Face folder.
    pub model_dir: PathBuf,
    /// Held-out images answered correctly, and all of them.
    pub correct: (usize, usize),
    /// One held-out image (saved as a PNG), the question and the model's answer.
    pub example: Example,
}

/// One question about one held-out image.
pub struct Example {
    /// The image.
    pub image: PathBuf,
    /// The question.
    pub question: String,
    /// What the model says.
    pub answer: String,
    /// The digit that is shown.
    pub digit: u8,
}

/// Trains, saves to `out`, reads the checkpoint back and asks it about every held-out image.
///
/// `steps` shortens or lengthens the run. An interrupted run is saved and examined all the same.
///
/// # Errors
/// A folder that cannot be written.
pub fn run(
    out: &Path,
    steps: Option<usize>,
    seed: Option<u64>,
    device: &Device,
    interrupted: &AtomicBool,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    std::fs::create_dir_all(out).map_err(|source| Error::Write { path: out.to_owned(), source })?;
    let config = out.join("digits.json");
    std::fs::write(&config, CONFIG).map_err(|source| Error::Write { path: config.clone(), source })?;
    let set = |key: &str, value: String| Override { key: key.to_owned(), value };
    let mut overrides = vec![
        set("model.config", config.display().to_string()),
        set("checkpoint.checkpoint_dir", out.display().to_string()),
    ];
    if let Some(steps) = steps {
        overrides.push(set("step_scheduler.max_steps", steps.to_string()));
        overrides.push(set("lr_scheduler.lr_warmup_steps", (steps / 10).min(40).to_string()));
    }
    overrides.extend(seed.map(|seed| set("rng.seed", seed.to_string())));
    let recipe = Recipe::parse("digits_vlm.yaml", RECIPE.as_bytes(), &overrides, &|_| None)?;
    let run = trainer::run(&recipe, device, interrupted, observe)?;

    let checkpoint = run.checkpoint.as_ref().expect("the recipe saves at its last step");
    let model_dir = checkpoint.join("model").join("consolidated");
    let checkpoint = Checkpoint::open(&model_dir, &ConfigOptions::default())?;
    checkpoint.check(&checkpoint.tensors())?;
    let source = CheckpointSource { checkpoint: &checkpoint, dtype: DType::F32 };
    let model = Mistral4::new(checkpoint.config(), MoeOptions::default(), &source, device)?;
    let processor = Processor::from_dir(&model_dir)?;

    let DatasetConfig::OptDigits { image_size, .. } = recipe.dataset.source else {
        unreachable!("the recipe's data are the bundled digits")
    };
    let digits = OptDigits::load();
    let exam = Exam { digits: &digits, task: DigitsTask::Name, side: image_size };
    let (correct, mut answers) = exam.take(&model, &processor, device)?;
    let shown = digits.split(Split::Validation).start;
    let image = out.join("held_out_digit.png");
    digits
        .image(shown, 256)
        .save(&image)
        .map_err(|error| Error::Write { path: image.clone(), source: std::io::Error::other(error) })?;
    let example = Example {
        image,
        question: QUESTIONS[shown % QUESTIONS.len()].to_owned(),
        answer: answers.swap_remove(0),
        digit: digits.label(shown),
    };
    Ok(Outcome { run, model_dir, correct, example })
}

/// Questions about every held-out digit.
pub struct Exam<'a> {
    /// The images.
    pub digits: &'a OptDigits,
    /// What is asked.
    pub task: DigitsTask,
    /// Side of an image, in pixels.
    pub side: u32,
}

impl Exam<'_> {
    /// How many answers are right, of how many, and the answers.
    ///
    /// # Errors
    /// A processor that does not fit the model.
    pub fn take(
        &self,
        model: &Mistral4,
        processor: &Processor,
        device: &Device,
    ) -> Result<((usize, usize), Vec<String>)> {
        let held_out: Vec<usize> = self.digits.split(Split::Validation).collect();
        let mut answers = Vec::with_capacity(held_out.len());
        for indices in held_out.chunks(BATCH) {
            answers.extend(ask(model, processor, self, indices, device)?);
        }
        let wanted = held_out.iter().map(|&index| Some(self.task.wanted(self.digits.label(index))));
        let correct = wanted.zip(&answers).filter(|(wanted, answer)| read_answer(answer) == *wanted).count();
        Ok(((correct, held_out.len()), answers))
    }
}

/// The model's answers about some images, greedy.
fn ask(
    model: &Mistral4,
    processor: &Processor,
    exam: &Exam<'_>,
    indices: &[usize],
    device: &Device,
) -> Result<Vec<String>> {
    let request = |&index: &usize| -> Result<Request> {
        let conversation = OptDigits::conversation(exam.task.question(index), None);
        let picture = SourceImage::from_dynamic(exam.digits.image(index, exam.side).into());
        let rendered = processor.render(&conversation, &[picture], &RenderOptions::default())?;
        Ok(Request {
            input_ids: rendered.ids,
            images: images(&rendered.images.iter().collect::<Vec<_>>(), device),
            sampling: SamplingOptions::default(),
            max_new_tokens: ANSWER_TOKENS,
            stop_tokens: vec![processor.tokenizer().eos()],
        })
    };
    let requests = indices.iter().map(request).collect::<Result<Vec<_>>>()?;
    let mut generation = Generation::new(model, requests)?;
    while !generation.step()?.is_empty() {}
    let text = |row| Ok(processor.tokenizer().decode(generation.generated(row), SpecialTokens::Skip)?);
    (0..indices.len()).map(text).collect()
}
