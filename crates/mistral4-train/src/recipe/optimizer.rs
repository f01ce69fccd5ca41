//! `optimizer`: Adam, AdamW and Muon, and how their states are kept.

use burn::tensor::DType;

use super::reader::Section;
use crate::error::Result;

/// Which rule turns gradients into updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptimizerKind {
    /// Weight decay is added to the gradient.
    Adam,
    /// Weight decay shrinks the weight itself.
    AdamW,
}

/// How Adam's moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDtype {
    /// 32-bit floats.
    F32,
    /// Brain floats, rounded at random.
    Bf16,
    /// 8 bits, scaled by blocks.
    Int8,
}

/// The precision of Muon's Newton-Schulz iteration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewtonSchulzDtype {
    /// 32-bit floats.
    F32,
    /// Brain floats.
    Bf16,
}

impl NewtonSchulzDtype {
    /// The type of its tensors.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// How Muon's rate depends on a matrix's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdjustLr {
    /// `sqrt(rows / columns)`.
    SpectralNorm,
    /// `0.2 sqrt(max(rows, columns))`, as large a change as AdamW's.
    RmsNorm,
}

/// What `dion.Muon` adds to an optimizer: its update of matrices, and rates for what is none.
#[derive(Debug, Clone, PartialEq)]
pub struct MuonConfig {
    /// Decay of the momentum.
    pub mu: f64,
    /// Whether the gradient is added to the momentum once more.
    pub nesterov: bool,
    /// How the rate depends on the shape.
    pub adjust_lr: Option<AdjustLr>,
    /// Added to the norm of a matrix.
    pub epsilon: f64,
    /// Precision of the Newton-Schulz iteration.
    pub newton_schulz_dtype: NewtonSchulzDtype,
    /// Rate of vectors; default that of the matrices.
    pub scalar_lr: Option<f64>,
    /// Rate of the embeddings; default that of vectors.
    pub embed_lr: Option<f64>,
    /// Rate of the output projection; default that of the matrices over the root of its inputs.
    pub lm_head_lr: Option<f64>,
}

/// `optimizer`.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerConfig {
    /// Adam or AdamW.
    pub kind: OptimizerKind,
    /// How Adam's moments are kept.
    pub state_dtype: StateDtype,
    /// With 8-bit moments, parameters with fewer elements keep f32 ones.
    pub min_8bit_size: usize,
    /// Whether bf16 parameters have a copy in f32 that small steps add up in; without it, steps are rounded at random.
    pub master_weights: bool,
    /// Muon for the matrices; `kind` is then for the rest.
    pub muon: Option<MuonConfig>,
    /// Learning rate; the peak when there is a schedule.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    /// AdamW with torch's defaults and f32 moments.
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            state_dtype: StateDtype::F32,
            min_8bit_size: 4096,
            master_weights: true,
            muon: None,
            lr: 1e-3,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// The rules that `optimizer._target_` names.
#[derive(Clone, Copy, PartialEq)]
enum Target {
    Adam,
    AdamW,
    FusedAdam,
    AdamW8bit,
    Muon,
}

