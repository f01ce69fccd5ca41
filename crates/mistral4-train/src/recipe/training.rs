//! `step_scheduler`, `rng`, `loss_fn`, `neftune`, `clip_grad_norm`, `lr_scheduler`.

use super::reader::Section;
use crate::error::Result;

/// `step_scheduler`: batch sizes and how long to train.
#[derive(Debug, Clone, PartialEq)]
pub struct StepSchedulerConfig {
    /// Samples of one optimizer step, over all ranks.
    pub global_batch_size: usize,
    /// Samples of one forward and backward pass on one rank.
    pub local_batch_size: usize,
    /// Most optimizer steps.
    pub max_steps: Option<usize>,
    /// Most passes over the data.
    pub num_epochs: Option<usize>,
    /// Steps between checkpoints; `None`: once an epoch.
    pub ckpt_every_steps: Option<usize>,
    /// Whether the end of an epoch saves a checkpoint as well.
    pub save_checkpoint_every_epoch: bool,
    /// Steps between validations; `None`: only at checkpoints.
    pub val_every_steps: Option<usize>,
    /// What happens at a step whose loss or gradient norm is no finite number.
    pub on_non_finite: OnNonFinite,
    /// What happens at a step whose loss is far above those before it.
    pub on_loss_spike: OnLossSpike,
    /// How many standard deviations above the mean of the last losses a spike begins.
    pub loss_spike_sigma: f64,
}

/// What happens at a step whose loss or gradient norm is no finite number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnNonFinite {
    /// The run ends with an error.
    Stop,
    /// The step changes nothing and is counted.
    Skip,
}

/// What happens at a step whose loss is far above those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLossSpike {
    /// It is reported and taken.
    Report,
    /// The step changes nothing and is counted.
    Skip,
    /// The run ends with an error.
    Stop,
}

impl StepSchedulerConfig {
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        const NON_FINITE: [(&str, OnNonFinite); 2] =
            [("stop", OnNonFinite::Stop), ("skip", OnNonFinite::Skip)];
        const SPIKE: [(&str, OnLossSpike); 3] =
            [("report", OnLossSpike::Report), ("skip", OnLossSpike::Skip), ("stop", OnLossSpike::Stop)];
        let mut s = root.section("step_scheduler")?;
        let global = s.count("global_batch_size", "samples of one optimizer step")?;
        let local = s.count("local_batch_size", "samples of one forward and backward pass")?;
        let config = Self {
            global_batch_size: global.unwrap_or(32),
            local_batch_size: local.unwrap_or(1),
            max_steps: s.count("max_steps", "training ends after this many optimizer steps")?,
            num_epochs: s.count("num_epochs", "training ends after this many passes over the data")?,
            ckpt_every_steps: match s.has("ckpt_every_steps") {
                true => s.count("ckpt_every_steps", "a checkpoint is saved every so many steps")?,
                // A null means once an epoch; an absent key means NeMo AutoModel's default.
                false => {
                    let absent = !s.keys().any(|key| key == "ckpt_every_steps");
                    s.count("ckpt_every_steps", "")?;
                    absent.then_some(100)
                }
            },
            save_checkpoint_every_epoch: s
                .bool("save_checkpoint_every_epoch", "whether each epoch ends with a checkpoint")?
                .unwrap_or(true),
            val_every_steps: s
                .count("val_every_steps", "the held-out loss is measured every so many steps")?,
            on_non_finite: s
                .name(
                    "on_non_finite",
                    "what happens at a loss or gradient norm that is no number",
                    &NON_FINITE,
                )?
                .unwrap_or(OnNonFinite::Stop),
            on_loss_spike: s
                .name("on_loss_spike", "what happens at a loss far above those before it", &SPIKE)?
                .unwrap_or(OnLossSpike::Report),
            loss_spike_sigma: s
                .non_negative(
                    "loss_spike_sigma",
                    "standard deviations above the mean at which a spike begins",
                )?
                .unwrap_or(6.0),
        };
        s.none_of_effect(&["gc_every_steps"], "there is no garbage collector to run");
        s.none_of_effect(
            &["log_remote_every_steps", "loss_average_window_steps"],
            "there is no remote logger; every step is written to training.jsonl",
        );
        s.none_of_effect(&["preemption_signal"], "SIGTERM and Ctrl-C always save and exit");
        s.unsupported("start_step", "the first step comes from the checkpoint that is resumed");
        s.unsupported("start_epoch", "the first epoch comes from the checkpoint that is resumed");
        s.unsupported_unless("dp_size", "set distributed.dp_size instead", |_| false);
        s.finish()?;
        Ok(config)
    }
}

