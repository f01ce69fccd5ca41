//! Pictures of a run: loss, learning rate, throughput over the steps, and the load of the experts; SVG or PNG.

mod axis;
mod picture;
mod raster;

use std::path::Path;

use crate::error::{Error, Result};
use crate::metrics::{self, ExpertLoad, StepMetrics, ValidationMetrics};
use axis::{Axis, Panel, Span};
use picture::{Anchor, FAINT, INK, Picture, Rgb, Shape, Style};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 84.0;
const TOP: f64 = 76.0;
/// Room above a panel for its name, and for the names of its lines where it has several.
const NAME: f64 = 30.0;
const LEGEND: f64 = 24.0;
const BOTTOM: f64 = 58.0;

const GRID: Rgb = [0xe3, 0xe8, 0xee];
const LOSS: Rgb = [0x25, 0x63, 0xc9];
const HELD_OUT: [Rgb; 3] = [[0xd9, 0x48, 0x0f], [0x0b, 0x72, 0x85], [0xb0, 0x2a, 0x5b]];
const ACCURACY: Rgb = [0x2b, 0x8a, 0x3e];
const RATE: Rgb = [0x70, 0x48, 0xb6];
const SPEED: Rgb = [0x0b, 0x72, 0x85];
/// An expert without tokens, with its even share, and with three times that.
const HEAT: [Rgb; 3] = [[0x18, 0x64, 0xab], [0xf1, 0xf3, 0xf6], [0xd9, 0x48, 0x0f]];

/// A part of a run's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// Loss of each step, smoothed loss, held-out losses and accuracy.
    Loss,
    /// Learning rate.
    LearningRate,
    /// Tokens a second.
    Throughput,
    /// Load of each expert of each layer.
    ExpertLoad,
}

impl Curve {
    /// Every part, with its name on the command line.
    pub const ALL: [(&str, Curve); 4] = [
        ("loss", Curve::Loss),
        ("lr", Curve::LearningRate),
        ("throughput", Curve::Throughput),
        ("load", Curve::ExpertLoad),
    ];
}

/// A run to draw.
#[derive(Debug, Clone, Copy)]
pub struct RunPlot<'a> {
    /// What was trained.
    pub title: &'a str,
    /// A smaller line below, such as the model's size and the time taken.
    pub subtitle: &'a str,
    /// Every step.
    pub steps: &'a [StepMetrics],
    /// Every validation, by the name of the set.
    pub validations: &'a [(String, Vec<ValidationMetrics>)],
    /// The load of the experts at a step.
    pub load: Option<&'a ExpertLoad>,
    /// What is drawn, from top to bottom.
    pub curves: &'a [Curve],
}

/// Draws a run from the files in its folder.
///
/// # Errors
/// A folder without `training.jsonl`, and a file that cannot be written.
pub fn plot_run(folder: &Path, curves: &[Curve], output: &Path) -> Result<()> {
    let steps: Vec<StepMetrics> = metrics::read(&folder.join("training.jsonl"))?;
    let mut validations = Vec::new();
    for (name, path) in metrics::validation_files(folder)? {
        validations.push((name, metrics::read(&path)?));
    }
    let load_path = folder.join("expert_load.jsonl");
    let loads: Vec<ExpertLoad> = if load_path.is_file() { metrics::read(&load_path)? } else { Vec::new() };
    let whole = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let title = whole.file_name().map_or_else(|| "training".into(), |name| name.to_string_lossy());
    let tokens: usize = steps.iter().map(|step| step.num_tokens_per_step).sum();
    let subtitle = format!("{} steps, {tokens} tokens", steps.len());
    RunPlot {
        title: &title,
        subtitle: &subtitle,
        steps: &steps,
        validations: &validations,
        load: loads.last(),
        curves,
    }
    .write(output)
}

