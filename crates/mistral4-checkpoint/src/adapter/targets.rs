//! Which modules of a model may have an adapter, and which a list of patterns means.
//!
//! Source: `ModuleMatcher` in NeMo AutoModel (`components/_peft/module_matcher.py`).

use super::LoraSettings;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::weights::names::{self, TensorKind};

/// A linear map or a stack of experts of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Canonical name: of the linear's module, or of the stack.
    pub name: String,
    /// Shape of its weight: `[out, in]` or `[E, out, in]`.
    pub shape: Vec<usize>,
}

impl Target {
    /// Whether it is a stack of experts.
    pub fn is_stack(&self) -> bool {
        self.shape.len() == 3
    }

    /// The key of its weight.
    pub fn weight_key(&self) -> String {
        if self.is_stack() { self.name.clone() } else { format!("{}.weight", self.name) }
    }
}

/// Every module of a model that may have an adapter: linear maps and stacks of experts. The router has none.
pub fn targets(config: &Config) -> Vec<Target> {
    let target = |spec: names::TensorSpec| {
        use TensorKind::{ExpertsDown, ExpertsGateUp, Linear, LmHead, VisionLinear};
        let name = match spec.kind {
            Linear | VisionLinear | LmHead => spec.key.strip_suffix(".weight")?.to_owned(),
            ExpertsGateUp | ExpertsDown => spec.key,
            _ => return None,
        };
        Some(Target { name, shape: spec.shape })
    };
    names::tensors(config).into_iter().filter_map(target).collect()
}

/// The modules that `settings` give an adapter.
///
/// # Errors
/// Settings that contradict each other, and a pattern that names no module.
pub(super) fn matched(config: &Config, settings: &LoraSettings) -> Result<Vec<Target>> {
    let wrong =
        |key, value: String, problem: &str| Error::AdapterSettings { key, value, problem: problem.into() };
    let (wanted, excluded) = (&settings.target_modules, &settings.exclude_modules);
    if !wanted.is_empty() && !excluded.is_empty() {
        let problem = "target_modules and exclude_modules exclude each other; give one of them";
        return Err(wrong("exclude_modules", format!("{excluded:?}"), problem));
    }
    if settings.match_all_linear && !(wanted.is_empty() && excluded.is_empty()) {
        let problem = "every linear map is meant; leave target_modules and exclude_modules out";
        return Err(wrong("match_all_linear", "true".into(), problem));
    }
    let default = ["*_proj".to_owned()];
    let (key, patterns) = match (wanted.is_empty(), excluded.is_empty()) {
        (false, _) => ("target_modules", wanted.as_slice()),
        (true, false) => ("exclude_modules", excluded.as_slice()),
        (true, true) => ("target_modules", default.as_slice()),
    };
    let patterns: Vec<Pattern> =
        patterns.iter().map(|text| Pattern::new(key, text)).collect::<Result<_>>()?;
    let mut hits = vec![false; patterns.len()];
    let multimodal = config.vision.is_some();
    let mut is_hit = |target: &Target| {
        let names = names_elsewhere(target, multimodal);
        let mut any = false;
        for (pattern, hit) in patterns.iter().zip(&mut hits) {
            if names.iter().any(|name| pattern.matches(name)) {
                *hit = true;
                any = true;
            }
        }
        any
    };
    let chosen: Vec<Target> = targets(config)
        .into_iter()
        .filter(|target| {
            let hit = is_hit(target);
            match key {
                _ if settings.match_all_linear => !target.is_stack(),
                "exclude_modules" => !hit && !target.is_stack(),
                _ => hit,
            }
        })
        .collect();
    if let Some((pattern, _)) =
        patterns.iter().zip(&hits).find(|(_, hit)| !settings.match_all_linear && !**hit)
    {
        let problem = "no module of the model has such a name; `mistral4 inspect` lists the tensors";
        return Err(wrong(key, format!("{:?}", pattern.text), problem));
    }
    if chosen.is_empty() {
        return Err(wrong(key, format!("{excluded:?}"), "no module is left"));
    }
    Ok(chosen)
}

/// A module's name here, in transformers and in NeMo AutoModel; a stack goes by the name of its experts.
fn names_elsewhere(target: &Target, multimodal: bool) -> Vec<String> {
    let name = match target.is_stack() {
        true => target.name.rsplit_once('.').map_or(target.name.as_str(), |(experts, _)| experts),
        false => &target.name,
    };
    let mut names = vec![name.to_owned()];
    if multimodal {
        names.push(module_in_transformers(name, true));
        names.push(format!("model.{name}"));
    }
    names
}

/// The name of a module in transformers' model.
pub(super) fn module_in_transformers(name: &str, multimodal: bool) -> String {
    if !multimodal {
        return name.to_owned();
    }
    match name.strip_prefix("language_model.") {
        Some("lm_head") => "lm_head".to_owned(),
        Some(rest) => format!("model.language_model.{}", rest.strip_prefix("model.").unwrap_or(rest)),
        None => format!("model.{name}"),
    }
}

/// A name with wildcards: `*` and `.*` stand for any text, a dot for any character.
struct Pattern {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    AnyText,
    AnyCharacter,
    Character(char),
}

impl Pattern {
    fn new(key: &'static str, text: &str) -> Result<Self> {
        let mut parts = Vec::new();
        for character in text.chars() {
            match character {
                '*' => {
                    if parts.last() == Some(&Part::AnyCharacter) {
                        parts.pop();
                    }
                    parts.push(Part::AnyText);
                }
                '.' => parts.push(Part::AnyCharacter),
                other if other.is_alphanumeric() || "_-".contains(other) => {
                    parts.push(Part::Character(other))
                }
                other => {
                    let problem = format!("`{other}` is not part of a pattern; `*` is the wildcard");
                    return Err(Error::AdapterSettings { key, value: format!("{text:?}"), problem });
                }
            }
        }
        Ok(Self { text: text.to_owned(), parts })
    }

    fn matches(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        // How many characters of the name the parts so far can stand for.
        let mut reached = vec![false; name.len() + 1];
        reached[0] = true;
        for part in &self.parts {
            let before = reached.clone();
            for end in 0..=name.len() {
                reached[end] = match part {
                    Part::AnyText => before[..=end].contains(&true),
                    Part::AnyCharacter => end > 0 && before[end - 1],
                    Part::Character(want) => end > 0 && before[end - 1] && name[end - 1] == *want,
                };
            }
        }
        reached[name.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_automodel() {
        let matches =
            |pattern: &str, name: &str| Pattern::new("target_modules", pattern).unwrap().matches(name);
        assert!(matches("*", "lm_head"));
        assert!(matches("*_proj", "model.layers.0.self_attn.q_a_proj"));
        assert!(!matches("*_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa"));
        assert!(matches("*.layers.0.*.linear_qkv", "decoder.layers.0.self_attention.linear_qkv"));
        assert!(!matches("*.layers.0.*.linear_qkv", "decoder.layers.1.self_attention.linear_qkv"));
        assert!(matches(".*fc.*", "a.fc1.b"));
        assert!(matches("lm_head", "lm_head") && !matches("lm_head", "model.lm_head"));
        assert!(Pattern::new("target_modules", "(a|b)").is_err());
    }

    #[test]
    fn a_pattern_of_many_wildcards_ends_soon() {
        let pattern = Pattern::new("target_modules", &"*a".repeat(12)).unwrap();
        assert!(!pattern.matches(&"a".repeat(11)));
        assert!(pattern.matches(&"a".repeat(40)));
    }
}
