//! What a model's own generation_config.json asks for.

use std::path::Path;

use mistral4::generate::SamplingOptions;
use serde::Deserialize;

use super::SamplingArguments;
use crate::error::{Error, Result};

/// The keys of generation_config.json that are honoured.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct GenerationDefaults {
    do_sample: Option<bool>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    #[serde(deserialize_with = "one_or_many")]
    pub(super) eos_token_id: Vec<u32>,
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Option::<Ids>::deserialize(deserializer)? {
        None => Vec::new(),
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
    })
}

impl GenerationDefaults {
    /// Reads the file of a model folder; nothing is asked for when there is none.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("generation_config.json");
        if !path.is_file() {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(&path).map_err(|source| Error::unreadable(&path, &source))?;
        serde_json::from_str(&text).map_err(|error| {
            Error::input(
                format!("{}: {error}", path.display()),
                "correct the file, or remove it to do without its defaults",
            )
        })
    }

    /// The command line's choices, and where it makes none, the file's. A file that does not say to sample
    /// (`do_sample`) leaves the temperature at 0.
    pub(super) fn sampling(&self, arguments: &SamplingArguments) -> SamplingOptions {
        let off = SamplingOptions::default();
        let sampled = self.do_sample == Some(true);
        let temperature = self.temperature.filter(|_| sampled).unwrap_or(if sampled { 1.0 } else { 0.0 });
        let or = |given: Option<f64>, file: Option<f64>, off: f64| given.or(file).unwrap_or(off);
        SamplingOptions {
            repetition_penalty: or(
                arguments.repetition_penalty,
                self.repetition_penalty,
                off.repetition_penalty,
            ),
            temperature: arguments.temperature.unwrap_or(temperature),
            top_k: arguments.top_k.or(self.top_k).unwrap_or(off.top_k),
            top_p: or(arguments.top_p, self.top_p, off.top_p),
            min_p: or(arguments.min_p, self.min_p, off.min_p),
            seed: arguments.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments() -> SamplingArguments {
        SamplingArguments {
            max_new_tokens: 1,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            seed: 7,
            stop: Vec::new(),
        }
    }

    #[test]
    fn the_file_fills_in_what_the_command_line_leaves_open() {
        let file: GenerationDefaults = serde_json::from_str(
            r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [2, 4], "transformers_version": "5"}"#,
        )
        .unwrap();
        assert_eq!(file.eos_token_id, [2, 4]);
        let options = file.sampling(&SamplingArguments { top_p: Some(0.5), ..arguments() });
        assert_eq!((options.temperature, options.top_p, options.seed), (0.7, 0.5, 7));
    }

    #[test]
    fn without_do_sample_the_likeliest_token_is_taken() {
        let file: GenerationDefaults =
            serde_json::from_str(r#"{"temperature": 0.7, "eos_token_id": 2}"#).unwrap();
        assert_eq!(file.sampling(&arguments()).temperature, 0.0);
        assert_eq!(file.eos_token_id, [2]);
        assert_eq!(
            GenerationDefaults::default().sampling(&arguments()),
            SamplingOptions { seed: 7, ..Default::default() }
        );
    }
}
