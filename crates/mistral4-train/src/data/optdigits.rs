//! The bundled handwritten digits, as images and as conversations about them.
//!
//! Source: Alpaydin and Kaynak, UCI Machine Learning Repository, DOI 10.24432/C50P49, CC BY 4.0; see
//! `data/optdigits/README.md`.

use std::ops::Range;
use std::sync::Arc;

use image::imageops::crop_imm;
use image::{GrayImage, Luma};
use mistral4_processor::chat::{Content, ImageSource, Message, Part, ResponseFormat};
use mistral4_processor::{ChatRequest, Processor, RenderOptions, SourceImage, ValidationMode};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::recipe::{DigitsTask, Split};

const SHEET: &[u8] = include_bytes!("../../../../data/optdigits/images.png");
const LABELS: &str = include_str!("../../../../data/optdigits/labels.txt");

/// Side of an image, in pixels.
const SIDE: u32 = 8;
/// Images of the training part; the rest is held out.
const TRAIN: usize = 1437;
/// Largest grey value of the sheet.
const WHITE: u32 = 16 * 15;

/// How a person may ask.
pub const QUESTIONS: [&str; 6] = [
    "Which digit is this?",
    "What number is written here?",
    "Read the handwritten digit.",
    "Name the digit in the picture.",
    "Which number do you see?",
    "Please tell me what this digit is.",
];

/// How a person may ask for the digit after the one that is shown.
pub const QUESTIONS_NEXT: [&str; 3] =
    ["Which digit comes after this one?", "Add one to this digit.", "What follows the number you see?"];

/// The digits in words.
pub const WORDS: [&str; 10] =
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// The answer for a digit, `This is a seven.`
pub fn answer(digit: u8) -> String {
    let word = WORDS[usize::from(digit)];
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) && word != "one" { "an" } else { "a" };
    format!("This is {article} {word}.")
}

impl DigitsTask {
    /// The question about an image, chosen by a number.
    pub fn question(self, number: usize) -> &'static str {
        let questions: &[&str] = match self {
            DigitsTask::Name => &QUESTIONS,
            DigitsTask::Next => &QUESTIONS_NEXT,
        };
        questions[number % questions.len()]
    }

    /// The digit that answers the question about an image of `digit`.
    pub fn wanted(self, digit: u8) -> u8 {
        match self {
            DigitsTask::Name => digit,
            DigitsTask::Next => (digit + 1) % 10,
        }
    }

    /// The answer about an image of `digit`, in words.
    pub fn answer(self, digit: u8) -> String {
        match self {
            DigitsTask::Name => answer(digit),
            DigitsTask::Next => format!("Next comes {}.", WORDS[usize::from(self.wanted(digit))]),
        }
    }
}

/// The digit that an answer names: the only one of the ten words in it.
pub fn read_answer(text: &str) -> Option<u8> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphabetic());
    let mut found = words.filter_map(|word| WORDS.iter().position(|&name| name == word));
    match (found.next(), found.next()) {
        (Some(digit), None) => Some(digit as u8),
        _ => None,
    }
}

/// Every text that conversations about digits hold: what a small tokenizer learns its vocabulary from.
pub fn texts() -> Vec<String> {
    let answers = (0..10).map(answer);
    QUESTIONS.iter().map(|&question| question.to_owned()).chain(answers).collect()
}

/// Images and labels.
pub struct OptDigits {
    sheet: GrayImage,
    labels: Vec<u8>,
}

impl OptDigits {
    /// Unpacks the bundled images.
    pub fn load() -> Self {
        let sheet = image::load_from_memory(SHEET).expect("the bundled sheet is a PNG").into_luma8();
        let labels: Vec<u8> = LABELS.bytes().filter(u8::is_ascii_digit).map(|digit| digit - b'0').collect();
        let tiles = (sheet.width() / SIDE * (sheet.height() / SIDE)) as usize;
        assert!(labels.len() > TRAIN && labels.len() <= tiles, "{} labels for {tiles} tiles", labels.len());
        Self { sheet, labels }
    }

    /// The images of a part: the first 1437, or the last 360.
    pub fn split(&self, split: Split) -> Range<usize> {
        match split {
            Split::Train => 0..TRAIN,
            Split::Validation => TRAIN..self.labels.len(),
        }
    }

    /// The digit that an image shows.
    pub fn label(&self, index: usize) -> u8 {
        self.labels[index]
    }

    /// An image, white on black, enlarged to `side` x `side` pixels by bilinear interpolation.
    pub fn image(&self, index: usize, side: u32) -> GrayImage {
        self.placed(index, side, Placement::default())
    }

