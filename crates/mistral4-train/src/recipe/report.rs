//! What each key of a recipe does here: the text behind `--dry-run`.

use std::fmt;

use crate::error::{Blocker, Error, Location, Result};

/// What one key of a recipe does in this build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// It is honoured; the text says what it does.
    Used(&'static str),
    /// It is valid in NeMo AutoModel and changes no result here; the text says why.
    NoEffect(&'static str),
    /// It would change the result and is not supported; the text says why and what to do.
    Unsupported(String),
}

/// One key of a recipe with its effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportEntry {
    /// Dotted key.
    pub key: String,
    /// The value as written, secrets hidden.
    pub value: String,
    /// Where it was set.
    pub location: Location,
    /// What it does.
    pub effect: Effect,
}

/// What every key of a recipe does here, in the order in which the sections are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecipeReport {
    /// One entry a key that the recipe or an override sets.
    pub entries: Vec<ReportEntry>,
}

impl RecipeReport {
    /// The settings that keep this recipe from running here.
    pub fn blockers(&self) -> Vec<Blocker> {
        let blocker = |entry: &ReportEntry| match &entry.effect {
            Effect::Unsupported(reason) => Some(Blocker {
                location: entry.location.clone(),
                key: entry.key.clone(),
                value: entry.value.clone(),
                reason: reason.clone(),
            }),
            _ => None,
        };
        self.entries.iter().filter_map(blocker).collect()
    }

    /// Refuses a recipe that asks for something that would silently be left out.
    ///
    /// # Errors
    /// [`Error::NotRunnable`] with every such setting and its reason.
    pub fn check_runnable(&self) -> Result<()> {
        match self.blockers() {
            blockers if blockers.is_empty() => Ok(()),
            blockers => Err(Error::NotRunnable { blockers }),
        }
    }
}

impl fmt::Display for RecipeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = [
            ("honoured", self.lines(|effect| matches!(effect, Effect::Used(_)))),
            ("without effect here", self.lines(|effect| matches!(effect, Effect::NoEffect(_)))),
            ("not supported", self.lines(|effect| matches!(effect, Effect::Unsupported(_)))),
        ];
        let width = self.entries.iter().map(|entry| entry.key.len() + entry.value.chars().count() + 2);
        let width = width.max().unwrap_or(0).min(56);
        for (title, lines) in groups.iter().filter(|(_, lines)| !lines.is_empty()) {
            writeln!(f, "{title}:")?;
            for (setting, text) in lines {
                writeln!(f, "  {setting:width$}  {text}")?;
            }
        }
        Ok(())
    }
}

impl RecipeReport {
    fn lines(&self, wanted: impl Fn(&Effect) -> bool) -> Vec<(String, &str)> {
        let wanted = self.entries.iter().filter(|entry| wanted(&entry.effect));
        wanted
            .map(|entry| {
                let text = match &entry.effect {
                    Effect::Used(text) | Effect::NoEffect(text) => text,
                    Effect::Unsupported(text) => text.as_str(),
                };
                (format!("{}: {}", entry.key, entry.value), text)
            })
            .collect()
    }
}
