//! Steps that would harm the weights: losses that are no number, and losses far above those before.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::recipe::{OnLossSpike, OnNonFinite, StepSchedulerConfig};

/// Losses that a spike is measured against.
const WINDOW: usize = 128;
/// Fewer losses tell nothing of their spread.
const FEWEST: usize = 32;
/// The spread is taken to be at least this share of the mean, so that a flat loss has no spikes.
const LEAST_SPREAD: f64 = 0.01;

/// What one micro-batch of a step gave.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct BatchLoss {
    /// Rows of the data set.
    pub(crate) rows: Vec<usize>,
    /// Sum of the loss over its label tokens.
    pub(crate) loss_sum: f64,
    /// Its label tokens.
    pub(crate) label_tokens: usize,
}

/// What a step gave, before it is taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepOutcome<'a> {
    /// The step.
    pub(crate) step: usize,
    /// Token mean of the loss.
    pub(crate) loss: f64,
    /// L2 norm of the gradient.
    pub(crate) grad_norm: f64,
    /// Its micro-batches.
    pub(crate) batches: &'a [BatchLoss],
}

/// What is done with a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is taken.
    Take,
    /// It is taken, and this is said.
    Report(String),
    /// It changes nothing, for this reason, and this is said.
    Skip(&'static str, String),
}

/// What is remembered from step to step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct GuardState {
    /// Steps that changed nothing.
    pub(crate) skipped_steps: usize,
    /// The last finite losses, oldest first; in f32, whose digits survive a JSON file.
    recent_losses: VecDeque<f32>,
}

/// Judges every step before it is taken.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    on_non_finite: OnNonFinite,
    on_loss_spike: OnLossSpike,
    sigma: f64,
    state: GuardState,
}

impl Guard {
    /// A guard that remembers `state`.
    pub(crate) fn new(config: &StepSchedulerConfig, state: GuardState) -> Self {
        Self {
            on_non_finite: config.on_non_finite,
            on_loss_spike: config.on_loss_spike,
            sigma: config.loss_spike_sigma,
            state,
        }
    }

    /// What is remembered.
    pub(crate) fn state(&self) -> &GuardState {
        &self.state
    }

    /// Decides what is done with a step.
    ///
    /// # Errors
    /// [`Error::NotFinite`] or [`Error::LossSpike`] where the recipe asks to stop.
    pub(crate) fn judge(&mut self, outcome: &StepOutcome<'_>) -> Result<Verdict> {
        let StepOutcome { step, loss, grad_norm, batches } = *outcome;
        if !loss.is_finite() || !grad_norm.is_finite() {
            let rows = culprits(batches);
            return match self.on_non_finite {
                OnNonFinite::Stop => Err(Error::NotFinite { step, loss, grad_norm, rows }),
                OnNonFinite::Skip => Ok(self.skip(
                    "non_finite",
                    format!(
                        "step {step} skipped: the loss is {loss} and the gradient's norm {grad_norm}; rows {rows:?}"
                    ),
                )),
            };
        }
        let limit = self.state.spike_limit(self.sigma);
        self.state.remember(loss);
        let Some(limit) = limit.filter(|&limit| loss > limit) else { return Ok(Verdict::Take) };
        let rows = highest(batches);
        let what = format!("the loss {loss} is above {limit}, the highest that is usual now; rows {rows:?}");
        match self.on_loss_spike {
            OnLossSpike::Report => Ok(Verdict::Report(format!("step {step}: {what}"))),
            OnLossSpike::Skip => Ok(self.skip("loss_spike", format!("step {step} skipped: {what}"))),
            OnLossSpike::Stop => Err(Error::LossSpike { step, loss, limit, rows }),
        }
    }

    fn skip(&mut self, reason: &'static str, message: String) -> Verdict {
        self.state.skipped_steps += 1;
        Verdict::Skip(reason, message)
    }
}

impl GuardState {
    /// The loss at which a spike begins: `sigma` standard deviations above the mean of the last losses; `None` while
    /// there are too few.
    fn spike_limit(&self, sigma: f64) -> Option<f64> {
        let count = self.recent_losses.len();
        if count < FEWEST {
            return None;
        }
        let losses = || self.recent_losses.iter().map(|&loss| f64::from(loss));
        let mean = losses().sum::<f64>() / count as f64;
        let variance = losses().map(|loss| (loss - mean).powi(2)).sum::<f64>() / count as f64;
        Some(mean + sigma * variance.sqrt().max(LEAST_SPREAD * mean.abs()))
    }

    /// Spikes are remembered as well, so that a loss that stays high is usual after a while.
    fn remember(&mut self, loss: f64) {
        if self.recent_losses.len() == WINDOW {
            self.recent_losses.pop_front();
        }
        self.recent_losses.push_back((loss as f32).min(f32::MAX));
    }
}

