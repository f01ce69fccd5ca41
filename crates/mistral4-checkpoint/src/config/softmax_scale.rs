//! Which of the two published softmax scales a model uses.

use super::{RopeParameters, SoftmaxScale, SoftmaxScalePolicy, TextConfig};

/// Choices of the user that win over the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConfigOptions {
    /// The softmax scale, whatever the file says.
    pub softmax_scale: Option<SoftmaxScalePolicy>,
}

impl SoftmaxScalePolicy {
    /// The policy's name on the command line and in recipes.
    pub fn name(self) -> &'static str {
        match self {
            SoftmaxScalePolicy::Standard => "standard",
            SoftmaxScalePolicy::YarnMscale => "yarn-mscale",
        }
    }

    /// The policy of a name, with `-` or `_`; `None` for another name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "standard" => Some(SoftmaxScalePolicy::Standard),
            "yarn-mscale" | "yarn_mscale" => Some(SoftmaxScalePolicy::YarnMscale),
            _ => None,
        }
    }
}

impl SoftmaxScale {
    /// The scale of a policy for a decoder.
    pub fn new(policy: SoftmaxScalePolicy, text: &TextConfig, reason: impl Into<String>) -> Self {
        let plain = ((text.qk_nope_head_dim + text.qk_rope_head_dim) as f64).powf(-0.5);
        let value = match policy {
            SoftmaxScalePolicy::Standard => plain,
            SoftmaxScalePolicy::YarnMscale => plain * mscale_all_dim(&text.rope).powi(2),
        };
        SoftmaxScale { value, policy, reason: reason.into() }
    }
}

/// YaRN's magnitude correction, `0.1 mscale ln(scale) + 1` above a scale of 1.
///
/// Source: transformers 5.24, `yarn_get_mscale`.
pub fn yarn_get_mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

fn mscale_all_dim(rope: &RopeParameters) -> f64 {
    match &rope.yarn {
        Some(yarn) => match yarn.mscale_all_dim {
            Some(mscale) if mscale != 0.0 => yarn_get_mscale(yarn.factor, mscale),
            _ => 1.0,
        },
        None => 1.0,
    }
}

/// An explicit option wins, then the file's own `apply_yarn_scaling` or `yarn.apply_scale`, then the plain scale.
pub(super) fn resolve(options: &ConfigOptions, text: &TextConfig, in_file: Option<bool>) -> SoftmaxScale {
    let (policy, reason) = match (options.softmax_scale, in_file) {
        (Some(policy), _) => (policy, "asked for explicitly"),
        (None, Some(true)) => {
            (SoftmaxScalePolicy::YarnMscale, "the configuration says to apply YaRN's scale")
        }
        (None, Some(false)) => {
            (SoftmaxScalePolicy::Standard, "the configuration says not to apply YaRN's scale")
        }
        (None, None) => (
            SoftmaxScalePolicy::Standard,
            "the configuration does not say; the released params.json has yarn.apply_scale false",
        ),
    };
    SoftmaxScale::new(policy, text, reason)
}
