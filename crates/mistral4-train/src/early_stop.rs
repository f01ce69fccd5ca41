//! The end of a run whose held-out loss no longer falls.

use serde::{Deserialize, Serialize};

use crate::recipe::EarlyStoppingConfig;

/// What is remembered from validation to validation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct EarlyStopState {
    /// The lowest loss so far; in f32, whose digits survive a JSON file.
    best: Option<f32>,
    /// Validations since then.
    waited: usize,
}

/// Judges every validation.
#[derive(Debug, Clone)]
pub(crate) struct EarlyStop {
    config: Option<EarlyStoppingConfig>,
    /// The set whose loss counts.
    monitor: String,
    state: EarlyStopState,
}

impl EarlyStop {
    /// A judge that remembers `state`; without a configuration it never stops a run. `default_monitor` is the set that
    /// decides which checkpoint is best.
    pub(crate) fn new(
        config: Option<EarlyStoppingConfig>,
        default_monitor: &str,
        state: EarlyStopState,
    ) -> Self {
        let monitor = config.as_ref().and_then(|config| config.monitor.clone());
        Self { config, monitor: monitor.unwrap_or_else(|| default_monitor.to_owned()), state }
    }

    /// What is remembered.
    pub(crate) fn state(&self) -> EarlyStopState {
        self.state
    }

    /// Takes note of held-out losses by the name of their set.
    pub(crate) fn see(&mut self, losses: &[(String, f64)]) {
        let Some(config) = &self.config else { return };
        let of_set = losses.iter().find(|(name, _)| *name == self.monitor);
        let only = if losses.len() == 1 { losses.first() } else { None };
        let Some(&(_, loss)) = of_set.or(only) else { return };
        let fell = self.state.best.is_none_or(|best| loss < f64::from(best) - config.min_delta);
        if fell && loss.is_finite() {
            self.state = EarlyStopState { best: Some(loss as f32), waited: 0 };
        } else {
            self.state.waited += 1;
        }
    }

    /// Why the run should end, if it should.
    pub(crate) fn verdict(&self) -> Option<String> {
        let config = self.config.as_ref().filter(|config| self.state.waited >= config.patience)?;
        let (monitor, patience) = (&self.monitor, config.patience);
        let best = self
            .state
            .best
            .map_or_else(|| "none was finite".to_owned(), |best| format!("the lowest is {best}"));
        Some(format!(
            "stopped early: the held-out loss of `{monitor}` has not fallen for {patience} validations ({best})"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(patience: usize, min_delta: f64, monitor: Option<&str>) -> EarlyStop {
        let monitor = monitor.map(str::to_owned);
        EarlyStop::new(
            Some(EarlyStoppingConfig { patience, min_delta, monitor }),
            "default",
            EarlyStopState::default(),
        )
    }

    fn losses(values: &[(&str, f64)]) -> Vec<(String, f64)> {
        values.iter().map(|(name, loss)| ((*name).to_owned(), *loss)).collect()
    }

    #[test]
    fn a_run_ends_when_its_loss_has_not_fallen_for_long_enough() {
        let mut stop = judge(2, 0.1, None);
        for (loss, ends) in [(3.0, false), (2.95, false), (2.85, false), (f64::NAN, false), (2.80, true)] {
            stop.see(&losses(&[("default", loss)]));
            assert_eq!(stop.verdict().is_some(), ends, "{loss}");
        }
        assert!(stop.verdict().unwrap().contains("the lowest is 2.85"));
        let again = EarlyStop { state: stop.state(), ..judge(2, 0.1, None) };
        assert!(again.verdict().is_some(), "a resumed run has ended already");
    }

    #[test]
    fn the_set_that_is_named_counts() {
        let mut stop = judge(1, 0.0, Some("b"));
        stop.see(&losses(&[("a", 1.0), ("b", 2.0)]));
        stop.see(&losses(&[("a", 5.0), ("b", 1.0)]));
        assert!(stop.verdict().is_none());
        stop.see(&losses(&[("a", 0.5), ("b", 1.0)]));
        assert!(stop.verdict().is_some());
        let mut never = EarlyStop::new(None, "default", EarlyStopState::default());
        (0..99).for_each(|_| never.see(&losses(&[("default", 1.0)])));
        assert!(never.verdict().is_none());
    }
}
