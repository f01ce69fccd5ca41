//! Axes with round marks, and where a value lies on the picture.

/// An axis of a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Axis {
    /// From 0 to `end` with a mark every `tick`.
    Linear {
        /// Its last value.
        end: f64,
        /// Distance of two marks.
        tick: f64,
    },
    /// From `10^first` to `10^last` with a mark at every power of ten.
    Logarithmic {
        /// Exponent of the first value.
        first: i32,
        /// Exponent of the last value.
        last: i32,
    },
}

/// Ratio of the largest to the smallest value from which an axis of losses is logarithmic.
const LOGARITHMIC_FROM: f64 = 30.0;

impl Axis {
    /// The axis that holds `largest` with at most `marks` marks at round numbers.
    pub(super) fn from_zero(largest: f64, marks: usize) -> Self {
        let largest = if largest > 0.0 && largest.is_finite() { largest } else { 1.0 };
        let rough = largest / marks as f64;
        let power = 10f64.powf(rough.log10().floor());
        let factor =
            [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.999).unwrap_or(10.0);
        let tick = factor * power;
        Axis::Linear { end: (largest / tick - 1e-9).ceil().max(1.0) * tick, tick }
    }

    /// The axis for losses: from 0, or logarithmic where they span more than [`LOGARITHMIC_FROM`].
    pub(super) fn of_losses(smallest: f64, largest: f64, marks: usize) -> Self {
        if smallest > 0.0 && largest / smallest > LOGARITHMIC_FROM {
            let (first, last) = (smallest.log10().floor() as i32, largest.log10().ceil() as i32);
            return Axis::Logarithmic { first, last };
        }
        Axis::from_zero(largest, marks)
    }

    /// Where a value lies: 0 at the axis' beginning, 1 at its end.
    pub(super) fn fraction(&self, value: f64) -> f64 {
        match *self {
            Axis::Linear { end, .. } => value / end,
            Axis::Logarithmic { first, last } => {
                let first = f64::from(first);
                (value.max(f64::MIN_POSITIVE).log10() - first).max(0.0) / (f64::from(last) - first)
            }
        }
    }

    /// The values that are marked.
    pub(super) fn marks(&self) -> Vec<f64> {
        match *self {
            Axis::Linear { end, tick } => {
                (0..=(end / tick).round() as usize).map(|i| i as f64 * tick).collect()
            }
            Axis::Logarithmic { first, last } => (first..=last).map(|power| 10f64.powi(power)).collect(),
        }
    }

    /// A mark's number with as many digits as neighbouring marks need.
    pub(super) fn label(&self, value: f64) -> String {
        let (end, tick) = match *self {
            Axis::Logarithmic { .. } => return format!("{value}"),
            Axis::Linear { end, tick } => (end, tick),
        };
        if value == 0.0 {
            return "0".to_owned();
        }
        if end < 1e-2 {
            let text = format!("{value:.2e}");
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            return format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'));
        }
        let digits = (0..6).find(|&d| {
            let scaled = tick * 10f64.powi(d);
            (scaled - scaled.round()).abs() < 1e-6
        });
        format!("{value:.*}", digits.unwrap_or(6) as usize)
    }
}

/// An axis laid between two places of the picture, in pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start: f64,
    pub(super) end: f64,
    pub(super) axis: Axis,
}

impl Span {
    pub(super) fn place(&self, value: f64) -> f64 {
        self.start + (self.end - self.start) * self.axis.fraction(value)
    }
}

/// A part of the picture with steps on its horizontal axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panel {
    pub(super) x: Span,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

impl Panel {
    pub(super) fn vertical(&self, axis: Axis) -> Span {
        Span { start: self.bottom, end: self.top, axis }
    }

    pub(super) fn points(&self, data: &[(f64, f64)], y: &Span) -> Vec<(f64, f64)> {
        let finite = data.iter().filter(|point| point.1.is_finite());
        finite.map(|&(step, value)| (self.x.place(step), y.place(value))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_numbers() {
        let losses = Axis::of_losses(0.002, 6.5, 6);
        assert_eq!(losses, Axis::Logarithmic { first: -3, last: 1 });
        assert_eq!(
            losses.marks().into_iter().map(|m| losses.label(m)).collect::<Vec<_>>(),
            ["0.001", "0.01", "0.1", "1", "10"]
        );
        assert!((losses.fraction(0.1) - 0.5).abs() < 1e-9);
        assert_eq!(Axis::of_losses(1.0, 3.17, 6), Axis::from_zero(3.17, 6));
        assert_eq!(Axis::from_zero(600.0, 8), Axis::Linear { end: 600.0, tick: 100.0 });
        assert_eq!(Axis::from_zero(3.17, 6), Axis::Linear { end: 4.0, tick: 1.0 });
        assert_eq!(Axis::from_zero(1.0, 8), Axis::Linear { end: 1.0, tick: 0.2 });
        let rate = Axis::from_zero(2e-3, 3);
        assert_eq!(
            rate.marks().into_iter().map(|mark| rate.label(mark)).collect::<Vec<_>>(),
            ["0", "1e-3", "2e-3"]
        );
    }
}
