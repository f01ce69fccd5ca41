//! The picture of a run: loss, learning rate and held-out results over the steps, as SVG.

use std::fmt::Write as _;
use std::path::Path;

use crate::error::{Error, Result};
use crate::metrics::{StepMetrics, ValidationMetrics};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 84.0;
const TOP: f64 = 118.0;
const LOSS_HEIGHT: f64 = 330.0;
const LR_HEIGHT: f64 = 96.0;
const GAP: f64 = 46.0;
const BOTTOM: f64 = 58.0;

const INK: &str = "#1b2733";
const FAINT: &str = "#5d6b7a";
const GRID: &str = "#e3e8ee";
const LOSS: &str = "#2563c9";
const HELD_OUT: &str = "#d9480f";
const ACCURACY: &str = "#2b8a3e";
const RATE: &str = "#7048b6";

/// A run to draw.
#[derive(Debug, Clone, Copy)]
pub struct RunPlot<'a> {
    /// What was trained.
    pub title: &'a str,
    /// A smaller line below, such as the model's size and the time taken.
    pub subtitle: &'a str,
    /// Every step.
    pub steps: &'a [StepMetrics],
    /// Every validation.
    pub validations: &'a [ValidationMetrics],
}

impl RunPlot<'_> {
    /// Draws and writes the picture.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.svg()).map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// The picture: above, loss of each step, smoothed loss, held-out loss and accuracy; below, the learning rate.
    pub fn svg(&self) -> String {
        let last = self.steps.iter().map(|s| s.step).chain(self.validations.iter().map(|v| v.step)).max();
        let steps = Axis::from_zero(last.unwrap_or(0).max(1) as f64, 8);
        let x = Span { start: LEFT, end: WIDTH - RIGHT, axis: steps };
        let upper = Panel { x, top: TOP, bottom: TOP + LOSS_HEIGHT };
        let lower = Panel { x, top: upper.bottom + GAP, bottom: upper.bottom + GAP + LR_HEIGHT };
        let height = lower.bottom + BOTTOM;
        let mut svg = Svg::new(height);
        svg.text(LEFT, 32.0, &Text { size: 20.0, weight: 600, ..Text::default() }, self.title);
        svg.text(LEFT, 54.0, &Text { size: 13.0, fill: FAINT, ..Text::default() }, self.subtitle);
        self.draw_loss(&mut svg, &upper);
        self.draw_rate(&mut svg, &lower);
        svg.text(
            (LEFT + WIDTH - RIGHT) / 2.0,
            height - 14.0,
            &Text { anchor: "middle", fill: FAINT, ..Text::default() },
            "optimizer step",
        );
        svg.finish()
    }

    fn draw_loss(&self, svg: &mut Svg, panel: &Panel) {
        let raw: Vec<(f64, f64)> = self.steps.iter().map(|s| (s.step as f64, s.loss)).collect();
        let smooth = smoothed(&raw);
        let held_out: Vec<(f64, f64)> =
            self.validations.iter().map(|v| (v.step as f64, v.val_loss)).collect();
        let losses = || raw.iter().chain(&held_out).map(|p| p.1).filter(|y| y.is_finite());
        let (smallest, largest) = (losses().fold(f64::INFINITY, f64::min), losses().fold(0.0, f64::max));
        let loss = panel.vertical(Axis::of_losses(smallest, largest, 6));
        svg.frame(panel, &loss, "loss (nats per token)", Side::Left, INK);
        svg.line(&panel.points(&raw, &loss), LOSS, 1.0, 0.3);
        svg.line(&panel.points(&smooth, &loss), LOSS, 2.4, 1.0);
        let mut legend = vec![(LOSS, 0.35, "training loss"), (LOSS, 1.0, "smoothed")];
        if !held_out.is_empty() {
            svg.line(&panel.points(&held_out, &loss), HELD_OUT, 1.6, 1.0);
            svg.dots(&panel.points(&held_out, &loss), HELD_OUT);
            legend.push((HELD_OUT, 1.0, "held-out loss"));
        }
        let accuracy: Vec<(f64, f64)> =
            self.validations.iter().filter_map(|v| Some((v.step as f64, v.accuracy? * 100.0))).collect();
        if let Some(&(step, best)) = accuracy.last() {
            let percent = panel.vertical(Axis::Linear { end: 100.0, tick: 20.0 });
            svg.frame(panel, &percent, "held-out accuracy (%)", Side::Right, ACCURACY);
            let points = panel.points(&accuracy, &percent);
            svg.line(&points, ACCURACY, 1.6, 1.0);
            svg.dots(&points, ACCURACY);
            let at = (panel.x.place(step), percent.place(best));
            let label = Text { anchor: "end", fill: ACCURACY, weight: 600, ..Text::default() };
            svg.text(at.0 - 8.0, at.1 + 20.0, &label, &format!("{best:.1} %"));
            legend.push((ACCURACY, 1.0, "held-out accuracy"));
        }
        svg.legend(panel, &legend);
    }

    fn draw_rate(&self, svg: &mut Svg, panel: &Panel) {
        let rates: Vec<(f64, f64)> = self.steps.iter().map(|s| (s.step as f64, s.lr)).collect();
        let largest = rates.iter().map(|p| p.1).fold(0.0, f64::max);
        let y = panel.vertical(Axis::from_zero(if largest > 0.0 { largest } else { 1.0 }, 3));
        svg.frame(panel, &y, "learning rate", Side::Left, INK);
        svg.step_labels(panel);
        svg.line(&panel.points(&rates, &y), RATE, 2.0, 1.0);
    }
}

