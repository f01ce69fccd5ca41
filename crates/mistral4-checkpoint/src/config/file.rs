//! A configuration together with the file it came from.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Config, ConfigOptions, Quantization, hf, native};
use crate::error::{Error, Result};
use crate::json;
use crate::weights::names;

/// Which of the two published forms a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigForm {
    /// Hugging Face's `config.json`.
    Hf,
    /// Mistral's own `params.json`.
    Native,
}

/// A configuration with its source, so that saving keeps keys that this library does not know.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    /// The model.
    pub config: Config,
    /// How the weights beside the file are quantised; `None`: not at all.
    pub quantization: Option<Quantization>,
    /// Form of the file.
    pub form: ConfigForm,
    /// The file as read.
    pub raw: Value,
    /// Where it was read; for presets, a name for messages.
    pub path: PathBuf,
    /// Keys that were ignored and other remarks, a sentence each.
    pub warnings: Vec<String>,
}

impl ConfigFile {
    /// Reads a `config.json`, a `params.json` (of any name), or the one in a folder (`config.json` first).
    ///
    /// # Errors
    /// When the file is not there, not JSON, another model, or holds a value that is wrong or not implemented; the
    /// message names the file, the key, the value and what to do.
    pub fn read(path: &Path, options: &ConfigOptions) -> Result<ConfigFile> {
        let file = if path.is_dir() { in_folder(path)? } else { path.to_path_buf() };
        ConfigFile::from_value(json::read(&file)?, &file, options)
    }

    /// Parses a configuration that is already in memory; `path` is for messages.
    ///
    /// # Errors
    /// As [`ConfigFile::read`].
    pub fn from_value(raw: Value, path: &Path, options: &ConfigOptions) -> Result<ConfigFile> {
        let Some(root) = raw.as_object() else {
            return Err(Error::NotAModel {
                path: path.to_path_buf(),
                problem: "the file is not a JSON object".into(),
                fix: "give a config.json or a params.json".into(),
            });
        };
        let is_native = root.contains_key("dim") && root.contains_key("n_layers");
        let (form, parsed) = if is_native {
            (ConfigForm::Native, native::parse(path, root, options)?)
        } else {
            (ConfigForm::Hf, hf::parse(path, root, options)?)
        };
        Ok(ConfigFile {
            config: parsed.config,
            quantization: parsed.quantization,
            form,
            path: path.to_path_buf(),
            warnings: parsed.warnings,
            raw,
        })
    }

    /// The decoder alone, as a text model's file would describe it.
    pub fn text_only(&self) -> ConfigFile {
        if self.config.vision.is_none() {
            return self.clone();
        }
        let mut raw = self.raw.clone();
        match (self.form, raw.as_object_mut()) {
            (ConfigForm::Native, Some(root)) => {
                root.shift_remove("vision_encoder");
            }
            (ConfigForm::Hf, Some(root)) => {
                let mut text = root.shift_remove("text_config").unwrap_or_default();
                text["architectures"] = json!(["Mistral4ForCausalLM"]);
                raw = text;
            }
            (_, None) => unreachable!("a parsed configuration is an object"),
        }
        let mut quantization = self.quantization.clone();
        if let Some(Quantization::Fp8(fp8)) = &mut quantization {
            fp8.modules_to_not_convert.retain(|name| !name.contains("vision") && !name.contains("projector"));
        }
        ConfigFile { config: self.config.text_only(), quantization, raw, ..self.clone() }
    }
}

fn in_folder(folder: &Path) -> Result<PathBuf> {
    ["config.json", "params.json"]
        .map(|name| folder.join(name))
        .into_iter()
        .find(|file| file.is_file())
        .ok_or_else(|| Error::NotAModel {
            path: folder.to_path_buf(),
            problem: "the folder has neither config.json nor params.json".into(),
            fix: "give the folder of a checkpoint".into(),
        })
}

impl Config {
    /// Rejects sizes whose products no machine can hold, so that later arithmetic on them cannot overflow.
    pub(super) fn check_total_size(&self, file: &Path) -> Result<()> {
        const MOST_VALUES: u128 = 1 << 44;
        let mut total = 0;
        for spec in names::tensors(self) {
            let values = spec.shape.iter().map(|&size| size as u128).product::<u128>();
            total += values;
            if total > MOST_VALUES {
                return Err(Error::Tensor {
                    file: file.to_path_buf(),
                    key: spec.key,
                    problem: format!(
                        "with shape {:?} the model passes {MOST_VALUES} parameters; a size in the configuration is wrong",
                        spec.shape
                    ),
                });
            }
        }
        Ok(())
    }
}