impl RunPlot<'_> {
    /// Draws and writes the picture: PNG for a name that ends in `.png`, else SVG.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let is_png = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("png"));
        let bytes = if is_png { self.picture().png() } else { self.svg().into_bytes() };
        std::fs::write(path, bytes).map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// The picture as SVG.
    pub fn svg(&self) -> String {
        self.picture().svg()
    }

    fn picture(&self) -> Picture {
        let validations = self.validations.iter().flat_map(|(_, set)| set).map(|v| v.step);
        let last = self.steps.iter().map(|s| s.step).chain(validations).max();
        let x = Span {
            start: LEFT,
            end: WIDTH - RIGHT,
            axis: Axis::from_zero(last.unwrap_or(0).max(1) as f64, 8),
        };
        let mut picture = Picture { width: WIDTH, height: 0.0, shapes: Vec::new() };
        picture.text(LEFT, 32.0, Style { size: 20.0, bold: true, ..Style::default() }, self.title);
        picture.text(LEFT, 54.0, Style { size: 13.0, fill: FAINT, ..Style::default() }, self.subtitle);
        let mut y = TOP;
        let mut lowest: Option<Panel> = None;
        for curve in self.curves {
            if *curve == Curve::Loss {
                y += LEGEND;
            }
            let height = match curve {
                Curve::Loss => 330.0,
                Curve::LearningRate | Curve::Throughput => 96.0,
                Curve::ExpertLoad => {
                    self.load.map_or(20.0, |load| (18.0 * load.layers.len() as f64).clamp(40.0, 460.0))
                }
            };
            let panel = Panel { x, top: y + NAME, bottom: y + NAME + height };
            match curve {
                Curve::Loss => self.draw_loss(&mut picture, &panel),
                Curve::LearningRate => {
                    let rates = self.steps.iter().map(|s| (s.step as f64, s.lr)).collect();
                    draw_line(&mut picture, &panel, "learning rate", rates, RATE);
                }
                Curve::Throughput => {
                    let speeds = self.steps.iter().map(|s| (s.step as f64, s.tps)).collect();
                    draw_line(&mut picture, &panel, "tokens per second", speeds, SPEED);
                }
                Curve::ExpertLoad => draw_load(&mut picture, &panel, self.load),
            }
            if *curve != Curve::ExpertLoad {
                lowest = Some(panel);
            }
            y = panel.bottom + if *curve == Curve::ExpertLoad { 28.0 } else { 18.0 };
        }
        if let Some(panel) = lowest {
            step_labels(&mut picture, &panel);
        }
        picture.height = y + BOTTOM - 24.0;
        picture
    }

    fn draw_loss(&self, picture: &mut Picture, panel: &Panel) {
        let raw: Vec<(f64, f64)> = self.steps.iter().map(|s| (s.step as f64, s.loss)).collect();
        let held_out: Vec<(&str, Vec<(f64, f64)>)> = self
            .validations
            .iter()
            .filter(|(_, set)| !set.is_empty())
            .map(|(name, set)| (name.as_str(), set.iter().map(|v| (v.step as f64, v.val_loss)).collect()))
            .collect();
        let losses = || {
            raw.iter().chain(held_out.iter().flat_map(|set| &set.1)).map(|p| p.1).filter(|y| y.is_finite())
        };
        let (smallest, largest) = (losses().fold(f64::INFINITY, f64::min), losses().fold(0.0, f64::max));
        let loss = panel.vertical(Axis::of_losses(smallest, largest, 6));
        frame(picture, panel, &loss, "loss (nats per token)", Side::Left, INK);
        picture.line(panel.points(&raw, &loss), LOSS, 1.0, 0.3);
        picture.line(panel.points(&smoothed(&raw), &loss), LOSS, 2.4, 1.0);
        let mut names = vec![(LOSS, 0.35, "training loss".to_owned()), (LOSS, 1.0, "smoothed".to_owned())];
        for (i, (name, points)) in held_out.iter().enumerate() {
            let color = HELD_OUT[i % HELD_OUT.len()];
            let points = panel.points(points, &loss);
            picture.line(points.clone(), color, 1.6, 1.0);
            picture.dots(&points, color);
            let name = if held_out.len() == 1 {
                "held-out loss".to_owned()
            } else {
                format!("held-out loss, {name}")
            };
            names.push((color, 1.0, name));
        }
        let first = self.validations.first().map_or(&[][..], |(_, set)| set);
        let accuracy: Vec<(f64, f64)> =
            first.iter().filter_map(|v| Some((v.step as f64, v.accuracy? * 100.0))).collect();
        if let Some(&(step, best)) = accuracy.last() {
            let percent = panel.vertical(Axis::Linear { end: 100.0, tick: 20.0 });
            frame(picture, panel, &percent, "held-out accuracy (%)", Side::Right, ACCURACY);
            let points = panel.points(&accuracy, &percent);
            picture.line(points.clone(), ACCURACY, 1.6, 1.0);
            picture.dots(&points, ACCURACY);
            let style = Style { anchor: Anchor::End, fill: ACCURACY, bold: true, ..Style::default() };
            let at = (panel.x.place(step) - 8.0, percent.place(best) + 20.0);
            picture.text(at.0, at.1, style, format!("{best:.1} %"));
            names.push((ACCURACY, 1.0, "held-out accuracy".to_owned()));
        }
        legend(picture, panel, names);
    }
}

