//! Escapes, references and sets of characters.

use super::{Last, Parsed, Parser, Width, refuse};

impl Parser<'_> {
    pub(super) fn digits(&mut self) -> String {
        let mut digits = String::new();
        while let Some(digit) = self.rest.next_if(char::is_ascii_digit) {
            digits.push(digit);
        }
        digits
    }

    pub(super) fn hex(&mut self, count: usize) -> Parsed<char> {
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

    pub(super) fn named_character(&mut self) -> Parsed<char> {
        if !self.matches('{') {
            return refuse("missing {");
        }
        let name = self.until('}')?;
        let plain = |character: char| character.is_ascii_alphanumeric() || matches!(character, ' ' | '-');
        if name.chars().all(plain) { Ok('\u{fffd}') } else { refuse("undefined character name") }
    }

    pub(super) fn escape(&mut self) -> Parsed<(Width, Last)> {
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
    pub(super) fn numbered(&mut self, first: char) -> Parsed<(Width, Last)> {
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

    pub(super) fn reference(&self, group: usize) -> Parsed<(Width, Last)> {
        let Some(width) = self.groups[group] else { return refuse("cannot refer to an open group") };
        if self.look_behind.is_some_and(|first| group >= first) {
            return refuse("cannot refer to group defined in the same lookbehind subpattern");
        }
        Ok((width, Last::Item))
    }

    /// A set; the cursor is past its `[`.
    pub(super) fn set(&mut self) -> Parsed<Width> {
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
    pub(super) fn set_member(&mut self) -> Parsed<Option<char>> {
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
}