/// Mean over a window about each point, a fiftieth of the run wide, narrower at the ends so that it stays centred.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    let radius = points.len() / 100;
    let mean = |i: usize| {
        let radius = radius.min(i).min(points.len() - 1 - i);
        let window = &points[i - radius..=i + radius];
        window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// An axis of a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Axis {
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
    fn from_zero(largest: f64, marks: usize) -> Self {
        let rough = largest / marks as f64;
        let power = 10f64.powf(rough.log10().floor());
        let factor =
            [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.999).unwrap_or(10.0);
        let tick = factor * power;
        Axis::Linear { end: (largest / tick - 1e-9).ceil().max(1.0) * tick, tick }
    }

    /// The axis for losses: from 0, or logarithmic where they span more than [`LOGARITHMIC_FROM`].
    fn of_losses(smallest: f64, largest: f64, marks: usize) -> Self {
        if smallest > 0.0 && largest / smallest > LOGARITHMIC_FROM {
            let (first, last) = (smallest.log10().floor() as i32, largest.log10().ceil() as i32);
            return Axis::Logarithmic { first, last };
        }
        Axis::from_zero(if largest > 0.0 { largest } else { 1.0 }, marks)
    }

    /// Where a value lies: 0 at the axis' beginning, 1 at its end.
    fn fraction(&self, value: f64) -> f64 {
        match *self {
            Axis::Linear { end, .. } => value / end,
            Axis::Logarithmic { first, last } => {
                let first = f64::from(first);
                (value.max(f64::MIN_POSITIVE).log10() - first).max(0.0) / (f64::from(last) - first)
            }
        }
    }

    fn marks(&self) -> Vec<f64> {
        match *self {
            Axis::Linear { end, tick } => {
                (0..=(end / tick).round() as usize).map(|i| i as f64 * tick).collect()
            }
            Axis::Logarithmic { first, last } => (first..=last).map(|power| 10f64.powi(power)).collect(),
        }
    }

    /// A mark's number with as many digits as neighbouring marks need.
    fn label(&self, value: f64) -> String {
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
struct Span {
    start: f64,
    end: f64,
    axis: Axis,
}

impl Span {
    fn place(&self, value: f64) -> f64 {
        self.start + (self.end - self.start) * self.axis.fraction(value)
    }
}

struct Panel {
    x: Span,
    top: f64,
    bottom: f64,
}

impl Panel {
    fn vertical(&self, axis: Axis) -> Span {
        Span { start: self.bottom, end: self.top, axis }
    }

    fn points(&self, data: &[(f64, f64)], y: &Span) -> Vec<(f64, f64)> {
        let finite = data.iter().filter(|point| point.1.is_finite());
        finite.map(|&(step, value)| (self.x.place(step), y.place(value))).collect()
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

struct Text {
    size: f64,
    weight: u16,
    fill: &'static str,
    anchor: &'static str,
}

impl Default for Text {
    fn default() -> Self {
        Self { size: 12.5, weight: 400, fill: INK, anchor: "start" }
    }
}

/// SVG elements, written one after another.
struct Svg(String);

impl Svg {
    fn new(height: f64) -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" role=\"img\" font-family=\"Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
        ))
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        self.0.write_fmt(element).expect("writing to a string does not fail");
        self.0.push('\n');
    }

    fn text(&mut self, x: f64, y: f64, style: &Text, text: &str) {
        let Text { size, weight, fill, anchor } = style;
        let text = escaped(text);
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" font-weight=\"{weight}\" fill=\"{fill}\" \
             text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// Marks, their numbers and the name of a vertical axis; the left one draws the grid as well.
    fn frame(&mut self, panel: &Panel, y: &Span, name: &str, side: Side, fill: &'static str) {
        let (x, anchor, gap) = match side {
            Side::Left => (panel.x.start, "end", -10.0),
            Side::Right => (panel.x.end, "start", 10.0),
        };
        if side == Side::Left {
            let (top, bottom) = (panel.top, panel.bottom);
            for x in panel.x.axis.marks().into_iter().map(|mark| panel.x.place(mark)) {
                self.push(format_args!(
                    "<line x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"{GRID}\"/>"
                ));
            }
        }
        for mark in y.axis.marks() {
            let at = y.place(mark);
            if side == Side::Left {
                let (x1, x2) = (panel.x.start, panel.x.end);
                let stroke = if mark == 0.0 { FAINT } else { GRID };
                self.push(format_args!(
                    "<line x1=\"{x1:.1}\" y1=\"{at:.1}\" x2=\"{x2:.1}\" y2=\"{at:.1}\" stroke=\"{stroke}\"/>"
                ));
            }
            let style = Text { anchor, fill: if fill == INK { FAINT } else { fill }, ..Text::default() };
            self.text(x + gap, at + 4.0, &style, &y.axis.label(mark));
        }
        let style = Text {
            weight: 600,
            anchor: if side == Side::Left { "start" } else { "end" },
            fill,
            ..Text::default()
        };
        self.text(x, panel.top - 10.0, &style, name);
    }

    fn step_labels(&mut self, panel: &Panel) {
        for mark in panel.x.axis.marks() {
            let style = Text { anchor: "middle", fill: FAINT, ..Text::default() };
            self.text(panel.x.place(mark), panel.bottom + 20.0, &style, &panel.x.axis.label(mark));
        }
    }

    fn line(&mut self, points: &[(f64, f64)], stroke: &str, width: f64, opacity: f64) {
        if points.len() < 2 {
            return;
        }
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "{x:.1},{y:.1} ");
        }
        let path = path.trim_end();
        self.push(format_args!(
            "<polyline fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" \
             stroke-linejoin=\"round\" points=\"{path}\"/>"
        ));
    }

    fn dots(&mut self, points: &[(f64, f64)], fill: &str) {
        for (x, y) in points {
            self.push(format_args!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.4\" fill=\"{fill}\" stroke=\"#ffffff\" stroke-width=\"1.2\"/>"
            ));
        }
    }

    /// Names of the lines, in one row between the title and a panel.
    fn legend(&mut self, panel: &Panel, entries: &[(&str, f64, &str)]) {
        let mut x = panel.x.start;
        let y = panel.top - 42.0;
        for (stroke, opacity, name) in entries {
            self.push(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"{stroke}\" stroke-width=\"2.4\" \
                 stroke-opacity=\"{opacity}\"/>",
                x + 22.0
            ));
            self.text(x + 28.0, y + 4.0, &Text { fill: FAINT, ..Text::default() }, name);
            x += name.chars().count() as f64 * 6.2 + 52.0;
        }
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::timestamp;

    fn run(steps: usize, accuracy: bool) -> (Vec<StepMetrics>, Vec<ValidationMetrics>) {
        let noise = |i: usize| ((i * 7919 + 13) % 101) as f64 / 101.0 - 0.5;
        let losses = (0..steps).map(|i| StepMetrics {
            step: i,
            epoch: 0,
            timestamp: timestamp(),
            loss: 0.05 + 3.1 * (-(i as f64) / 120.0).exp() + 0.25 * noise(i) * (-(i as f64) / 300.0).exp(),
            grad_norm: 1.0,
            lr: if i < 50 {
                2e-3 * i as f64 / 50.0
            } else {
                1e-3 * (1.0 + (i as f64 / steps as f64 * std::f64::consts::PI).cos())
            },
            mem: 0.4,
            tps: 9000.0,
            tps_per_gpu: 9000.0,
            num_tokens_per_step: 1000,
            num_label_tokens: 100,
            more: serde_json::Map::new(),
        });
        let validations = (1..=steps / 60).map(|i| ValidationMetrics {
            step: i * 60 - 1,
            epoch: 0,
            timestamp: timestamp(),
            val_loss: 0.1 + 2.9 * (-(i as f64) / 2.0).exp(),
            lr: 1e-3,
            num_label_tokens: 500,
            mem: 0.4,
            accuracy: accuracy.then(|| 0.97 - 0.85 * (-(i as f64) / 2.2).exp()),
        });
        (losses.collect(), validations.collect())
    }

    fn svg(steps: &[StepMetrics], validations: &[ValidationMetrics]) -> String {
        RunPlot { title: "Digits <& more>", subtitle: "1.2 M parameters", steps, validations }.svg()
    }

    #[test]
    fn a_run_is_drawn_with_its_axes() {
        let (steps, validations) = run(600, true);
        let svg = svg(&steps, &validations);
        for part in [
            "Digits &lt;&amp; more&gt;",
            "optimizer step",
            "loss (nats per token)",
            "learning rate",
            "accuracy (%)",
        ] {
            assert!(svg.contains(part), "{part}");
        }
        assert_eq!(svg.matches("<polyline").count(), 5);
        assert_eq!(svg.matches("<circle").count(), 20);
        assert!(!svg.contains("NaN"));
    }

    #[test]
    fn empty_short_and_broken_runs_are_drawn_too() {
        let (mut steps, _) = run(3, false);
        steps[1].loss = f64::NAN;
        for count in 0..=3 {
            let svg = svg(&steps[..count], &[]);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.ends_with("</svg>\n"));
        }
    }

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

    #[test]
    fn smoothing_keeps_a_constant() {
        let flat: Vec<(f64, f64)> = (0..500).map(|i| (f64::from(i), 2.0)).collect();
        assert!(smoothed(&flat).iter().all(|&(_, y)| (y - 2.0).abs() < 1e-12));
    }
}
