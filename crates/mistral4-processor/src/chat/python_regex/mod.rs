//! Whether Python's `re` would compile a pattern, which is what `format: regex` means to Python's `jsonschema`.
//!
//! Source: CPython 3.11, `Lib/re/_parser.py` and the look-behind check of `Lib/re/_compiler.py`.

mod atom;
mod group;

use std::collections::HashMap;
use std::iter::Peekable;
use std::str::Chars;

/// Groups may nest this deep.
const MAX_DEPTH: usize = 100;

/// Python's limit for repeats, and what it takes for an unbounded width.
const UNBOUNDED: u64 = u32::MAX as u64;

/// What is wrong with the pattern, or nothing if Python compiles it.
pub(in crate::chat) fn problem(pattern: &str) -> Option<String> {
    let mut found = Parser::new(pattern, false).pattern();
    if let Err(Stop::Verbose) = found {
        found = Parser::new(pattern, true).pattern();
    }
    match found {
        Ok(()) | Err(Stop::Verbose) => None,
        Err(Stop::Problem(reason)) => Some(format!("{pattern:?} is not a 'regex': {reason}")),
    }
}

/// Why parsing ended early.
enum Stop {
    Problem(&'static str),
    /// A global `x` flag: the pattern has to be read again in verbose mode.
    Verbose,
}

type Parsed<T> = Result<T, Stop>;

fn refuse<T>(reason: &'static str) -> Parsed<T> {
    Err(Stop::Problem(reason))
}

/// The least and the most characters that a part matches.
#[derive(Clone, Copy, PartialEq)]
struct Width {
    least: u64,
    most: u64,
}

impl Width {
    const ZERO: Self = Self { least: 0, most: 0 };
    const ONE: Self = Self { least: 1, most: 1 };

    fn then(self, next: Self) -> Self {
        Self { least: (self.least + next.least).min(UNBOUNDED), most: (self.most + next.most).min(UNBOUNDED) }
    }

    fn or(self, other: Self) -> Self {
        Self { least: self.least.min(other.least), most: self.most.max(other.most) }
    }

    fn repeated(self, least: u64, most: u64) -> Self {
        let times = |width: u64, count: u64| width.saturating_mul(count).min(UNBOUNDED);
        Self { least: times(self.least, least), most: times(self.most, most) }
    }
}

/// What a repeat would apply to.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    Nothing,
    Anchor,
    Repeat,
    Item,
}

struct Parser<'p> {
    rest: Peekable<Chars<'p>>,
    verbose: bool,
    /// The width of each group, absent while it is open; group 0 is the whole pattern.
    groups: Vec<Option<Width>>,
    names: HashMap<String, usize>,
    /// How many groups there were when the outermost look-behind began.
    look_behind: Option<usize>,
    /// The highest group that a conditional asks for.
    asked: usize,
    /// Whether nothing but global flags was read so far.
    at_start: bool,
}

impl<'p> Parser<'p> {
    fn new(pattern: &'p str, verbose: bool) -> Self {
        Self {
            rest: pattern.chars().peekable(),
            verbose,
            groups: vec![None],
            names: HashMap::new(),
            look_behind: None,
            asked: 0,
            at_start: true,
        }
    }

    fn matches(&mut self, character: char) -> bool {
        self.rest.next_if_eq(&character).is_some()
    }

    fn pattern(&mut self) -> Parsed<()> {
        self.alternatives(0)?;
        if self.rest.peek().is_some() {
            return refuse("unbalanced parenthesis");
        }
        if self.asked >= self.groups.len() { refuse("invalid group reference") } else { Ok(()) }
    }

    fn alternatives(&mut self, depth: usize) -> Parsed<Width> {
        if depth > MAX_DEPTH {
            return refuse("groups nested too deep");
        }
        let mut width = self.sequence(depth)?;
        while self.matches('|') {
            self.at_start = false;
            width = width.or(self.sequence(depth)?);
        }
        Ok(width)
    }

