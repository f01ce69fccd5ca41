//! Samples as a person reads them.

use std::fmt::Write;

use mistral4_train::data::DataContext;
use serde_json::{Value, json};

use crate::format;

/// One sample.
pub(super) struct Sequence {
    /// Its row of the data set.
    pub(super) row: usize,
    /// Its tokens; where the last input learns a token, that one is at the end.
    pub(super) tokens: Vec<u32>,
    /// Which of the tokens are learned.
    pub(super) learned: Vec<bool>,
    /// Heights and widths of its images, as the model takes them.
    pub(super) images: Vec<[usize; 2]>,
    /// What each input learns.
    pub(super) labels: Vec<i64>,
    /// Labels that are not the token that comes next.
    pub(super) other_labels: usize,
}

impl Sequence {
    pub(super) fn num_learned(&self) -> usize {
        self.learned.iter().filter(|&&learned| learned).count()
    }

    pub(super) fn to_json(&self, context: &DataContext) -> Value {
        let texts: Vec<String> = self.tokens.iter().map(|&id| text_of(context, id)).collect();
        let ids = &self.tokens[..self.labels.len()];
        json!({
            "row": self.row, "input_ids": ids, "labels": self.labels, "tokens": texts, "learned": self.learned,
            "images": self.images
        })
    }

    fn summary(&self) -> String {
        let mut text = format!(
            "sample {}: {}, {} learned",
            self.row,
            counted(self.labels.len(), "token"),
            format::grouped(self.num_learned() as u64)
        );
        for [height, width] in &self.images {
            let _ = write!(text, ", image {width} x {height}");
        }
        if self.other_labels > 0 {
            let _ = write!(text, ", {} labels that are not the next token", self.other_labels);
        }
        text
    }
}

/// `1 token`, `2 048 tokens`.
pub(super) fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {what}{plural}", format::grouped(count as u64))
}

/// A row, which holds several samples where it is packed.
pub(super) fn row(
    number: usize,
    sequences: &[Sequence],
    size: Option<usize>,
    context: &DataContext,
    is_coloured: bool,
) -> String {
    let mut out = String::new();
    if let Some(size) = size {
        let used: usize = sequences.iter().map(|sequence| sequence.labels.len()).sum();
        let share = 100.0 * used as f64 / size as f64;
        let samples = counted(sequences.len(), "sample");
        let _ = writeln!(out, "=== packed row {number}: {samples}, {used} of {size} tokens ({share:.0} %)");
    }
    for sequence in sequences {
        let _ = writeln!(out, "--- {}", sequence.summary());
        out.push_str(&tokens(sequence, context, is_coloured));
        out.push_str("\n\n");
    }
    out
}

/// How a token is shown.
#[derive(Clone, Copy, PartialEq)]
struct Style {
    learned: bool,
    control: bool,
}

fn tokens(sequence: &Sequence, context: &DataContext, is_coloured: bool) -> String {
    let mut pen = Pen { out: String::new(), is_coloured, in_learned: false, shade: false };
    let mut bytes: Vec<u8> = Vec::new();
    let mut waiting = Style { learned: false, control: false };
    let mut t = 0;
    while t < sequence.tokens.len() {
        let (id, learned) = (sequence.tokens[t], sequence.learned[t]);
        let piece = context.processor.as_ref().and_then(|processor| processor.tokenizer().token_bytes(id));
        let style = Style { learned, control: piece.is_none() };
        if style != waiting && !bytes.is_empty() {
            pen.write(&String::from_utf8_lossy(&std::mem::take(&mut bytes)), waiting);
        }
        waiting = style;
        match piece {
            // A character may be spread over tokens.
            Some(piece) => {
                bytes.extend_from_slice(piece);
                if std::str::from_utf8(&bytes).is_ok() {
                    pen.write(&String::from_utf8_lossy(&std::mem::take(&mut bytes)), style);
                }
                t += 1;
            }
            None => {
                let run = run_of_image(&sequence.tokens[t..], context);
                match run {
                    0 | 1 => pen.write(&text_of(context, id), style),
                    run => pen.write(&format!("[IMG: {}]", counted(run, "token")), style),
                }
                t += run.max(1);
            }
        }
    }
    pen.write(&String::from_utf8_lossy(&bytes), waiting);
    pen.finish()
}

/// Writes tokens, so that what is learned is seen with and without colours.
struct Pen {
    out: String,
    is_coloured: bool,
    in_learned: bool,
    /// Alternates, so that neighbouring tokens differ.
    shade: bool,
}

impl Pen {
    fn write(&mut self, text: &str, style: Style) {
        if text.is_empty() {
            return;
        }
        // Text from a file must not move the cursor or change the terminal.
        let is_unsafe = |c: char| c.is_control() && c != '\n' && c != '\t';
        let text: String = text.chars().map(|c| if is_unsafe(c) { '\u{fffd}' } else { c }).collect();
        if !self.is_coloured {
            self.mark(style.learned);
            self.out.push_str(&text);
            return;
        }
        self.shade = !self.shade;
        let code = match (style.learned, style.control, self.shade) {
            (true, true, _) => "1;32",
            (false, true, _) => "1;36",
            (true, false, true) => "32",
            (true, false, false) => "92",
            (false, false, true) => "39",
            (false, false, false) => "90",
        };
        let _ = write!(self.out, "\x1b[{code}m{text}\x1b[0m");
    }

    fn mark(&mut self, learned: bool) {
        match (self.in_learned, learned) {
            (false, true) => self.out.push('«'),
            (true, false) => self.out.push('»'),
            _ => {}
        }
        self.in_learned = learned;
    }

    fn finish(mut self) -> String {
        self.mark(false);
        self.out
    }
}

fn text_of(context: &DataContext, id: u32) -> String {
    let text = context.processor.as_ref().and_then(|processor| processor.tokenizer().token(id).ok());
    text.unwrap_or_else(|| format!("<{id}>"))
}

/// Tokens of the image that begins here; 0 for none.
fn run_of_image(tokens: &[u32], context: &DataContext) -> usize {
    let Some(tokenizer) = context.processor.as_ref().map(|processor| processor.tokenizer()) else { return 0 };
    let is = |id: u32, name| tokenizer.special_id(name) == Some(id);
    if !is(tokens[0], "[IMG]") {
        return 0;
    }
    tokens.iter().position(|&id| is(id, "[IMG_END]")).map_or(0, |end| end + 1)
}

/// Images that tokens stand for.
pub(super) fn count_images(tokens: &[u32], context: &DataContext) -> usize {
    let end = context.processor.as_ref().and_then(|processor| processor.tokenizer().special_id("[IMG_END]"));
    tokens.iter().filter(|&&id| Some(id) == end).count()
}
