//! A picture as a list of shapes, and its form as SVG.

use std::fmt::Write as _;

/// A colour: red, green, blue.
pub(super) type Rgb = [u8; 3];

pub(super) const INK: Rgb = [0x1b, 0x27, 0x33];
pub(super) const FAINT: Rgb = [0x5d, 0x6b, 0x7a];

/// Something to draw; places and sizes are in pixels.
#[derive(Debug, Clone)]
pub(super) enum Shape {
    /// A filled rectangle.
    Rect { x: f64, y: f64, width: f64, height: f64, fill: Rgb },
    /// A line through points.
    Line { points: Vec<(f64, f64)>, stroke: Rgb, width: f64, opacity: f64 },
    /// A disc with a white rim.
    Dot { x: f64, y: f64, fill: Rgb },
    /// A text whose baseline begins, ends or has its middle at a point.
    Text { x: f64, y: f64, style: Style, text: String },
}

/// Where a text lies about its point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Style {
    pub(super) size: f64,
    pub(super) bold: bool,
    pub(super) fill: Rgb,
    pub(super) anchor: Anchor,
}

impl Default for Style {
    fn default() -> Self {
        Self { size: 12.5, bold: false, fill: INK, anchor: Anchor::Start }
    }
}

/// Radius of a dot, and width of its rim.
pub(super) const DOT: (f64, f64) = (3.4, 1.2);

/// Shapes on white, one above the other.
#[derive(Debug, Clone)]
pub(super) struct Picture {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) shapes: Vec<Shape>,
}

impl Picture {
    pub(super) fn text(&mut self, x: f64, y: f64, style: Style, text: impl Into<String>) {
        self.shapes.push(Shape::Text { x, y, style, text: text.into() });
    }

    /// A line through points, where there are two or more.
    pub(super) fn line(&mut self, points: Vec<(f64, f64)>, stroke: Rgb, width: f64, opacity: f64) {
        if points.len() > 1 {
            self.shapes.push(Shape::Line { points, stroke, width, opacity });
        }
    }

    pub(super) fn dots(&mut self, points: &[(f64, f64)], fill: Rgb) {
        self.shapes.extend(points.iter().map(|&(x, y)| Shape::Dot { x, y, fill }));
    }

    /// The picture as SVG.
    pub(super) fn svg(&self) -> String {
        let (width, height) = (self.width, self.height);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\" font-family=\"Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
        );
        for shape in &self.shapes {
            element(&mut svg, shape).expect("writing to a string does not fail");
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn element(svg: &mut String, shape: &Shape) -> std::fmt::Result {
    match shape {
        Shape::Rect { x, y, width, height, fill } => writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{}\"/>",
            hex(*fill)
        ),
        Shape::Line { points, stroke, width, opacity } => {
            let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            writeln!(
                svg,
                "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" \
                 stroke-linejoin=\"round\" points=\"{}\"/>",
                hex(*stroke),
                points.join(" ")
            )
        }
        Shape::Dot { x, y, fill } => {
            let (radius, rim) = DOT;
            writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{}\" stroke=\"#ffffff\" \
                 stroke-width=\"{rim}\"/>",
                hex(*fill)
            )
        }
        Shape::Text { x, y, style: Style { size, bold, fill, anchor }, text } => {
            let anchor = match anchor {
                Anchor::Start => "start",
                Anchor::Middle => "middle",
                Anchor::End => "end",
            };
            let weight = if *bold { 600 } else { 400 };
            let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" font-weight=\"{weight}\" fill=\"{}\" \
                 text-anchor=\"{anchor}\">{text}</text>",
                hex(*fill)
            )
        }
    }
}

fn hex([red, green, blue]: Rgb) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}
