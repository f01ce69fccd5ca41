//! Configurations that come with the library.

use std::path::Path;

use super::{ConfigFile, ConfigOptions};
use crate::error::{Error, Result};
use crate::json;

const PRESETS: &[(&str, &str)] = &[
    ("mistral-small-4-119b", include_str!("presets/mistral-small-4-119b.json")),
    ("tiny", include_str!("presets/tiny.json")),
    ("small", include_str!("presets/small.json")),
    ("medium", include_str!("presets/medium.json")),
];

/// The names of the presets.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

impl ConfigFile {
    /// One of the configurations that come with the library.
    ///
    /// # Errors
    /// When there is no such preset; the message names those there are.
    pub fn preset(name: &str, options: &ConfigOptions) -> Result<ConfigFile> {
        let (_, text) =
            PRESETS.iter().find(|(known, _)| *known == name).ok_or_else(|| Error::UnknownPreset {
                name: name.to_owned(),
                known: preset_names().collect::<Vec<_>>().join(", "),
            })?;
        let path = Path::new("preset").join(name);
        let raw = json::parse(&path, text.as_bytes())?;
        ConfigFile::from_value(raw, &path, options)
    }
}
