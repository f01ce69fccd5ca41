//! Models by name: a folder, or an id of the Hugging Face hub that is downloaded into the shared cache.

mod cache;
mod client;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use cache::Repository;
use client::{Client, RemoteFile};

/// The hub's address where nothing else is said.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Where models come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// Branch, tag or commit.
    pub revision: String,
    /// Never use the network.
    pub offline: bool,
    /// Address of the hub or of a mirror.
    pub endpoint: String,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// The cache folder, shared with Python's `huggingface_hub`.
    pub cache: PathBuf,
}

impl HubOptions {
    /// The settings of the environment: `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN` (or the token file that
    /// `huggingface-cli login` writes), `HF_HUB_CACHE`, `HF_HOME`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let home = variable("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let user = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let user = user.or_else(|| {
                variable("HOME").or_else(|| variable("USERPROFILE")).map(|h| Path::new(&h).join(".cache"))
            });
            user.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
        });
        let token_file = variable("HF_TOKEN_PATH").map(PathBuf::from).unwrap_or_else(|| home.join("token"));
        let stored = || std::fs::read_to_string(token_file).ok().map(|token| token.trim().to_owned());
        let is_set = |name: &str| {
            variable(name)
                .is_some_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        HubOptions {
            revision: "main".into(),
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
            endpoint: variable("HF_ENDPOINT")
                .unwrap_or_else(|| DEFAULT_ENDPOINT.into())
                .trim_end_matches('/')
                .into(),
            token: variable("HF_TOKEN").or_else(stored).filter(|token| !token.is_empty()),
            cache: variable("HF_HUB_CACHE").map(PathBuf::from).unwrap_or_else(|| home.join("hub")),
        }
    }
}

/// What happens while a model is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Part of a file has arrived.
    File {
        /// Its name.
        name: &'a str,
        /// Its place among the files, from 0, and how many there are.
        place: (usize, usize),
        /// Bytes that are here, of how many; what an earlier run left counts.
        bytes: (u64, u64),
    },
    /// The hub could not be reached, and the copy in the cache is used.
    Cached {
        /// Why it could not be reached.
        problem: &'a str,
    },
}

