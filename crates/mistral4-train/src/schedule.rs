//! When to step, save and validate, and with which learning rate.
//!
//! Source: NVIDIA NeMo AutoModel, `components/training/step_scheduler.py`, `components/optim/scheduler.py` and
//! `LRSchedulerConfig` of `components/optim/optimizer.py`.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::recipe::{
    LrDecayStyle, LrSchedulerConfig, OptimizerConfig, StepSchedulerConfig, WdIncrStyle, WsdDecayStyle,
};

/// Learning rate and weight decay of every step.
#[derive(Debug, Clone, PartialEq)]
pub struct LrSchedule {
    shape: Option<Shape>,
    max_lr: f64,
    weight_decay: f64,
}

/// A schedule with every default filled in.
#[derive(Debug, Clone, PartialEq)]
struct Shape {
    warmup: usize,
    decay: usize,
    style: LrDecayStyle,
    init_lr: f64,
    min_lr: f64,
    start_wd: f64,
    end_wd: f64,
    wd_incr: usize,
    wd_style: WdIncrStyle,
    wsd_decay: usize,
    wsd_style: WsdDecayStyle,
}

impl LrSchedule {
    /// Fills in what depends on the run: `total_steps` optimizer steps from the optimizer's rate and weight decay.
    ///
    /// Without an `lr_scheduler` section both stay as the optimizer has them.
    ///
    /// # Errors
    /// Numbers that contradict each other: `min_lr` or `init_lr` above `max_lr`, a warm-up as long as the decay, a
    /// weight decay that falls, a WSD schedule without its last part.
    pub fn new(
        config: Option<&LrSchedulerConfig>,
        optimizer: &OptimizerConfig,
        total_steps: usize,
    ) -> Result<Self> {
        let (lr, wd) = (optimizer.lr, optimizer.weight_decay);
        let Some(c) = config else { return Ok(Self { shape: None, max_lr: lr, weight_decay: wd }) };
        let max_lr = c.max_lr.unwrap_or(lr);
        let shape = Shape {
            warmup: c.lr_warmup_steps.unwrap_or((total_steps / 10).min(1000)),
            decay: c.lr_decay_steps.unwrap_or(total_steps),
            style: c.lr_decay_style,
            init_lr: c.init_lr.unwrap_or(lr * 0.1),
            min_lr: c.min_lr.unwrap_or(lr * 0.01),
            start_wd: c.start_wd.unwrap_or(wd),
            end_wd: c.end_wd.unwrap_or(wd),
            wd_incr: c.wd_incr_steps.unwrap_or(total_steps),
            wd_style: c.wd_incr_style,
            wsd_decay: c.wsd_decay_steps.unwrap_or(0),
            wsd_style: c.lr_wsd_decay_style.unwrap_or(WsdDecayStyle::Linear),
        };
        shape.check(max_lr, c)?;
        Ok(Self { shape: Some(shape), max_lr, weight_decay: wd })
    }

    /// Learning rate of an optimizer step, counted from 0.
    pub fn lr(&self, step: usize) -> f64 {
        let Some(s) = &self.shape else { return self.max_lr };
        let max_lr = self.max_lr;
        if s.warmup > 0 && step <= s.warmup {
            return s.init_lr + (max_lr - s.init_lr) * step as f64 / s.warmup as f64;
        }
        if s.style == LrDecayStyle::Constant {
            return max_lr;
        }
        if step > s.decay {
            return s.min_lr;
        }
        let ratio = (step - s.warmup) as f64 / (s.decay - s.warmup) as f64;
        let coefficient = match s.style {
            LrDecayStyle::Constant => 1.0,
            LrDecayStyle::InverseSquareRoot => {
                let lr = max_lr * (s.warmup.max(1) as f64).sqrt() / (step.max(1) as f64).sqrt();
                return lr.max(s.min_lr);
            }
            LrDecayStyle::Linear => 1.0 - ratio,
            LrDecayStyle::Cosine => 0.5 * ((PI * ratio).cos() + 1.0),
            LrDecayStyle::Wsd => s.wsd_coefficient(step),
        };
        s.min_lr + coefficient * (max_lr - s.min_lr)
    }