    fn sequence(&mut self, depth: usize) -> Parsed<Width> {
        let (mut before, mut item, mut last) = (Width::ZERO, Width::ZERO, Last::Nothing);
        while let Some(character) = self.rest.next_if(|next| !matches!(next, '|' | ')')) {
            if self.verbose && matches!(character, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c') {
                continue;
            }
            if self.verbose && character == '#' {
                while self.rest.next().is_some_and(|next| next != '\n') {}
                continue;
            }
            if let Some((least, most)) = self.repeat(character)? {
                match last {
                    Last::Nothing | Last::Anchor => return refuse("nothing to repeat"),
                    Last::Repeat => return refuse("multiple repeat"),
                    Last::Item => {}
                }
                if !self.matches('?') {
                    self.matches('+');
                }
                (item, last) = (item.repeated(least, most), Last::Repeat);
                continue;
            }
            let read = match character {
                '(' => self.group(depth)?,
                '[' => Some((self.set()?, Last::Item)),
                '\\' => Some(self.escape()?),
                '^' | '$' => Some((Width::ZERO, Last::Anchor)),
                _ => Some((Width::ONE, Last::Item)),
            };
            if let Some((width, kind)) = read {
                self.at_start = false;
                before = before.then(item);
                (item, last) = (width, kind);
            }
        }
        Ok(before.then(item))
    }

    /// The bounds of a repeat that begins with this character, if one does.
    fn repeat(&mut self, character: char) -> Parsed<Option<(u64, u64)>> {
        match character {
            '?' => return Ok(Some((0, 1))),
            '*' => return Ok(Some((0, UNBOUNDED))),
            '+' => return Ok(Some((1, UNBOUNDED))),
            '{' => {}
            _ => return Ok(None),
        }
        let here = self.rest.clone();
        if self.rest.peek() == Some(&'}') {
            return Ok(None);
        }
        let low = self.digits();
        let high = if self.matches(',') { self.digits() } else { low.clone() };
        if !self.matches('}') {
            self.rest = here;
            return Ok(None);
        }
        let number = |digits: &str, default: u64| match digits {
            "" => Ok(default),
            digits => match digits.parse::<u64>() {
                Ok(number) if number < UNBOUNDED => Ok(number),
                _ => refuse("the repetition number is too large"),
            },
        };
        let (least, most) = (number(&low, 0)?, number(&high, UNBOUNDED)?);
        if most < least { refuse("min repeat greater than max repeat") } else { Ok(Some((least, most))) }
    }
}

#[cfg(test)]
mod tests {
    use super::problem;

    #[test]
    fn what_python_compiles() {
        let patterns = [
            "",
            "a|b|",
            "^a+$",
            "(?P<n>a)(?P=n)",
            "a{,3}",
            "a{",
            "a{}",
            "a{,}",
            "(?<=ab|cd)e",
            "(a)\\1",
            "a++b",
            "(?>a)b",
            "(?i)y",
            "(?i)(?m)y",
            "\\u00e9\\x41\\d\\Z",
            "[[:alpha:]]",
            "(?#c)a|",
            "(?i-s:a)",
            "[]a]",
            "[^]]",
            "[a-]",
            "[-a]",
            "(a)?(?(1)b|c)",
            "(?x) a # ( c\n b",
            "\\123",
            "[\\b\\0]",
            "(?:a*)*",
            "(?=a)*b",
            "\\-\\ \\é",
            "a{2,3}?",
            "(?<=(a))\\1",
        ];
        for pattern in patterns {
            assert_eq!(problem(pattern), None, "{pattern}");
        }
    }

    #[test]
    fn what_python_refuses() {
        let patterns = [
            "[",
            "(",
            ")",
            "a)",
            "(?<n>a)",
            "\\p{L}",
            "a**",
            "*a",
            "^*",
            "\\b+",
            "a{2,1}",
            "(?<=a+)b",
            "[z-a]",
            "\\1",
            "(a\\1)",
            "x(?i)y",
            "\\u00g9",
            "\\z",
            "[\\w-z]",
            "\\",
            "(?P<1>a)",
            "(?P<n>a)(?P<n>b)",
            "(?P=n)",
            "(?(1)a)",
            "(?(0)a)",
            "[a",
            "[]",
            "\\400",
            "(?L)a",
            "(?au)a",
            "(?i-i:a)",
            "(?a-u:b)",
            "(?<=(a)\\1)b",
            "a{1}{2}",
            "(?",
            "(?P",
            "(?:a",
            "\\U00110000",
            "(a)(?(1)b|c|d)",
            "a{99999999999}",
            "[\\q]",
            "[\\8]",
        ];
        for pattern in patterns {
            assert!(problem(pattern).is_some(), "{pattern}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_without_exhausting_the_stack() {
        assert!(problem(&"(".repeat(100_000)).is_some());
    }
}