/// The folder of a model: an existing folder as it is, or a hub id `owner/name` after downloading what is missing.
///
/// Downloads that were cut off are resumed. When the hub cannot be reached, the copy in the cache is used, which
/// [`Progress::Cached`] tells.
///
/// # Errors
/// When there is neither a folder nor such a model, access is refused, or the network or the disk fails.
pub fn resolve(model: &str, options: &HubOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf> {
    let folder = Path::new(model);
    if folder.is_dir() {
        return Ok(folder.to_path_buf());
    }
    if !is_hub_id(model) {
        return Err(hub_error(
            model,
            "there is no such folder, and it is no hub id either",
            "give a checkpoint folder, or a hub id such as mistralai/Mistral-Small-4-119B-2603",
        ));
    }
    if !is_revision(&options.revision) {
        return Err(hub_error(
            model,
            &format!("`{}` is no revision", options.revision),
            "give a branch, tag or commit",
        ));
    }
    let repository = Repository::new(&options.cache, model);
    if options.offline {
        return repository.snapshot(&options.revision).ok_or_else(|| {
            hub_error(
                model,
                &format!(
                    "it is not in the cache {} (revision {}), and the network is off",
                    options.cache.display(),
                    options.revision
                ),
                "download it first, or unset HF_HUB_OFFLINE",
            )
        });
    }
    let client = Client::new(model, options);
    let (commit, files) = match client.list() {
        Ok(listing) => listing,
        Err(client::Failure::Unreachable(problem)) => {
            if let Some(folder) = repository.snapshot(&options.revision) {
                progress(Progress::Cached { problem: &problem });
                return Ok(folder);
            }
            return Err(hub_error(
                model,
                &format!(
                    "{} cannot be reached ({problem}), and the model is not in the cache",
                    options.endpoint
                ),
                "check the network and HF_ENDPOINT, or give a folder",
            ));
        }
        Err(client::Failure::Refused(error)) => return Err(error),
    };
    let files = wanted(files);
    if !files.iter().any(|file| file.name.ends_with(".safetensors")) {
        return Err(hub_error(model, "it has no safetensors weights", "give a model in safetensors form"));
    }
    for (index, file) in files.iter().enumerate() {
        let place = (index, files.len());
        repository.fetch(&client, &commit, file, &mut |done, total| {
            progress(Progress::File { name: &file.name, place, bytes: (done, total) });
        })?;
    }
    repository.complete(&options.revision, &commit)
}

/// `owner/name`, each of letters, digits, `-`, `_` and `.`.
pub fn is_hub_id(model: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    model.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

fn is_revision(revision: &str) -> bool {
    revision.split('/').all(|part| {
        !part.is_empty()
            && part.bytes().any(|byte| byte != b'.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte))
    })
}

/// The files of a checkpoint: configurations, tokenizer, and weights in Hugging Face's form or else Mistral's own.
fn wanted(files: Vec<RemoteFile>) -> Vec<RemoteFile> {
    let is_hf_weight = |name: &str| name.starts_with("model") && name.ends_with(".safetensors");
    let has_hf = files.iter().any(|file| is_hf_weight(&file.name));
    let mut wanted: Vec<RemoteFile> = files
        .into_iter()
        .filter(|file| {
            let name = file.name.as_str();
            let is_plain = !name.contains(['/', '\\']) && !name.starts_with('.');
            let is_small = [".json", ".jinja", ".txt"].iter().any(|end| name.ends_with(end))
                || name == "tokenizer.model";
            let is_native_index = name.starts_with("consolidated");
            let is_weight =
                if has_hf { is_hf_weight(name) } else { is_native_index && name.ends_with(".safetensors") };
            is_plain && (is_weight || is_small && !(has_hf && is_native_index))
        })
        .collect();
    // Small files first, so that a wrong model is noticed before its weights are there.
    wanted.sort_by_key(|file| (file.name.ends_with(".safetensors"), file.name.clone()));
    wanted
}

fn hub_error(model: &str, problem: &str, fix: &str) -> Error {
    Error::Hub { model: model.to_owned(), problem: problem.to_owned(), fix: fix.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_two_plain_parts() {
        assert!(is_hub_id("mistralai/Mistral-Small-4-119B-2603"));
        for other in ["model", "a/b/c", "../b", "a/..", "/a", "a/", "a b/c", "./model"] {
            assert!(!is_hub_id(other), "{other}");
        }
        assert!(is_revision("refs/pr/1") && is_revision("v1.0"));
        assert!(!is_revision("../x") && !is_revision("") && !is_revision("a b"));
    }

    #[test]
    fn the_environment_decides() {
        let set = |pairs: &'static [(&str, &str)]| {
            HubOptions::from_variables(|name| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        let options = set(&[("HOME", "/h"), ("HF_TOKEN", "t"), ("HF_ENDPOINT", "http://mirror/")]);
        assert_eq!(options.cache, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!((options.token.as_deref(), options.endpoint.as_str()), (Some("t"), "http://mirror"));
        assert!(!options.offline);
        let options = set(&[("HF_HOME", "/x"), ("HF_HUB_OFFLINE", "1")]);
        assert_eq!(options.cache, Path::new("/x/hub"));
        assert!(options.offline);
        assert_eq!(set(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/x")]).cache, Path::new("/c"));
    }

    #[test]
    fn only_one_form_of_the_weights_is_wanted() {
        let names = |names: &[&str]| -> Vec<String> {
            let file = |name: &&str| RemoteFile { name: (*name).into(), blob: "b".into(), size: Some(1) };
            wanted(names.iter().map(file).collect()).into_iter().map(|file| file.name).collect()
        };
        let all = [
            "model.safetensors",
            "consolidated.safetensors",
            "config.json",
            "README.md",
            "a/b.json",
            ".gitattributes",
        ];
        assert_eq!(names(&all), ["config.json", "model.safetensors"]);
        assert_eq!(
            names(&["consolidated.safetensors", "params.json"]),
            ["params.json", "consolidated.safetensors"]
        );
    }
}