    /// Weight decay of an optimizer step, counted from 0.
    pub fn wd(&self, step: usize) -> f64 {
        let Some(s) = &self.shape else { return self.weight_decay };
        if step > s.wd_incr || s.wd_style == WdIncrStyle::Constant {
            return s.end_wd;
        }
        let ratio = step as f64 / s.wd_incr as f64;
        let coefficient = match s.wd_style {
            WdIncrStyle::Constant | WdIncrStyle::Linear => ratio,
            WdIncrStyle::Cosine => 0.5 * ((PI * (1.0 - ratio)).cos() + 1.0),
        };
        s.start_wd + coefficient * (s.end_wd - s.start_wd)
    }
}

impl Shape {
    fn wsd_coefficient(&self, step: usize) -> f64 {
        let start = self.decay - self.wsd_decay;
        if step <= start {
            return 1.0;
        }
        let ratio = (step - start) as f64 / self.wsd_decay as f64;
        match self.wsd_style {
            WsdDecayStyle::Linear => 1.0 - ratio,
            WsdDecayStyle::Cosine => 0.5 * ((PI * ratio).cos() + 1.0),
            WsdDecayStyle::Exponential => 2.0 * 0.5f64.powf(ratio) - 1.0,
            WsdDecayStyle::MinusSqrt => 1.0 - ratio.sqrt(),
        }
    }

    fn check(&self, max_lr: f64, config: &LrSchedulerConfig) -> Result<()> {
        let refuse = |key: &str, value: String, message: String| {
            Err(Error::Inconsistent { key: format!("lr_scheduler.{key}"), value, message })
        };
        if self.min_lr > max_lr {
            return refuse("min_lr", self.min_lr.to_string(), format!("is above max_lr ({max_lr})"));
        }
        if self.init_lr > max_lr {
            return refuse("init_lr", self.init_lr.to_string(), format!("is above max_lr ({max_lr})"));
        }
        if self.warmup >= self.decay {
            let message = format!("must be less than lr_decay_steps ({})", self.decay);
            return refuse("lr_warmup_steps", self.warmup.to_string(), message);
        }
        if self.end_wd < self.start_wd {
            return refuse(
                "end_wd",
                self.end_wd.to_string(),
                format!("is below start_wd ({})", self.start_wd),
            );
        }
        if self.wd_style == WdIncrStyle::Constant && self.start_wd != self.end_wd {
            let message =
                format!("differs from start_wd ({}) while wd_incr_style is constant", self.start_wd);
            return refuse("end_wd", self.end_wd.to_string(), message);
        }
        if self.style == LrDecayStyle::Wsd {
            if config.wsd_decay_steps.is_none() {
                return refuse("lr_decay_style", "WSD".to_owned(), "needs wsd_decay_steps".to_owned());
            }
            if self.wsd_decay > self.decay {
                let message = format!("is above lr_decay_steps ({})", self.decay);
                return refuse("wsd_decay_steps", self.wsd_decay.to_string(), message);
            }
        }
        Ok(())
    }
}

/// Where training stands: counted in optimizer steps and epochs, both from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StepState {
    /// The next optimizer step.
    pub step: usize,
    /// The current pass over the data.
    pub epoch: usize,
}

/// Decides how long to train and when to save and validate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepScheduler {
    grad_acc_steps: usize,
    steps_per_epoch: Option<usize>,
    max_steps: usize,
    num_epochs: usize,
    ckpt_every_steps: usize,
    save_checkpoint_every_epoch: bool,
    val_every_steps: Option<usize>,
    state: StepState,
}