/// One line over the steps, from 0.
fn draw_line(picture: &mut Picture, panel: &Panel, name: &str, points: Vec<(f64, f64)>, color: Rgb) {
    let largest = points.iter().map(|p| p.1).filter(|y| y.is_finite()).fold(0.0, f64::max);
    let y = panel.vertical(Axis::from_zero(largest, 3));
    frame(picture, panel, &y, name, Side::Left, INK);
    picture.line(panel.points(&points, &y), color, 2.0, 1.0);
}

/// A cell for every expert of every layer, coloured by its share of the layer's tokens.
fn draw_load(picture: &mut Picture, panel: &Panel, load: Option<&ExpertLoad>) {
    let layers = load.map_or(&[][..], |load| &load.layers);
    let name = match load {
        Some(load) if !layers.is_empty() => format!("load of the experts at step {}", load.step),
        _ => "load of the experts: none was measured".to_owned(),
    };
    let (left, width) = (panel.x.start, panel.x.end - panel.x.start);
    picture.text(left, panel.top - 10.0, Style { bold: true, ..Style::default() }, name);
    let height = (panel.bottom - panel.top) / layers.len().max(1) as f64;
    for (row, layer) in layers.iter().enumerate() {
        let mean = layer.tokens.iter().sum::<u64>() as f64 / layer.tokens.len().max(1) as f64;
        let cell = width / layer.tokens.len().max(1) as f64;
        let gap = if cell > 5.0 { 1.0 } else { 0.0 };
        let y = panel.top + row as f64 * height;
        for (expert, &tokens) in layer.tokens.iter().enumerate() {
            let fill = heat(tokens as f64 / mean.max(f64::MIN_POSITIVE));
            let x = left + expert as f64 * cell;
            picture.shapes.push(Shape::Rect { x, y, width: cell - gap, height: height - gap, fill });
        }
        let style = Style { anchor: Anchor::End, fill: FAINT, size: 11.0, ..Style::default() };
        if height >= 11.0 || row == 0 || row + 1 == layers.len() {
            picture.text(left - 8.0, y + height / 2.0 + 4.0, style, format!("layer {}", layer.layer));
        }
    }
    let Some(experts) = layers.iter().map(|layer| layer.tokens.len()).max() else { return };
    let style = Style { fill: FAINT, size: 11.0, ..Style::default() };
    let y = panel.bottom + 15.0;
    picture.text(left, y, style, "expert 0");
    picture.text(left + width, y, Style { anchor: Anchor::End, ..style }, format!("expert {}", experts - 1));
    // The colours, from no token to three times the even share.
    let (start, step) = (left + width / 2.0 - 70.0, 7.0);
    for i in 0..20 {
        let fill = heat(3.0 * f64::from(i) / 19.0);
        picture.shapes.push(Shape::Rect {
            x: start + step * f64::from(i),
            y: y - 8.0,
            width: step,
            height: 8.0,
            fill,
        });
    }
    picture.text(start - 8.0, y, Style { anchor: Anchor::End, ..style }, "idle");
    picture.text(start + 20.0 * step + 8.0, y, style, "3 x even or more");
}

