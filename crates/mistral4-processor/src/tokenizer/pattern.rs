//! Cutting text into the pieces that byte-pair merges never cross.

use fancy_regex::{Regex, RegexBuilder};

use crate::{Error, Result};

/// Everything of the tekken pattern before its two alternatives for spaces: words with their case, single digits,
/// punctuation, line ends.
macro_rules! before_spaces {
    () => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
        )
    };
}

/// The pattern of Mistral's tekken files.
pub(super) const TEKKEN_PATTERN: &str = concat!(before_spaces!(), r"|\s+(?!\S)|\s+");

/// The same without look-ahead, which runs in linear time; [`Pattern::for_each_piece`] makes up for the difference.
const TEKKEN_WITHOUT_LOOK_AHEAD: &str = concat!(before_spaces!(), r"|\s+");

/// A compiled pre-tokenizer pattern.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    /// Whether spaces before a word leave their last one to it, which the look-ahead of the tekken pattern asks for.
    leaves_last_space: bool,
}

impl Pattern {
    /// Compiles a pattern; `Err` holds what the engine says.
    pub(super) fn new(pattern: &str) -> std::result::Result<Self, String> {
        let leaves_last_space = pattern == TEKKEN_PATTERN;
        let pattern = if leaves_last_space { TEKKEN_WITHOUT_LOOK_AHEAD } else { pattern };
        let regex = RegexBuilder::new(pattern).backtrack_limit(usize::MAX).build();
        Ok(Self { regex: regex.map_err(|error| error.to_string())?, leaves_last_space })
    }

    /// Calls `visit` with every match in turn, and, if asked to, with what lies between matches.
    pub(super) fn for_each_piece<'t>(
        &self,
        text: &'t str,
        keep_gaps: bool,
        mut visit: impl FnMut(&'t str),
    ) -> Result<()> {
        let (mut done, mut from) = (0, 0);
        while from <= text.len() {
            let found = self.regex.find_from_pos(text, from);
            let Some(found) = found.map_err(|error| Error::Pattern { reason: error.to_string() })? else {
                break;
            };
            let mut end = found.end();
            if self.leaves_last_space && end < text.len() {
                end -= last_space_of_several(found.as_str());
            }
            if keep_gaps && found.start() > done {
                visit(&text[done..found.start()]);
            }
            if end > found.start() {
                visit(&text[found.start()..end]);
            }
            done = end;
            // An empty match makes way for the next character.
            from = if end > found.start() {
                end
            } else {
                end + text[end..].chars().next().map_or(1, char::len_utf8)
            };
        }
        if keep_gaps && done < text.len() {
            visit(&text[done..]);
        }
        Ok(())
    }
}

/// The length of the last character of two or more spaces that no line end is among, else 0.
///
/// In the tekken pattern, only the alternatives for spaces match such a text, and they reach as far as the spaces do.
fn last_space_of_several(piece: &str) -> usize {
    let mut characters = piece.chars().rev();
    match (characters.next(), characters.next()) {
        (Some(last), Some(_)) if last.is_whitespace() && !matches!(last, '\r' | '\n') => {
            // Every other alternative ends in something that is no space.
            last.len_utf8()
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(pattern: &Pattern, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        pattern
            .for_each_piece(text, false, |piece| pieces.push(piece.to_owned()))
            .expect("short texts match");
        pieces
    }

    fn with_look_ahead() -> Pattern {
        let regex = Regex::new(TEKKEN_PATTERN).expect("the pattern compiles");
        Pattern { regex, leaves_last_space: false }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_linear_form_cuts_as_the_pattern_does(
            text in r"([ \t\r\n\x0b\x0c\x1c\u{85}\u{a0}\u{2003}\u{2028}\u{200b}]{0,4}(\PC|[a-zA-Z0-9é/.'])?){0,12}",
        ) {
            let linear = Pattern::new(TEKKEN_PATTERN).expect("the pattern compiles");
            prop_assert!(linear.leaves_last_space);
            prop_assert_eq!(pieces(&linear, &text), pieces(&with_look_ahead(), &text));
        }
    }

    #[test]
    fn a_million_spaces_are_two_pieces_at_most() {
        let pattern = Pattern::new(TEKKEN_PATTERN).expect("the pattern compiles");
        let spaces = " ".repeat(1_000_000);
        assert_eq!(pieces(&pattern, &spaces), [spaces.as_str()]);
        assert_eq!(pieces(&pattern, &format!("{spaces}1")), [&spaces[1..], " ", "1"]);
    }

    #[test]
    fn empty_matches_and_gaps_make_progress() {
        let pattern = Pattern::new("b*").expect("the pattern compiles");
        let mut found = Vec::new();
        pattern.for_each_piece("aébbc", true, |piece| found.push(piece.to_owned())).expect("a short text");
        assert_eq!(found.concat(), "aébbc");
        assert_eq!(pieces(&pattern, "aébbc"), ["bb"]);
    }
}