/// Rows of the micro-batches whose own loss is no number; where all are finite, only the gradient is to blame, which
/// any of them may have brought.
fn culprits(batches: &[BatchLoss]) -> Vec<usize> {
    let rows = |of: &dyn Fn(&&BatchLoss) -> bool| -> Vec<usize> {
        batches.iter().filter(of).flat_map(|batch| batch.rows.iter().copied()).collect()
    };
    let own = rows(&|batch| !batch.loss_sum.is_finite());
    if own.is_empty() { rows(&|_| true) } else { own }
}

/// Rows of the micro-batch with the highest loss.
fn highest(batches: &[BatchLoss]) -> Vec<usize> {
    let mean = |batch: &&BatchLoss| batch.loss_sum / batch.label_tokens.max(1) as f64;
    let highest = batches.iter().max_by(|a, b| mean(a).total_cmp(&mean(b)));
    highest.map_or_else(Vec::new, |batch| batch.rows.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(on_non_finite: OnNonFinite, on_loss_spike: OnLossSpike) -> Guard {
        Guard { on_non_finite, on_loss_spike, sigma: 6.0, state: GuardState::default() }
    }

    fn batches() -> [BatchLoss; 2] {
        [
            BatchLoss { rows: vec![3, 1], loss_sum: 8.0, label_tokens: 4 },
            BatchLoss { rows: vec![9], loss_sum: 50.0, label_tokens: 5 },
        ]
    }

    fn outcome(step: usize, loss: f64, batches: &[BatchLoss]) -> StepOutcome<'_> {
        StepOutcome { step, loss, grad_norm: 1.0, batches }
    }

    #[test]
    fn only_a_loss_far_above_the_last_ones_is_a_spike() {
        let mut guard = guard(OnNonFinite::Stop, OnLossSpike::Skip);
        let batches = batches();
        for step in 0..40 {
            let loss = 3.0 + 0.1 * f64::from(step % 2) - 0.01 * f64::from(step);
            assert_eq!(guard.judge(&outcome(step as usize, loss, &batches)).unwrap(), Verdict::Take);
        }
        assert_eq!(guard.judge(&outcome(40, 3.2, &batches)).unwrap(), Verdict::Take);
        let verdict = guard.judge(&outcome(41, 9.0, &batches)).unwrap();
        let Verdict::Skip("loss_spike", message) = verdict else { panic!("{verdict:?}") };
        assert!(message.ends_with("rows [9]"), "{message}");
        assert_eq!(guard.state().skipped_steps, 1);
    }

    #[test]
    fn the_first_losses_and_a_flat_loss_have_no_spikes() {
        let mut guard = guard(OnNonFinite::Stop, OnLossSpike::Stop);
        let batches = batches();
        for step in 0..FEWEST {
            guard.judge(&outcome(step, if step == 5 { 100.0 } else { 2.0 }, &batches)).unwrap();
        }
        let mut flat = guard.clone();
        flat.state = GuardState::default();
        for step in 0..FEWEST {
            flat.judge(&outcome(step, 2.0, &batches)).unwrap();
        }
        assert_eq!(flat.judge(&outcome(99, 2.05, &batches)).unwrap(), Verdict::Take);
        let error = flat.judge(&outcome(99, 2.6, &batches)).unwrap_err();
        assert!(matches!(error, Error::LossSpike { step: 99, .. }), "{error}");
    }

    #[test]
    fn a_loss_that_stays_high_becomes_usual() {
        let mut guard = guard(OnNonFinite::Stop, OnLossSpike::Skip);
        let batches = batches();
        for step in 0..200 {
            let loss = if step < 100 { 2.0 } else { 4.0 };
            guard.judge(&outcome(step, loss, &batches)).unwrap();
        }
        assert!(guard.state().skipped_steps < 20, "{}", guard.state().skipped_steps);
    }

    #[test]
    fn a_loss_that_is_no_number_names_the_rows_that_gave_it() {
        let mut batches = batches();
        batches[1].loss_sum = f64::NAN;
        let nan = outcome(7, f64::NAN, &batches);
        let error = guard(OnNonFinite::Stop, OnLossSpike::Report).judge(&nan).unwrap_err();
        assert!(matches!(&error, Error::NotFinite { step: 7, rows, .. } if rows == &[9]), "{error}");
        let mut skipping = guard(OnNonFinite::Skip, OnLossSpike::Report);
        let verdict = skipping.judge(&nan).unwrap();
        assert!(
            matches!(&verdict, Verdict::Skip("non_finite", text) if text.ends_with("rows [9]")),
            "{verdict:?}"
        );
        // A gradient that overflows under finite losses may come from any row.
        let finite = super::tests::batches();
        let overflow = StepOutcome { grad_norm: f64::INFINITY, ..outcome(8, 1.0, &finite) };
        let Verdict::Skip(_, text) = skipping.judge(&overflow).unwrap() else { panic!("skipped") };
        assert!(text.ends_with("rows [3, 1, 9]"), "{text}");
        assert_eq!((skipping.state().skipped_steps, skipping.state().recent_losses.len()), (2, 0));
    }
}