/// `rng`: the seed of everything random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RngConfig {
    /// Seed of data order, initial weights and dropout.
    pub seed: u64,
}

impl RngConfig {
    /// Reads `rng.seed`, else the top-level `seed`, else 42.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        const NAMES: [(&str, ()); 2] =
            [("nemo_automodel.components.training.rng.StatefulRNG", ()), ("StatefulRNG", ())];
        let top = root.usize("seed", "seed of data order and initial weights")?;
        let mut s = root.section("rng")?;
        s.name("_target_", "a seeded, resumable random state", &NAMES)?;
        let seed = s.usize("seed", "seed of data order and initial weights")?;
        s.no_effect("ranked", "what is drawn does not depend on the rank");
        s.finish()?;
        Ok(Self { seed: seed.or(top).unwrap_or(42) as u64 })
    }
}

/// `loss_fn`: masked next-token cross entropy, always computed in f32; returns the coefficient of the z-loss.
pub(crate) fn read_loss(root: &mut Section<'_>) -> Result<f64> {
    const NAMES: [(&str, bool); 8] = [
        ("nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy", true),
        ("MaskedCrossEntropy", true),
        ("nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy", true),
        ("FusedLinearCrossEntropy", true),
        ("nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy", true),
        ("ChunkedCrossEntropy", true),
        ("nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy", true),
        ("TEParallelCrossEntropy", true),
    ];
    let mut s = root.section("loss_fn")?;
    s.name("_target_", "token-mean cross entropy over the global batch, labels of -100 left out", &NAMES)?;
    let z_loss = s.non_negative(
        "z_loss",
        "coefficient of the mean squared log-sum-exp of the labelled tokens' logits",
    )?;
    s.no_effect("fp32_upcast", "the loss is always computed in f32");
    s.none_of_effect(&["chunk_len", "compile"], "the logits are always made in chunks");
    s.unsupported_unless("ignore_index", "labels of -100 are left out", |node| node.to_string() == "-100");
    s.unsupported_unless("reduction", "the loss is the token mean of the global batch", |node| {
        ["sum", "mean"].contains(&node.to_string().as_str())
    });
    s.finish()?;
    Ok(z_loss.unwrap_or(0.0))
}

/// Reads `neftune`, a number or NeMo AutoModel's section: the size of the noise on embeddings; `None`: none.
pub(crate) fn read_neftune(root: &mut Section<'_>) -> Result<Option<f64>> {
    let what =
        "noise on the embeddings of training steps, uniform up to this over sqrt(length * hidden_size)";
    let alpha = match root.is_section("neftune") {
        true => {
            let mut s = root.section("neftune")?;
            let alpha = s.non_negative("noise_alpha", what)?;
            s.finish()?;
            Some(alpha.unwrap_or(5.0))
        }
        false => root.non_negative("neftune", what)?,
    };
    Ok(alpha.filter(|&alpha| alpha > 0.0))
}

/// Reads `clip_grad_norm.max_norm`; `None` when gradients are not clipped.
pub(crate) fn read_clip(root: &mut Section<'_>) -> Result<Option<f64>> {
    let mut s = root.section("clip_grad_norm")?;
    let max_norm = s.non_negative("max_norm", "gradients are scaled down to this L2 norm")?;
    if max_norm == Some(0.0) {
        return Err(s.refuse("max_norm", "a number above 0 (leave the section out to switch clipping off)"));
    }
    s.unsupported_unless("norm_type", "the L2 norm is used", |node| node.to_string().starts_with('2'));
    s.none_of_effect(&["foreach"], "one implementation");
    s.finish()?;
    Ok(max_norm)
}

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrDecayStyle {
    /// Stays at `max_lr`.
    Constant,
    /// A straight line to `min_lr`.
    Linear,
    /// Half a cosine to `min_lr`.
    Cosine,
    /// `max_lr * sqrt(warmup / step)`, at least `min_lr`.
    InverseSquareRoot,
    /// Warm-up, stable, decay: `max_lr` until the last `wsd_decay_steps`.
    Wsd,
}

