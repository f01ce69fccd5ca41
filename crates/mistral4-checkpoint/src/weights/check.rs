//! Whether a checkpoint holds exactly the tensors of a model.

use std::fmt;

use crate::error::list;

/// All differences between a checkpoint's tensors and a model's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Parameters that are not stored.
    pub missing: Vec<String>,
    /// Stored tensors that are no parameter, under their stored keys.
    pub extra: Vec<String>,
    /// Parameters that are stored in a way that cannot be read, with the reason.
    pub unusable: Vec<(String, String)>,
}

impl CheckReport {
    /// Whether nothing differs.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.unusable.is_empty()
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.missing.is_empty() {
            let mut part = format!("{} missing: {}", self.missing.len(), list(&self.missing));
            if self.missing.iter().any(|key| key.ends_with("lm_head.weight")) {
                part.push_str(" (a model with tied embeddings has none; tied embeddings are not supported)");
            }
            parts.push(part);
        }
        if !self.extra.is_empty() {
            parts.push(format!("{} unknown: {}", self.extra.len(), list(&self.extra)));
        }
        if !self.unusable.is_empty() {
            const SHOWN: usize = 8;
            let mut shown: Vec<String> = self
                .unusable
                .iter()
                .take(SHOWN)
                .map(|(key, problem)| format!("`{key}` ({problem})"))
                .collect();
            if self.unusable.len() > SHOWN {
                shown.push(format!("{} more", self.unusable.len() - SHOWN));
            }
            parts.push(format!("{} unusable: {}", self.unusable.len(), shown.join(", ")));
        }
        f.write_str(&parts.join("; "))
    }
}