    /// An image, enlarged as by [`OptDigits::image`], and placed anew.
    pub fn placed(&self, index: usize, side: u32, placement: Placement) -> GrayImage {
        let columns = self.sheet.width() / SIDE;
        let (row, column) = (index as u32 / columns, index as u32 % columns);
        let tile = crop_imm(&self.sheet, column * SIDE, row * SIDE, SIDE, SIDE).to_image();
        let grey = |x: i64, y: i64| {
            let inside = (0..i64::from(SIDE)).contains(&x) && (0..i64::from(SIDE)).contains(&y);
            if inside {
                f32::from(tile.get_pixel(x as u32, y as u32).0[0]) * 255.0 / WHITE as f32
            } else {
                0.0
            }
        };
        let (sin, cos) = placement.angle.sin_cos();
        let centre = SIDE as f32 / 2.0;
        GrayImage::from_fn(side, side, |x, y| {
            // From the centre of this pixel back to the place in the 8 x 8 image that it shows.
            let to_source = |v: u32| (v as f32 + 0.5) * SIDE as f32 / side as f32 - centre;
            let (x, y) = (to_source(x) - placement.shift.0, to_source(y) - placement.shift.1);
            let (x, y) = (cos * x + sin * y, cos * y - sin * x);
            let u = (x - placement.slant * y) / placement.zoom.0 + centre - 0.5;
            let v = y / placement.zoom.1 + centre - 0.5;
            let (left, top) = (u.floor(), v.floor());
            let (right, below) = (u - left, v - top);
            let (left, top) = (left as i64, top as i64);
            let above = grey(left, top) * (1.0 - right) + grey(left + 1, top) * right;
            let under = grey(left, top + 1) * (1.0 - right) + grey(left + 1, top + 1) * right;
            Luma([(above * (1.0 - below) + under * below).round() as u8])
        })
    }

    /// A conversation about the one image that is supplied beside it; with an answer, to learn from.
    pub fn conversation(question: &str, answer: Option<String>) -> ChatRequest {
        let parts = vec![Part::Image(ImageSource::Supplied(0)), Part::Text(question.to_owned())];
        let user = Message::User { content: Content::Parts(parts) };
        let assistant = answer.map(|text| Message::Assistant {
            content: Some(Content::Text(text)),
            tool_calls: Vec::new(),
            prefix: false,
            weight: None,
        });
        ChatRequest {
            messages: std::iter::once(user).chain(assistant).collect(),
            tools: Vec::new(),
            reasoning_effort: None,
            response_format: ResponseFormat::Text,
        }
    }
}

/// How an image is turned, slanted, zoomed and shifted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// Turn, in radians.
    pub angle: f32,
    /// How far a pixel moves to the right for each pixel that it lies below the centre.
    pub slant: f32,
    /// Enlargement about the centre, across and down.
    pub zoom: (f32, f32),
    /// Shift to the right and down, in pixels of the 8 x 8 image.
    pub shift: (f32, f32),
}

impl Default for Placement {
    fn default() -> Self {
        Self { angle: 0.0, slant: 0.0, zoom: (1.0, 1.0), shift: (0.0, 0.0) }
    }
}

impl Placement {
    /// The placement of variant `variant` of an image, the same each time; variant 0 is the image as it is.
    fn of_variant(index: usize, variant: usize) -> Self {
        if variant == 0 {
            return Self::default();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
        rng.set_stream(variant as u64);
        let mut within = |limit: f32| rng.random_range(-limit..=limit);
        Self {
            angle: within(0.2),
            slant: within(0.25),
            zoom: (1.0 + within(0.2), 1.0 + within(0.2)),
            shift: (within(1.0), within(1.0)),
        }
    }
}

/// Conversations about the images of one part, each image with one of the questions.
pub struct OptDigitsDataset {
    digits: OptDigits,
    rows: Range<usize>,
    side: u32,
    variants: usize,
    task: DigitsTask,
    processor: Arc<Processor>,
}

impl OptDigitsDataset {
    /// Conversations whose images are `side` x `side` pixels; each image comes in `variants` placements.
    pub fn new(split: Split, side: u32, variants: usize, processor: Arc<Processor>) -> Self {
        let digits = OptDigits::load();
        Self { rows: digits.split(split), digits, side, variants, task: DigitsTask::Name, processor }
    }

