//! Whether Python's `re` would compile a pattern.

pub(super) fn problem(pattern: &str) -> Option<String> {
    fancy_regex::Regex::new(pattern).err().map(|error| format!("{pattern:?} is not a 'regex': {error}"))
}
