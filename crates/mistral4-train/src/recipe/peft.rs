//! `peft`: low-rank adapters.

use mistral4::model::dropout::DropoutPosition;
use mistral4_checkpoint::adapter::{LoraInit, LoraSettings};
use mistral4_checkpoint::weights::DType;

use super::reader::Section;
use super::report::Effect;
use crate::error::Result;

/// `peft`: what adapters are trained in place of the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    /// Which modules get one, of which rank and scale.
    pub lora: LoraSettings,
    /// Share of values that the adapters of linear maps drop in training.
    pub dropout: f64,
    /// Where they drop them.
    pub dropout_position: DropoutPosition,
    /// Storage type of adapters; `None`: that of the weights.
    pub lora_dtype: Option<DType>,
}

impl PeftConfig {
    /// Reads the section; with it, the base keeps its weights, whatever `freeze_config` says.
    ///
    /// Source: `PeftConfig` in NeMo AutoModel (`components/_peft/lora.py`).
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Option<Self>> {
        const NAMES: [(&str, ()); 3] = [
            ("nemo_automodel.components._peft.lora.PeftConfig", ()),
            ("nemo_automodel.components._peft.lora.LoraConfig", ()),
            ("PeftConfig", ()),
        ];
        const INITS: [(&str, LoraInit); 3] =
            [("xavier", LoraInit::Xavier), ("uniform", LoraInit::Uniform), ("kaiming", LoraInit::Uniform)];
        const POSITIONS: [(&str, DropoutPosition); 2] =
            [("pre", DropoutPosition::Pre), ("post", DropoutPosition::Post)];
        const DTYPES: [(&str, DType); 6] = [
            ("torch.float32", DType::F32),
            ("torch.bfloat16", DType::BF16),
            ("float32", DType::F32),
            ("bfloat16", DType::BF16),
            ("fp32", DType::F32),
            ("bf16", DType::BF16),
        ];
        let Some(mut s) = root.optional_section("peft")? else { return Ok(None) };
        s.name("_target_", "low-rank adapters are trained, the base keeps its weights", &NAMES)?;
        let defaults = LoraSettings::default();
        let lora = LoraSettings {
            target_modules: s
                .texts("target_modules", "patterns of the modules that get an adapter")?
                .unwrap_or_default(),
            exclude_modules: s
                .texts("exclude_modules", "patterns of the linear maps that get none, where all others do")?
                .unwrap_or_default(),
            match_all_linear: s
                .bool("match_all_linear", "an adapter on every linear map, the head included")?
                .unwrap_or(defaults.match_all_linear),
            dim: s.count("dim", "rank of the adapters")?.unwrap_or(defaults.dim),
            alpha: s.non_negative("alpha", "adapters are scaled by alpha / rank")?.unwrap_or(defaults.alpha),
            use_dora: s
                .bool("use_dora", "lengths of rows are trained apart from their directions")?
                .unwrap_or(defaults.use_dora),
            lora_a_init: s
                .name("lora_A_init", "how the first factors are drawn", &INITS)?
                .unwrap_or_default(),
            moe_rank_scaling: s
                .bool("moe_rank_scaling", "the rank of expert adapters is dim / experts a token takes")?
                .unwrap_or(defaults.moe_rank_scaling),
        };
        let dropout = s.non_negative("dropout", "share of values that adapters of linear maps drop")?;
        let dropout = dropout.unwrap_or(0.0);
        if dropout >= 1.0 {
            return Err(s.refuse("dropout", "a number from 0 up to, not including, 1"));
        }
        let config = Self {
            lora,
            dropout,
            dropout_position: s
                .name("dropout_position", "dropout before or after the adapter", &POSITIONS)?
                .unwrap_or(DropoutPosition::Post),
            lora_dtype: s.name("lora_dtype", "storage type of the adapters", &DTYPES)?,
        };
        if dropout == 0.0 {
            s.mark("dropout_position", Effect::NoEffect("nothing is dropped"));
        }
        s.none_of_effect(
            &["use_memory_efficient_lora", "use_triton"],
            "one implementation; the result is the same",
        );
        s.finish()?;
        let frozen = Effect::NoEffect("with `peft` the whole base keeps its weights");
        root.mark_section("freeze_config", &frozen);
        Ok(Some(config))
    }
}