    /// The same images with other questions.
    pub fn with_task(self, task: DigitsTask) -> Self {
        Self { task, ..self }
    }
}

impl Dataset for OptDigitsDataset {
    fn len(&self) -> usize {
        self.rows.len() * self.variants
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (variant, index) = (index / self.rows.len(), self.rows.start + index % self.rows.len());
        let question = self.task.question(index + variant);
        let request = OptDigits::conversation(question, Some(self.task.answer(self.digits.label(index))));
        let picture = SourceImage::from_dynamic(
            self.digits.placed(index, self.side, Placement::of_variant(index, variant)).into(),
        );
        let options = RenderOptions { mode: ValidationMode::Finetuning, ..RenderOptions::default() };
        let rendered = self.processor.render(&request, &[picture], &options);
        rendered.map(Sample::from_rendered).map_err(|error| Error::Dataset {
            path: "optdigits".into(),
            message: format!("image {index}: {error}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mistral4_processor::image::{ImageProcessor, ImageProcessorConfig};
    use mistral4_processor::tokenizer::TekkenBuilder;

    #[test]
    fn the_bundle_is_the_published_set() {
        let digits = OptDigits::load();
        let mut counts = [0; 10];
        digits.labels.iter().for_each(|&label| counts[usize::from(label)] += 1);
        // Class sizes as scikit-learn's description of the set gives them.
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert_eq!((digits.split(Split::Train).len(), digits.split(Split::Validation).len()), (1437, 360));
        // The first image as scikit-learn prints it, first two rows.
        let first: Vec<u32> =
            digits.image(0, 8).pixels().take(16).map(|pixel| (u32::from(pixel.0[0]) + 8) / 16).collect();
        assert_eq!(first, [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]);
    }

    #[test]
    fn enlarging_keeps_what_is_seen() {
        let digits = OptDigits::load();
        let (small, large) = (digits.image(42, 8), digits.image(42, 32));
        let mean = |x: u32, y: u32| {
            let pixels = (0..16).map(|i| u32::from(large.get_pixel(4 * x + i % 4, 4 * y + i / 4).0[0]));
            pixels.sum::<u32>() as f32 / 16.0
        };
        let difference = |(x, y)| (mean(x, y) - f32::from(small.get_pixel(x, y).0[0])).abs();
        let total: f32 = (0..64).map(|i| difference((i % 8, i / 8))).sum();
        assert!(total / 64.0 < 20.0, "mean difference {}", total / 64.0);
        assert_eq!(digits.image(42, 28).dimensions(), (28, 28));
    }

    #[test]
    fn variants_differ_and_are_the_same_each_time() {
        let digits = OptDigits::load();
        let picture = |variant| digits.placed(7, 32, Placement::of_variant(7, variant));
        assert_eq!(picture(0), digits.image(7, 32));
        assert_eq!(picture(3), picture(3));
        assert_ne!(picture(3), picture(4));
        let right = Placement { shift: (1.0, 0.0), ..Placement::default() };
        let (moved, plain) = (digits.placed(7, 8, right), digits.image(7, 8));
        assert!((1..8).all(|x| moved.get_pixel(x, 3) == plain.get_pixel(x - 1, 3)));
    }

    #[test]
    fn answers_are_read_back() {
        for digit in 0..10 {
            assert_eq!(read_answer(&answer(digit)), Some(digit));
        }
        assert_eq!(answer(8), "This is an eight.");
        assert_eq!(answer(1), "This is a one.");
        assert_eq!(read_answer("This is a seven or a one."), None);
        assert_eq!(read_answer("Someone wrote this."), None);
        assert_eq!(DigitsTask::Next.answer(9), "Next comes zero.");
        for digit in 0..10 {
            let answer = DigitsTask::Next.answer(digit);
            assert_eq!(read_answer(&answer), Some((digit + 1) % 10));
        }
    }

    #[test]
    fn conversations_hold_the_image_and_learn_the_answer() {
        let file = TekkenBuilder::new(360).train(texts().iter().map(String::as_str)).unwrap();
        let config =
            ImageProcessorConfig { patch_size: 4, max_height: 32, max_width: 32, ..Default::default() };
        let processor =
            Arc::new(Processor::new(file.tokenizer().unwrap(), Some(ImageProcessor::new(config))));
        let data = OptDigitsDataset::new(Split::Validation, 32, 1, processor.clone());
        assert_eq!(data.len(), 360);
        let sample = data.get(3).unwrap();
        assert_eq!((sample.images[0].height, sample.images[0].width), (32, 32));
        assert_eq!(sample.input_ids.iter().filter(|&&id| id == 10).count(), 16);
        let learned: Vec<u32> = sample.labels.iter().filter(|&&id| id >= 0).map(|&id| id as u32).collect();
        let text = processor.tokenizer().decode(&learned, mistral4_processor::SpecialTokens::Keep).unwrap();
        assert_eq!(text, format!("{}</s>", answer(OptDigits::load().label(1437 + 3))));
    }
}
