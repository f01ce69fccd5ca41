//! An answer on its way: whole characters only, and never a part of a stop text.

use mistral4_processor::tokenizer::DecodeStream;
use mistral4_processor::{SpecialTokens, Tokenizer};

/// Turns ids into text that can be shown at once. Control tokens that the model writes, such as `[THINK]`, are shown;
/// ids beyond the tokenizer's vocabulary, which a padded embedding table has, show as U+FFFD.
pub(crate) struct Answer<'a> {
    stream: DecodeStream<'a>,
    stop: &'a [String],
    /// Text that may turn out to begin a stop text.
    held: String,
    stopped: bool,
}

impl<'a> Answer<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, stop: &'a [String]) -> Self {
        Answer {
            stream: tokenizer.decode_stream(SpecialTokens::Keep),
            stop,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes one id and returns the text that is now certain.
    pub(crate) fn push(&mut self, id: u32) -> String {
        let text = self.stream.push(id).unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.to_string());
        self.take(&text)
    }

    /// What is left at the end.
    pub(crate) fn finish(&mut self) -> String {
        let rest = self.stream.finish();
        let mut text = self.take(&rest);
        if !self.stopped {
            text.push_str(&std::mem::take(&mut self.held));
        }
        text
    }

    /// Whether a stop text was met; it is not part of the answer.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    fn take(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let stops = self.stop.iter().filter(|stop| !stop.is_empty());
        if let Some(place) = stops.filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(place);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(place, _)| place)
        .filter(|&length| length > 0 && text.ends_with(&stop[..length]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mistral4_processor::tokenizer::TekkenBuilder;

    fn shown(text: &str, stop: &[&str]) -> (String, bool) {
        let tokenizer =
            TekkenBuilder::new(TekkenBuilder::MIN_VOCAB_SIZE).train(["a"]).unwrap().tokenizer().unwrap();
        let stop: Vec<String> = stop.iter().map(|&stop| stop.to_owned()).collect();
        let mut answer = Answer::new(&tokenizer, &stop);
        let mut out = String::new();
        for id in tokenizer.encode(text).unwrap() {
            out.push_str(&answer.push(id));
            if answer.stopped() {
                break;
            }
        }
        out.push_str(&answer.finish());
        (out, answer.stopped())
    }

    #[test]
    fn the_earliest_stop_text_ends_the_answer() {
        assert_eq!(shown("one END two", &["END", "two"]), ("one ".to_owned(), true));
        assert_eq!(shown("héllo wörld", &["ö"]), ("héllo w".to_owned(), true));
    }

    #[test]
    fn what_only_begins_a_stop_text_is_shown_in_the_end() {
        assert_eq!(shown("one EN", &["END"]), ("one EN".to_owned(), false));
        assert_eq!(shown("ababac", &["abac"]), ("ab".to_owned(), true));
        assert_eq!(shown("plain", &[""]), ("plain".to_owned(), false));
    }
}