/// The colour of an expert with so many times its even share.
fn heat(ratio: f64) -> Rgb {
    let [idle, even, full] = HEAT;
    let (to, share) = if ratio <= 1.0 { (idle, 1.0 - ratio) } else { (full, ((ratio - 1.0) / 2.0).min(1.0)) };
    std::array::from_fn(|i| {
        let (from, to) = (f64::from(even[i]), f64::from(to[i]));
        (from + (to - from) * share).round() as u8
    })
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

/// Marks, their numbers and the name of a vertical axis; the left one draws the grid as well.
fn frame(picture: &mut Picture, panel: &Panel, y: &Span, name: &str, side: Side, fill: Rgb) {
    let (x, anchor, gap) = match side {
        Side::Left => (panel.x.start, Anchor::End, -10.0),
        Side::Right => (panel.x.end, Anchor::Start, 10.0),
    };
    if side == Side::Left {
        for x in panel.x.axis.marks().into_iter().map(|mark| panel.x.place(mark)) {
            picture.line(vec![(x, panel.top), (x, panel.bottom)], GRID, 1.0, 1.0);
        }
    }
    for mark in y.axis.marks() {
        let at = y.place(mark);
        if side == Side::Left {
            let stroke = if mark == 0.0 { FAINT } else { GRID };
            picture.line(vec![(panel.x.start, at), (panel.x.end, at)], stroke, 1.0, 1.0);
        }
        let style = Style { anchor, fill: if fill == INK { FAINT } else { fill }, ..Style::default() };
        picture.text(x + gap, at + 4.0, style, y.axis.label(mark));
    }
    let anchor = if side == Side::Left { Anchor::Start } else { Anchor::End };
    picture.text(x, panel.top - 10.0, Style { bold: true, anchor, fill, ..Style::default() }, name);
}

/// The numbers of the steps, under the lowest of the panels that share them.
fn step_labels(picture: &mut Picture, panel: &Panel) {
    let style = Style { anchor: Anchor::Middle, fill: FAINT, size: 11.0, ..Style::default() };
    for mark in panel.x.axis.marks() {
        picture.text(panel.x.place(mark), panel.bottom + 15.0, style, panel.x.axis.label(mark));
    }
    let end = Style { anchor: Anchor::Start, ..style };
    picture.text(panel.x.end + 18.0, panel.bottom + 15.0, end, "step");
}

/// Names of the lines, in one row above a panel.
fn legend(picture: &mut Picture, panel: &Panel, entries: Vec<(Rgb, f64, String)>) {
    let mut x = panel.x.start;
    let y = panel.top - 36.0;
    for (stroke, opacity, name) in entries {
        picture.line(vec![(x, y), (x + 22.0, y)], stroke, 2.4, opacity);
        let width = name.chars().count() as f64 * 6.6 + 54.0;
        picture.text(x + 28.0, y + 4.0, Style { fill: FAINT, ..Style::default() }, name);
        x += width;
    }
}

/// At each point, the line of least squares through a window a fiftieth of the run wide. Where the point is in its middle
/// this is the window's mean; at the ends of the run, whose windows lie to one side, it follows the slope and not the last
/// step.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    let radius = points.len() / 100;
    let line = |i: usize| {
        let start = i.saturating_sub(radius).min(points.len().saturating_sub(2 * radius + 1));
        let window = &points[start..start + 2 * radius + 1];
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| window.iter().map(of).sum::<f64>() / window.len() as f64;
        let (x, y) = (mean(&|point| point.0), mean(&|point| point.1));
        let spread = mean(&|point| (point.0 - x).powi(2));
        let slope = mean(&|point| (point.0 - x) * (point.1 - y)) / if spread > 0.0 { spread } else { 1.0 };
        y + slope * (points[i].0 - x)
    };
    (0..points.len()).map(|i| (points[i].0, line(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{LayerLoad, timestamp};

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

    fn load() -> ExpertLoad {
        let tokens = |layer| (0..16).map(|expert| (expert * layer * 37 % 60) as u64).collect();
        ExpertLoad {
            step: 599,
            layers: (1..5).map(|layer| LayerLoad { layer, tokens: tokens(layer) }).collect(),
        }
    }

    fn plot(
        steps: &[StepMetrics],
        validations: &[(String, Vec<ValidationMetrics>)],
        write: impl Fn(&RunPlot<'_>),
    ) {
        let (curves, load) = (Curve::ALL.map(|(_, curve)| curve), load());
        let (title, subtitle) = ("Digits <& more>", "1.2 M parameters");
        write(&RunPlot { title, subtitle, steps, validations, load: Some(&load), curves: &curves });
    }

    #[test]
    fn a_run_is_drawn_with_its_axes() {
        let (steps, validations) = run(600, true);
        let sets = [("default".to_owned(), validations.clone()), ("other".to_owned(), validations)];
        plot(&steps, &sets, |plot| {
            let svg = plot.svg();
            for part in [
                "Digits &lt;&amp; more&gt;",
                "loss (nats per token)",
                "learning rate",
                "tokens per second",
                "accuracy (%)",
                "held-out loss, other",
                "layer 4",
                "expert 15",
            ] {
                assert!(svg.contains(part), "{part}");
            }
            assert_eq!(svg.matches("<circle").count(), 30);
            assert!(svg.matches("<rect").count() >= 64);
            assert!(!svg.contains("NaN"));
        });
    }

    #[test]
    fn the_pixels_are_those_of_the_shapes() {
        let (steps, validations) = run(600, true);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.png");
        plot(&steps, &[("default".to_owned(), validations)], |plot| plot.write(&path).unwrap());
        let image = image::open(&path).unwrap().into_rgb8();
        assert_eq!(image.width(), 1920);
        let count = |color: Rgb| image.pixels().filter(|pixel| pixel.0 == color).count();
        // Curves, an idle expert's cells, and letters.
        assert!(count(LOSS) > 500 && count(ACCURACY) > 200 && count(HEAT[0]) > 1000, "{}", count(HEAT[0]));
        assert!(count(INK) > 300, "{}", count(INK));
        assert_eq!(image.get_pixel(5, 5).0, [255; 3]);
    }

    #[test]
    fn empty_short_and_broken_runs_are_drawn_too() {
        let (mut steps, _) = run(3, false);
        steps[1].loss = f64::NAN;
        steps[2].tps = f64::INFINITY;
        for count in 0..=3 {
            plot(&steps[..count], &[], |plot| {
                let svg = plot.svg();
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                assert!(svg.ends_with("</svg>\n"));
                assert!(!plot.picture().png().is_empty());
            });
        }
    }

    #[test]
    fn smoothing_keeps_a_constant() {
        let flat: Vec<(f64, f64)> = (0..500).map(|i| (f64::from(i), 2.0)).collect();
        assert!(smoothed(&flat).iter().all(|&(_, y)| (y - 2.0).abs() < 1e-12));
    }

    #[test]
    fn smoothing_keeps_a_slope_to_the_ends_and_does_not_jump_to_the_last_step() {
        for count in [1, 2, 3, 99, 100, 101, 500] {
            let line: Vec<(f64, f64)> =
                (0..count).map(|i| (f64::from(i), 7.0 - 0.01 * f64::from(i))).collect();
            let (got, last) = (smoothed(&line), line.len() - 1);
            assert!(got.iter().zip(&line).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-9), "{count}");
            let mut spike = line.clone();
            spike[last].1 += 1.0;
            if count >= 300 {
                let moved = smoothed(&spike)[last].1 - line[last].1;
                assert!(moved < 0.4, "{moved}");
            }
        }
    }
}
