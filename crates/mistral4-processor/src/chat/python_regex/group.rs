//! Groups, look-around, conditions and flags.

use super::{Last, MAX_DEPTH, Parsed, Parser, Stop, Width, refuse};

impl Parser<'_> {
    pub(super) fn until(&mut self, end: char) -> Parsed<String> {
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
    pub(super) fn group(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
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
    pub(super) fn body(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
        self.at_start = false;
        let width = self.alternatives(depth + 1)?;
        if self.matches(')') {
            Ok(Some((width, Last::Item)))
        } else {
            refuse("missing ), unterminated subpattern")
        }
    }

    pub(super) fn capture(&mut self, name: Option<String>, depth: usize) -> Parsed<Option<(Width, Last)>> {
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

    pub(super) fn look_behind(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
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

    pub(super) fn conditional(&mut self, depth: usize) -> Parsed<Option<(Width, Last)>> {
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
    pub(super) fn flags(&mut self, first: char, depth: usize) -> Parsed<Option<(Width, Last)>> {
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