/// Shape of the last part of a WSD schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WsdDecayStyle {
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
    /// `2 * 0.5^r - 1`.
    Exponential,
    /// `1 - sqrt(r)`.
    MinusSqrt,
}

/// Shape of a growing weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WdIncrStyle {
    /// The same all along.
    Constant,
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
}

/// `lr_scheduler`, before the defaults that depend on the run are filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct LrSchedulerConfig {
    /// Steps of linear warm-up; default min(1000, total / 10).
    pub lr_warmup_steps: Option<usize>,
    /// Step at which `min_lr` is reached; default the whole run.
    pub lr_decay_steps: Option<usize>,
    /// Shape after the warm-up.
    pub lr_decay_style: LrDecayStyle,
    /// Rate at step 0; default a tenth of the optimizer's.
    pub init_lr: Option<f64>,
    /// Rate after the warm-up; default the optimizer's.
    pub max_lr: Option<f64>,
    /// Rate at the end; default a hundredth of the optimizer's.
    pub min_lr: Option<f64>,
    /// Weight decay at step 0; default the optimizer's.
    pub start_wd: Option<f64>,
    /// Weight decay at the end; default the optimizer's.
    pub end_wd: Option<f64>,
    /// Steps over which weight decay grows; default the whole run.
    pub wd_incr_steps: Option<usize>,
    /// Shape of that growth.
    pub wd_incr_style: WdIncrStyle,
    /// Length of a WSD schedule's last part.
    pub wsd_decay_steps: Option<usize>,
    /// Shape of a WSD schedule's last part.
    pub lr_wsd_decay_style: Option<WsdDecayStyle>,
}

impl LrSchedulerConfig {
    /// Reads the section; `None` when the recipe has none.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Option<Self>> {
        const DECAY: [(&str, LrDecayStyle); 6] = [
            ("constant", LrDecayStyle::Constant),
            ("linear", LrDecayStyle::Linear),
            ("cosine", LrDecayStyle::Cosine),
            ("inverse-square-root", LrDecayStyle::InverseSquareRoot),
            ("WSD", LrDecayStyle::Wsd),
            ("wsd", LrDecayStyle::Wsd),
        ];
        const WSD: [(&str, WsdDecayStyle); 4] = [
            ("linear", WsdDecayStyle::Linear),
            ("cosine", WsdDecayStyle::Cosine),
            ("exponential", WsdDecayStyle::Exponential),
            ("minus_sqrt", WsdDecayStyle::MinusSqrt),
        ];
        const WD: [(&str, WdIncrStyle); 3] = [
            ("constant", WdIncrStyle::Constant),
            ("linear", WdIncrStyle::Linear),
            ("cosine", WdIncrStyle::Cosine),
        ];
        let Some(mut s) = root.optional_section("lr_scheduler")? else { return Ok(None) };
        let config = Self {
            lr_warmup_steps: s.usize("lr_warmup_steps", "steps of linear warm-up from init_lr to max_lr")?,
            lr_decay_steps: s.count("lr_decay_steps", "step at which min_lr is reached")?,
            lr_decay_style: s
                .name("lr_decay_style", "shape after the warm-up", &DECAY)?
                .unwrap_or(LrDecayStyle::Cosine),
            init_lr: s.non_negative("init_lr", "rate of step 0")?,
            max_lr: s.non_negative("max_lr", "rate after the warm-up")?,
            min_lr: s.non_negative("min_lr", "rate at the end")?,
            start_wd: s.non_negative("start_wd", "weight decay of step 0")?,
            end_wd: s.non_negative("end_wd", "weight decay at the end")?,
            wd_incr_steps: s.count("wd_incr_steps", "steps over which weight decay grows")?,
            wd_incr_style: s
                .name("wd_incr_style", "shape of the growth of weight decay", &WD)?
                .unwrap_or(WdIncrStyle::Constant),
            wsd_decay_steps: s.count("wsd_decay_steps", "length of the last part of a WSD schedule")?,
            lr_wsd_decay_style: s.name(
                "lr_wsd_decay_style",
                "shape of the last part of a WSD schedule",
                &WSD,
            )?,
        };
        s.none_of_effect(
            &["use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"],
            "a resumed run follows the schedule of its recipe",
        );
        s.finish()?;
        Ok(Some(config))
    }
}
