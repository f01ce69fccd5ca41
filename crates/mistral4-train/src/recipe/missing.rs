//! What a recipe names and this machine does not have.

use std::fmt::Write;
use std::path::Path;

use mistral4_checkpoint::config::preset_names;
use mistral4_checkpoint::hub::{self, HubOptions};

use super::{ModelSource, Recipe, TokenizerSource};
use crate::error::{Blocker, Error, Result};

impl Recipe {
    /// The data of this recipe that must be downloaded before it can run: what is named like a data set of the Hugging
    /// Face hub and is no file or folder here.
    pub fn missing_data(&self) -> Vec<Blocker> {
        let sets = std::iter::once(("dataset".to_owned(), &self.dataset));
        let held_out = self.validation.iter().map(|set| match set.name.as_str() {
            "default" => ("validation_dataset".to_owned(), &set.dataset),
            name => (format!("validation_dataset_{name}"), &set.dataset),
        });
        let missing = |(section, set): (String, &super::DatasetSection)| {
            let path = set.source.paths().iter().find(|path| {
                let has_extension = path.extension().is_some_and(|extension| extension.len() <= 7);
                !path.exists() && !has_extension && hub::is_hub_id(&path.to_string_lossy())
            })?;
            let entry = self.report.entries.iter().find(|entry| {
                entry.key.strip_prefix(&section).is_some_and(|key| key.starts_with(".path_or_dataset"))
            })?;
            let (key, id) = (&entry.key, path.display());
            let reason = format!(
                "is not on this machine, and data are not downloaded: `hf download --repo-type dataset {id} --local-dir DIR`, then `--{key} DIR`"
            );
            Some(Blocker {
                location: entry.location.clone(),
                key: key.clone(),
                value: id.to_string(),
                reason,
            })
        };
        sets.chain(held_out).filter_map(missing).collect()
    }

    /// Refuses to begin without data that must be downloaded first.
    ///
    /// # Errors
    /// [`Error::Missing`] with every such setting and what to do.
    pub fn check_data_is_here(&self) -> Result<()> {
        match self.missing_data() {
            missing if missing.is_empty() => Ok(()),
            missing => Err(Error::Missing { missing }),
        }
    }

    /// What must come to this machine before this recipe can run, or will be downloaded by the run; empty when nothing.
    pub fn describe_missing(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        let (key, name) = match &self.model.source {
            ModelSource::Pretrained(name) => ("model.pretrained_model_name_or_path", name),
            ModelSource::FromConfig(name) => ("model.config", name),
        };
        let key = self.report.entries.iter().map(|entry| entry.key.as_str()).find(|set| {
            set.strip_prefix(key)
                .is_some_and(|rest| rest.is_empty() || rest == ".pretrained_model_name_or_path")
        });
        let key = key.unwrap_or("model.pretrained_model_name_or_path");
        if !is_here(name) && preset_names().all(|preset| preset != name) {
            lines.push(format!(
                "{key}: {name}: the run downloads it from the hub; or give its folder: `--{key} DIR`"
            ));
        }
        if let TokenizerSource::Path(name) = &self.dataset.tokenizer
            && !is_here(name)
        {
            lines.push(format!("dataset.tokenizer: {name}: the run downloads it from the hub; or give its folder: `--dataset.tokenizer DIR`"));
        }
        lines.extend(
            self.missing_data()
                .into_iter()
                .map(|Blocker { key, value, reason, .. }| format!("{key}: {value}: {reason}")),
        );
        let mut text = String::new();
        if !lines.is_empty() {
            text.push_str("not on this machine:\n");
        }
        for line in lines {
            let _ = writeln!(text, "  {line}");
        }
        text
    }
}

/// Whether a model is a file or folder, or in the hub's cache.
fn is_here(name: &str) -> bool {
    Path::new(name).exists()
        || hub::resolve(name, &HubOptions { offline: true, ..HubOptions::from_env() }, &mut |_| {}).is_ok()
}