impl OptimizerConfig {
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        use Target::{Adam, AdamW, AdamW8bit, FusedAdam, Muon};
        const NAMES: [(&str, Target); 14] = [
            ("torch.optim.AdamW", AdamW),
            ("torch.optim.adamw.AdamW", AdamW),
            ("AdamW", AdamW),
            ("adamw", AdamW),
            ("torch.optim.Adam", Adam),
            ("Adam", Adam),
            ("transformer_engine.pytorch.optimizers.fused_adam.FusedAdam", FusedAdam),
            ("transformer_engine.pytorch.optimizers.FusedAdam", FusedAdam),
            ("bitsandbytes.optim.AdamW8bit", AdamW8bit),
            ("torchao.optim.AdamW8bit", AdamW8bit),
            ("AdamW8bit", AdamW8bit),
            ("dion.Muon", Muon),
            ("Muon", Muon),
            ("muon", Muon),
        ];
        const DTYPES: [(&str, StateDtype); 6] = [
            ("torch.float32", StateDtype::F32),
            ("float32", StateDtype::F32),
            ("torch.bfloat16", StateDtype::Bf16),
            ("bfloat16", StateDtype::Bf16),
            ("torch.uint8", StateDtype::Int8),
            ("uint8", StateDtype::Int8),
        ];
        let mut s = root.section("optimizer")?;
        let target = s.name("_target_", "the update rule", &NAMES)?.unwrap_or(AdamW);
        let decoupled = match target {
            FusedAdam => s.bool("adam_w_mode", "weight decay shrinks the weight itself")?.unwrap_or(true),
            other => other != Adam,
        };
        let kind = if decoupled { OptimizerKind::AdamW } else { OptimizerKind::Adam };
        let base = Self { kind, ..Self::default() };
        let lr = s.non_negative("lr", "learning rate; the peak where there is a schedule")?;
        let weight_decay = s.non_negative("weight_decay", "weight decay")?;
        let config = if target == Muon {
            let muon = MuonConfig::read(&mut s)?;
            Self {
                muon: Some(muon),
                lr: lr.unwrap_or(5e-4),
                weight_decay: weight_decay.unwrap_or(0.0),
                betas: s.pair("scalar_betas", "decay of AdamW's moments")?.unwrap_or(base.betas),
                eps: s.non_negative("scalar_eps", "AdamW's epsilon")?.unwrap_or(base.eps),
                ..base
            }
        } else {
            Self {
                lr: lr.unwrap_or(base.lr),
                weight_decay: weight_decay.unwrap_or(if target == Adam { 0.0 } else { base.weight_decay }),
                betas: s.pair("betas", "decay of the two moments")?.unwrap_or(base.betas),
                eps: s.non_negative("eps", "added to the root of the second moment")?.unwrap_or(base.eps),
                ..base
            }
        };
        let first = s.name("exp_avg_dtype", "how the first moment is kept", &DTYPES)?;
        let second = s.name("exp_avg_sq_dtype", "how the second moment is kept", &DTYPES)?;
        let default = if target == AdamW8bit { StateDtype::Int8 } else { StateDtype::F32 };
        let state_dtype = first.or(second).unwrap_or(default);
        if second.is_some_and(|second| second != first.unwrap_or(default)) {
            return Err(s.refuse("exp_avg_sq_dtype", "the same as exp_avg_dtype"));
        }
        let min_8bit_size = s.usize("min_8bit_size", "parameters with fewer elements keep f32 moments")?;
        let master_weights = s
            .bool(
                "master_weights",
                "bf16 parameters keep an f32 copy; without it, steps are rounded at random",
            )?
            .unwrap_or(true);
        if target == Muon && !master_weights {
            return Err(s.refuse("master_weights", "true: Muon's steps are not rounded at random"));
        }
        s.none_of_effect(
            &["foreach", "fused", "capturable", "differentiable", "set_grad_none"],
            "one implementation of the update",
        );
        s.none_of_effect(
            &[
                "store_param_remainders",
                "use_decoupled_grad",
                "block_wise",
                "is_paged",
                "use_triton",
                "flatten",
            ],
            "changes where or how the update is computed, not its result",
        );
        for (key, needed) in [("bias_correction", "true"), ("optim_bits", "8")] {
            s.unsupported_unless(key, "the update always works so", |node| node.to_string() == needed);
        }
        s.unsupported_unless("percentile_clipping", "clip_grad_norm clips", |node| node.to_string() == "100");
        s.unsupported_unless("scalar_opt", "AdamW is used", |node| node.to_string() == "adamw");
        s.unsupported("param_group_overrides", "all parameters of a kind have one rate and weight decay");
        s.unsupported("amsgrad", "AMSGrad is not implemented");
        s.unsupported("maximize", "the loss is minimised");
        s.unsupported_unless("decoupled_weight_decay", "choose torch.optim.AdamW instead", |node| {
            node.to_string() == if decoupled { "true" } else { "false" }
        });
        s.finish()?;
        let min_8bit_size = min_8bit_size.unwrap_or(config.min_8bit_size);
        Ok(Self { state_dtype, min_8bit_size, master_weights, ..config })
    }
}

impl MuonConfig {
    fn read(s: &mut Section<'_>) -> Result<Self> {
        const ADJUST: [(&str, Option<AdjustLr>); 4] = [
            ("spectral_norm", Some(AdjustLr::SpectralNorm)),
            ("rms_norm", Some(AdjustLr::RmsNorm)),
            ("none", None),
            ("None", None),
        ];
        const DTYPES: [(&str, NewtonSchulzDtype); 4] = [
            ("torch.bfloat16", NewtonSchulzDtype::Bf16),
            ("bfloat16", NewtonSchulzDtype::Bf16),
            ("torch.float32", NewtonSchulzDtype::F32),
            ("float32", NewtonSchulzDtype::F32),
        ];
        let config = Self {
            mu: s.non_negative("mu", "decay of Muon's momentum")?.unwrap_or(0.95),
            nesterov: s.bool("nesterov", "adds the gradient to the momentum once more")?.unwrap_or(false),
            adjust_lr: s
                .name("adjust_lr", "how Muon's rate depends on a matrix's shape", &ADJUST)?
                .unwrap_or(Some(AdjustLr::SpectralNorm)),
            epsilon: s.non_negative("epsilon", "added to the norm of a matrix")?.unwrap_or(1e-8),
            newton_schulz_dtype: s
                .name("newton_schulz_dtype", "precision of the Newton-Schulz iteration", &DTYPES)?
                .unwrap_or(NewtonSchulzDtype::Bf16),
            scalar_lr: s.non_negative("scalar_lr", "rate of norms, biases and the router")?,
            embed_lr: s.non_negative("embed_lr", "rate of the embeddings")?,
            lm_head_lr: s.non_negative("lm_head_lr", "rate of the output projection")?,
        };
        s.no_effect("betas", "Muon's momentum is mu, AdamW's decays are scalar_betas");
        Ok(config)
    }
}
