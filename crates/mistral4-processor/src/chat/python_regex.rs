//! Whether Python's `re` would compile a pattern, which is what `format: regex` means to Python's `jsonschema`.
//!
//! Source: CPython 3.11, `Lib/re/_parser.py` and the look-behind check of `Lib/re/_compiler.py`.

use std::collections::HashMap;
use std::iter::Peekable;
use std::str::Chars;

/// Groups may nest this deep.
const MAX_DEPTH: usize = 100;

/// Python's limit for repeats, and what it takes for an unbounded width.
const UNBOUNDED: u64 = u32::MAX as u64;

/// What is wrong with the pattern, or nothing if Python compiles it.
pub(super) fn problem(pattern: &str) -> Option<String> {
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

    fn digits(&mut self) -> String {
        let mut digits = String::new();
        while let Some(digit) = self.rest.next_if(char::is_ascii_digit) {
            digits.push(digit);
        }
        digits
    }

    fn hex(&mut self, count: usize) -> Parsed<char> {
        let mut value = 0;
        for _ in 0..count {
            match self.rest.next_if(char::is_ascii_hexdigit).and_then(|digit| digit.to_digit(16)) {
                Some(digit) => value = value * 16 + digit,
                None => return refuse("incomplete escape"),
            }
        }
        // Python takes surrogates; where one stands in a range does not matter to us.
        if value > 0x10_ffff { refuse("bad escape") } else { Ok(char::from_u32(value).unwrap_or('\u{fffd}')) }
    }

    fn named_character(&mut self) -> Parsed<char> {
        if !self.matches('{') {
            return refuse("missing {");
        }
        let name = self.until('}')?;
        let plain = |character: char| character.is_ascii_alphanumeric() || matches!(character, ' ' | '-');
        if name.chars().all(plain) { Ok('\u{fffd}') } else { refuse("undefined character name") }
    }

    fn escape(&mut self) -> Parsed<(Width, Last)> {
        let Some(character) = self.rest.next() else { return refuse("bad escape (end of pattern)") };
        match character {
            'A' | 'b' | 'B' | 'Z' => return Ok((Width::ZERO, Last::Anchor)),
            'd' | 'D' | 's' | 'S' | 'w' | 'W' | 'a' | 'f' | 'n' | 'r' | 't' | 'v' => {}
            'x' => drop(self.hex(2)?),
            'u' => drop(self.hex(4)?),
            'U' => drop(self.hex(8)?),
            'N' => drop(self.named_character()?),
            '0' => {
                let octal = |next: &char| ('0'..='7').contains(next);
                let _ = self.rest.next_if(octal).and_then(|_| self.rest.next_if(octal));
            }
            '1'..='9' => return self.numbered(character),
            letter if letter.is_ascii_alphabetic() => return refuse("bad escape"),
            _ => {}
        }
        Ok((Width::ONE, Last::Item))
    }

    /// A reference to a group, or an octal escape of three digits.
    fn numbered(&mut self, first: char) -> Parsed<(Width, Last)> {
        let octal = |digit: char| ('0'..='7').contains(&digit);
        let mut number = first.to_string();
        if let Some(second) = self.rest.next_if(char::is_ascii_digit) {
            number.push(second);
            if octal(first)
                && octal(second)
                && let Some(third) = self.rest.next_if(|next| octal(*next))
            {
                number.push(third);
                let value = u32::from_str_radix(&number, 8).unwrap_or(u32::MAX);
                let outside = "octal escape value outside of range 0-0o377";
                return if value > 0o377 { refuse(outside) } else { Ok((Width::ONE, Last::Item)) };
            }
        }
        let group = number.parse().unwrap_or(usize::MAX);
        if group >= self.groups.len() { refuse("invalid group reference") } else { self.reference(group) }
    }

    fn reference(&self, group: usize) -> Parsed<(Width, Last)> {
        let Some(width) = self.groups[group] else { return refuse("cannot refer to an open group") };
        if self.look_behind.is_some_and(|first| group >= first) {
            return refuse("cannot refer to group defined in the same lookbehind subpattern");
        }
        Ok((width, Last::Item))
    }

    /// A set; the cursor is past its `[`.
    fn set(&mut self) -> Parsed<Width> {
        self.matches('^');
        let mut empty = true;
        loop {
            if !empty && self.matches(']') {
                return Ok(Width::ONE);
            }
            let low = self.set_member()?;
            empty = false;
            if !self.matches('-') {
                continue;
            }
            if self.matches(']') {
                return Ok(Width::ONE);
            }
            match (low, self.set_member()?) {
                (Some(low), Some(high)) if low <= high => {}
                _ => return refuse("bad character range"),
            }
        }
    }

    /// A character of a set, or nothing for a class such as `\d`.
    fn set_member(&mut self) -> Parsed<Option<char>> {
        let Some(character) = self.rest.next() else { return refuse("unterminated character set") };
        if character != '\\' {
            return Ok(Some(character));
        }
        let Some(escaped) = self.rest.next() else { return refuse("bad escape (end of pattern)") };
        let character = match escaped {
            'd' | 'D' | 's' | 'S' | 'w' | 'W' => return Ok(None),
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\x0b',
            'x' => self.hex(2)?,
            'u' => self.hex(4)?,
            'U' => self.hex(8)?,
            'N' => self.named_character()?,
            '0'..='7' => {
                let mut value = escaped as u32 - '0' as u32;
                for _ in 0..2 {
                    let Some(digit) = self.rest.next_if(|next| ('0'..='7').contains(next)) else { break };
                    value = value * 8 + (digit as u32 - '0' as u32);
                }
                match u8::try_from(value) {
                    Ok(value) => char::from(value),
                    Err(_) => return refuse("octal escape value outside of range 0-0o377"),
                }
            }
            other if other.is_ascii_alphanumeric() => return refuse("bad escape"),
            other => other,
        };
        Ok(Some(character))
    }

    fn until(&mut self, end: char) -> Parsed<String> {
        let mut name = String::new();
        loop {
            match self.rest.next() {
                None => return refuse("unterminated name"),
                Some(character) if character == end => break,
                Some(character) => name.push(character),
            }
        }
        if name.is_empty() { refuse("missing name") } else { Ok(name) }
    }

    /// A group; the cursor is past its `(`. Comments and global flags are nothing.
    fn group(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
        if !self.matches('?') {
            return self.capture(None, depth);
        }
        let Some(character) = self.rest.next() else { return refuse("unexpected end of pattern") };
        match character {
            'P' if self.matches('<') => {
                let name = self.until('>')?;
                if !is_identifier(&name) {
                    return refuse("bad character in group name");
                }
                self.capture(Some(name), depth)
            }
            'P' if self.matches('=') => {
                let name = self.until(')')?;
                match self.names.get(&name) {
                    Some(group) => self.reference(*group).map(Some),
                    None => refuse("unknown group name"),
                }
            }
            ':' | '>' => self.body(depth),
            '#' => {
                for next in self.rest.by_ref() {
                    if next == ')' {
                        return Ok(None);
                    }
                }
                refuse("missing ), unterminated comment")
            }
            '=' | '!' => self.body(depth).map(|_| Some((Width::ZERO, Last::Item))),
            '<' => self.look_behind(depth),
            '(' => self.conditional(depth),
            'a' | 'i' | 'L' | 'm' | 's' | 'u' | 'x' | '-' => self.flags(character, depth),
            _ => refuse("unknown extension"),
        }
    }

    /// The rest of a group up to its `)`.
    fn body(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
        self.at_start = false;
        let width = self.alternatives(depth + 1)?;
        if self.matches(')') {
            Ok(Some((width, Last::Item)))
        } else {
            refuse("missing ), unterminated subpattern")
        }
    }

    fn capture(&mut self, name: Option<String>, depth: usize) -> Parsed<Option<(Width, Last)>> {
        let group = self.groups.len();
        self.groups.push(None);
        if let Some(name) = name
            && self.names.insert(name, group).is_some()
        {
            return refuse("redefinition of group name");
        }
        let read = self.body(depth)?;
        self.groups[group] = read.map(|(width, _)| width);
        Ok(read)
    }

    fn look_behind(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
        if !matches!(self.rest.next(), Some('=' | '!')) {
            return refuse("unknown extension");
        }
        let outer = self.look_behind;
        self.look_behind = outer.or(Some(self.groups.len()));
        let read = self.body(depth)?;
        self.look_behind = outer;
        match read {
            Some((width, _)) if width.least != width.most => {
                refuse("look-behind requires fixed-width pattern")
            }
            _ => Ok(Some((Width::ZERO, Last::Item))),
        }
    }

    fn conditional(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
        let condition = self.until(')')?;
        if is_identifier(&condition) {
            if !self.names.contains_key(&condition) {
                return refuse("unknown group name");
            }
        } else {
            match condition.parse() {
                Ok(0) => return refuse("bad group number"),
                Ok(group) if condition.bytes().all(|byte| byte.is_ascii_digit()) => {
                    self.asked = self.asked.max(group)
                }
                _ => return refuse("bad character in group name"),
            }
        }
        self.at_start = false;
        if depth >= MAX_DEPTH {
            return refuse("groups nested too deep");
        }
        let mut width = self.sequence(depth + 1)?;
        if self.matches('|') {
            width = width.or(self.sequence(depth + 1)?);
            if self.rest.peek() == Some(&'|') {
                return refuse("conditional backref with more than two branches");
            }
        } else {
            width.least = 0;
        }
        if self.matches(')') {
            Ok(Some((width, Last::Item)))
        } else {
            refuse("missing ), unterminated subpattern")
        }
    }

    /// `(?i)` for the whole pattern or `(?i-s:...)` for a group; `first` is the character after `?`.
    fn flags(&mut self, first: char, depth: usize) -> Parsed<Option<(Width, Last)>> {
        let (mut on, mut off) = (String::new(), String::new());
        let mut end = first;
        while !matches!(end, ')' | ':' | '-') {
            if !"aimsux".contains(end) {
                return refuse("unknown flag");
            }
            on.push(end);
            match self.rest.next() {
                Some(next) => end = next,
                None => return refuse("missing -, : or )"),
            }
        }
        if on.contains('a') && on.contains('u') {
            return refuse("bad inline flags: flags 'a' and 'u' are incompatible");
        }
        if end == ')' {
            if !self.at_start {
                return refuse("global flags not at the start of the expression");
            }
            return if on.contains('x') && !self.verbose { Err(Stop::Verbose) } else { Ok(None) };
        }
        if end == '-' {
            loop {
                match self.rest.next() {
                    Some(':') if !off.is_empty() => break,
                    Some(flag) if "imsx".contains(flag) => off.push(flag),
                    _ => return refuse("bad inline flags"),
                }
            }
        }
        if on.chars().any(|flag| off.contains(flag)) {
            return refuse("bad inline flags: flag turned on and off");
        }
        let outer = self.verbose;
        self.verbose = (outer || on.contains('x')) && !off.contains('x');
        let read = self.body(depth);
        self.verbose = outer;
        read
    }
}

fn is_identifier(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|first| first == '_' || first.is_alphabetic())
        && characters.all(|next| next == '_' || next.is_alphanumeric())
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