impl StepScheduler {
    /// For epochs of so many steps (`None`: streamed data, whose length nobody knows) on `dp_size` data-parallel ranks.
    ///
    /// # Errors
    /// A global batch size that local batches on `dp_size` ranks do not divide, an epoch without steps, and streamed
    /// data without `max_steps`.
    pub fn new(config: &StepSchedulerConfig, steps_per_epoch: Option<usize>, dp_size: usize) -> Result<Self> {
        let (global, local) = (config.global_batch_size, config.local_batch_size);
        let pass = local * dp_size;
        if pass == 0 || global == 0 || !global.is_multiple_of(pass) {
            return Err(Error::Inconsistent {
                key: "step_scheduler.global_batch_size".to_owned(),
                value: global.to_string(),
                message: format!(
                    "must be divisible by local_batch_size * data-parallel ranks ({local} * {dp_size})"
                ),
            });
        }
        if steps_per_epoch == Some(0) {
            return Err(Error::Inconsistent {
                key: "step_scheduler.local_batch_size".to_owned(),
                value: local.to_string(),
                message: "the data set does not fill a single batch (is dataloader.drop_last on?)".to_owned(),
            });
        }
        let grad_acc_steps = global / pass;
        let Some(max_steps) =
            config.max_steps.or_else(|| Some(epochs(config).saturating_mul(steps_per_epoch?)))
        else {
            return Err(Error::Inconsistent {
                key: "step_scheduler.max_steps".to_owned(),
                value: "null".to_owned(),
                message: "streamed data does not say how long an epoch is; say how many steps the run takes"
                    .to_owned(),
            });
        };
        let num_epochs = match (config.num_epochs, config.max_steps) {
            (None, Some(steps)) => steps_per_epoch.map_or(usize::MAX, |epoch| steps.div_ceil(epoch)),
            _ => epochs(config),
        };
        Ok(Self {
            grad_acc_steps,
            steps_per_epoch,
            max_steps,
            num_epochs,
            ckpt_every_steps: config.ckpt_every_steps.or(steps_per_epoch).unwrap_or(usize::MAX),
            save_checkpoint_every_epoch: config.save_checkpoint_every_epoch,
            val_every_steps: config.val_every_steps,
            state: StepState { step: 0, epoch: 0 },
        })
    }

    /// Local batches of a full optimizer step; the last step of an epoch may have fewer.
    pub fn grad_acc_steps(&self) -> usize {
        self.grad_acc_steps
    }

    /// Optimizer steps of an epoch, where they are known.
    pub fn steps_per_epoch(&self) -> Option<usize> {
        self.steps_per_epoch
    }

    /// Optimizer steps of the whole run: what the learning-rate schedule spans.
    pub fn total_steps(&self) -> usize {
        let epochs = self.steps_per_epoch.map_or(usize::MAX, |epoch| self.num_epochs.saturating_mul(epoch));
        self.max_steps.min(epochs)
    }

    /// The step that is next or under way.
    pub fn state(&self) -> StepState {
        self.state
    }

    /// Continues from a saved place.
    pub fn resume(&mut self, state: StepState) {
        self.state = state;
    }

    /// Whether the run is over.
    pub fn is_finished(&self) -> bool {
        self.state.step >= self.max_steps || self.state.epoch >= self.num_epochs
    }

    /// Whether the step under way is the run's last; `ends_epoch` says whether it takes the epoch's last batch.
    pub fn is_last_step(&self, ends_epoch: bool) -> bool {
        self.state.step + 1 >= self.max_steps || (ends_epoch && self.state.epoch + 1 >= self.num_epochs)
    }

    /// Whether a checkpoint follows the step under way.
    pub fn is_ckpt_step(&self, ends_epoch: bool) -> bool {
        self.state.step % self.ckpt_every_steps == self.ckpt_every_steps - 1
            || (ends_epoch && self.save_checkpoint_every_epoch)
            || self.is_last_step(ends_epoch)
    }

    /// Whether the held-out loss is measured after the step under way: every so many steps and at every checkpoint.
    pub fn is_val_step(&self, ends_epoch: bool) -> bool {
        self.val_every_steps.is_some_and(|every| self.state.step % every == every - 1)
            || self.is_ckpt_step(ends_epoch)
    }

    /// Counts the step under way as done and returns the state to save with it.
    pub fn advance(&mut self, ends_epoch: bool) -> StepState {
        self.state.step += 1;
        self.state.epoch += usize::from(ends_epoch);
        self.state
    }
}

/// Passes over the data that a recipe without `max_steps` makes.
fn epochs(config: &StepSchedulerConfig) -> usize {
    config.num_epochs.unwrap_or(10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{OnLossSpike, OnNonFinite};

    fn optimizer() -> OptimizerConfig {
        OptimizerConfig { lr: 1e-3, weight_decay: 0.1, ..OptimizerConfig::default() }
    }

    fn config(style: LrDecayStyle) -> LrSchedulerConfig {
        LrSchedulerConfig {
            lr_warmup_steps: Some(5),
            lr_decay_steps: Some(30),
            lr_decay_style: style,
            init_lr: Some(1e-4),
            max_lr: None,
            min_lr: Some(1e-5),
            start_wd: None,
            end_wd: None,
            wd_incr_steps: None,
            wd_incr_style: WdIncrStyle::Constant,
            wsd_decay_steps: Some(10),
            lr_wsd_decay_style: None,
        }
    }

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-12 * want.abs().max(1e-9), "{got} is not {want}");
    }

    #[test]
    fn without_a_section_nothing_changes() {
        let schedule = LrSchedule::new(None, &optimizer(), 100).unwrap();
        close(schedule.lr(0), 1e-3);
        close(schedule.lr(99), 1e-3);
        close(schedule.wd(50), 0.1);
    }

    #[test]
    fn defaults_come_from_the_run_and_the_optimizer() {
        let c = LrSchedulerConfig {
            lr_warmup_steps: None,
            lr_decay_steps: None,
            init_lr: None,
            min_lr: None,
            ..config(LrDecayStyle::Cosine)
        };
        let schedule = LrSchedule::new(Some(&c), &optimizer(), 200).unwrap();
        close(schedule.lr(0), 1e-4);
        close(schedule.lr(20), 1e-3);
        close(schedule.lr(200), 1e-5);
        close(schedule.lr(201), 1e-5);
    }

    /// Values printed by NeMo AutoModel's `OptimizerParamScheduler` with the settings of `config`.
    #[test]
    fn every_style_equals_the_reference() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/lr_schedules.json")).unwrap();
        let mut compared = 0;
        for case in golden["cases"].as_array().unwrap() {
            let style = match case["lr_decay_style"].as_str().unwrap() {
                "constant" => LrDecayStyle::Constant,
                "linear" => LrDecayStyle::Linear,
                "cosine" => LrDecayStyle::Cosine,
                "inverse-square-root" => LrDecayStyle::InverseSquareRoot,
                "WSD" => LrDecayStyle::Wsd,
                other => panic!("{other}"),
            };
            let wsd = match case["lr_wsd_decay_style"].as_str() {
                Some("cosine") => WsdDecayStyle::Cosine,
                Some("exponential") => WsdDecayStyle::Exponential,
                Some("minus_sqrt") => WsdDecayStyle::MinusSqrt,
                _ => WsdDecayStyle::Linear,
            };
            let wd = match case["wd_incr_style"].as_str().unwrap() {
                "linear" => WdIncrStyle::Linear,
                "cosine" => WdIncrStyle::Cosine,
                _ => WdIncrStyle::Constant,
            };
            let c = LrSchedulerConfig {
                lr_warmup_steps: Some(case["lr_warmup_steps"].as_u64().unwrap() as usize),
                lr_wsd_decay_style: Some(wsd),
                wd_incr_style: wd,
                start_wd: case["start_wd"].as_f64(),
                end_wd: case["end_wd"].as_f64(),
                wd_incr_steps: Some(20),
                ..config(style)
            };
            let schedule = LrSchedule::new(Some(&c), &optimizer(), 35).unwrap();
            for (step, lr) in case["lr"].as_array().unwrap().iter().enumerate() {
                close(schedule.lr(step), lr.as_f64().unwrap());
                close(schedule.wd(step), case["wd"][step].as_f64().unwrap());
                compared += 1;
            }
        }
        assert_eq!(compared, 11 * 36);
    }

    #[test]
    fn contradictions_are_named() {
        let message =
            |c: LrSchedulerConfig| LrSchedule::new(Some(&c), &optimizer(), 30).unwrap_err().to_string();
        let base = || config(LrDecayStyle::Cosine);
        assert_eq!(
            message(LrSchedulerConfig { min_lr: Some(0.1), ..base() }),
            "`lr_scheduler.min_lr: 0.1`: is above max_lr (0.001)"
        );
        assert!(message(LrSchedulerConfig { init_lr: Some(0.1), ..base() }).contains("init_lr"));
        assert!(
            message(LrSchedulerConfig { lr_warmup_steps: Some(30), ..base() })
                .contains("less than lr_decay_steps")
        );
        assert!(message(LrSchedulerConfig { end_wd: Some(0.2), ..base() }).contains("constant"));
        assert!(message(LrSchedulerConfig { end_wd: Some(0.0), ..base() }).contains("below start_wd"));
        let wsd = config(LrDecayStyle::Wsd);
        assert!(
            message(LrSchedulerConfig { wsd_decay_steps: None, ..wsd.clone() })
                .contains("needs wsd_decay_steps")
        );
        assert!(
            message(LrSchedulerConfig { wsd_decay_steps: Some(31), ..wsd }).contains("above lr_decay_steps")
        );
    }

    fn steps(global: usize, local: usize) -> StepSchedulerConfig {
        StepSchedulerConfig {
            global_batch_size: global,
            local_batch_size: local,
            max_steps: None,
            num_epochs: Some(2),
            ckpt_every_steps: Some(4),
            save_checkpoint_every_epoch: true,
            val_every_steps: Some(3),
            on_non_finite: OnNonFinite::Stop,
            on_loss_spike: OnLossSpike::Report,
            loss_spike_sigma: 6.0,
        }
    }

    /// Runs to the end; returns (step, saves, validates, is last) of each step.
    fn run(config: &StepSchedulerConfig, epoch: usize) -> Vec<(usize, bool, bool, bool)> {
        let mut scheduler = StepScheduler::new(config, Some(epoch), 1).unwrap();
        let mut log = Vec::new();
        while !scheduler.is_finished() {
            let ends = scheduler.state().step % epoch == epoch - 1;
            let step = scheduler.state().step;
            log.push((
                step,
                scheduler.is_ckpt_step(ends),
                scheduler.is_val_step(ends),
                scheduler.is_last_step(ends),
            ));
            scheduler.advance(ends);
        }
        log
    }

    #[test]
    fn saves_and_validations_follow_the_rules() {
        let log = run(&steps(8, 4), 7);
        assert_eq!(log.len(), 14);
        let saves: Vec<_> = log.iter().filter(|row| row.1).map(|row| row.0).collect();
        let validations: Vec<_> = log.iter().filter(|row| row.2).map(|row| row.0).collect();
        assert_eq!(saves, [3, 6, 7, 11, 13]);
        assert_eq!(validations, [2, 3, 5, 6, 7, 8, 11, 13]);
        assert_eq!(log.iter().filter(|row| row.3).map(|row| row.0).collect::<Vec<_>>(), [13]);
    }

    #[test]
    fn max_steps_ends_a_run_early_and_counts_epochs() {
        let config = StepSchedulerConfig { max_steps: Some(5), ..steps(8, 4) };
        assert_eq!(run(&config, 7).len(), 5);
        let config = StepSchedulerConfig { max_steps: Some(20), num_epochs: None, ..steps(8, 4) };
        let scheduler = StepScheduler::new(&config, Some(7), 1).unwrap();
        assert_eq!((scheduler.num_epochs, scheduler.total_steps()), (3, 20));
        let config = StepSchedulerConfig { max_steps: Some(100), ..steps(8, 4) };
        assert_eq!(StepScheduler::new(&config, Some(7), 1).unwrap().total_steps(), 14);
    }

    #[test]
    fn streamed_data_needs_a_number_of_steps() {
        let message = StepScheduler::new(&steps(8, 4), None, 1).unwrap_err().to_string();
        assert!(message.contains("step_scheduler.max_steps"), "{message}");
        let config = StepSchedulerConfig { max_steps: Some(5), ckpt_every_steps: None, ..steps(8, 4) };
        let scheduler = StepScheduler::new(&config, None, 1).unwrap();
        assert_eq!((scheduler.total_steps(), scheduler.num_epochs), (5, 2));
        assert!(!scheduler.is_ckpt_step(false) && scheduler.is_ckpt_step(true));
    }

    #[test]
    fn batch_sizes_must_divide() {
        let message = StepScheduler::new(&steps(10, 4), Some(7), 1).unwrap_err().to_string();
        assert!(message.contains("(4 * 1)"), "{message}");
        assert!(StepScheduler::new(&steps(8, 4), Some(7), 3).is_err());
        assert!(StepScheduler::new(&steps(8, 4), Some(0), 1).is_err());
        assert_eq!(StepScheduler::new(&steps(16, 4), Some(7), 2).unwrap().grad_acc_steps(), 2);
    }
}
