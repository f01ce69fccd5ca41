//! A picture as pixels: lines and dots by their distance to a pixel's middle, texts from a sheet of glyphs.

use std::sync::LazyLock;

use image::{GrayImage, ImageFormat, Rgb as Pixel, RgbImage};

use super::picture::{Anchor, DOT, Picture, Rgb, Shape, Style};

/// Pixels for one of the picture's.
const SCALE: f64 = 2.0;

/// The glyphs from space to tilde, `COLUMNS` a row, each in a cell of its own (DejaVu Sans; `tools/plot_font.py`).
static SHEETS: LazyLock<[GrayImage; 2]> = LazyLock::new(|| {
    let read = |bytes| {
        image::load_from_memory_with_format(bytes, ImageFormat::Png)
            .expect("the sheet is a PNG file")
            .into_luma8()
    };
    [read(include_bytes!("../assets/glyphs.png")), read(include_bytes!("../assets/glyphs_bold.png"))]
});
/// Height of the font in the sheet, size of a cell, its baseline, glyphs a row.
const EM: f64 = 48.0;
const CELL: (u32, u32) = (56, 64);
const BASELINE: f64 = 48.0;
const COLUMNS: u32 = 16;
/// How far a glyph lies from the left of its cell.
const MARGIN: f64 = 4.0;
/// Widths of the glyphs in 64ths of a pixel of the sheet, plain and bold.
const ADVANCES: [[u16; 95]; 2] = include!("../assets/glyph_advances.in");

impl Picture {
    /// The picture as a PNG file, twice as many pixels a side as it has units.
    pub(super) fn png(&self) -> Vec<u8> {
        let size = |length: f64| (length * SCALE).ceil() as u32;
        let mut canvas = Canvas(RgbImage::from_pixel(size(self.width), size(self.height), Pixel([255; 3])));
        for shape in &self.shapes {
            canvas.draw(shape);
        }
        let mut png = std::io::Cursor::new(Vec::new());
        canvas.0.write_to(&mut png, ImageFormat::Png).expect("writing to memory does not fail");
        png.into_inner()
    }
}

struct Canvas(RgbImage);

impl Canvas {
    fn draw(&mut self, shape: &Shape) {
        match shape {
            Shape::Rect { x, y, width, height, fill } => self.rect([*x, *y, *width, *height], *fill),
            Shape::Line { points, stroke, width, opacity } => self.line(points, *stroke, *width, *opacity),
            Shape::Dot { x, y, fill } => {
                let (radius, rim) = DOT;
                self.disc((*x, *y), radius + rim / 2.0, [255; 3]);
                self.disc((*x, *y), radius - rim / 2.0, *fill);
            }
            Shape::Text { x, y, style, text } => self.text((*x, *y), style, text),
        }
    }

    /// Lays a colour over a pixel.
    fn blend(&mut self, x: i64, y: i64, color: Rgb, share: f64) {
        let (width, height) = self.0.dimensions();
        if share <= 0.0 || x < 0 || y < 0 || x >= i64::from(width) || y >= i64::from(height) {
            return;
        }
        let pixel = self.0.get_pixel_mut(x as u32, y as u32);
        for (below, above) in pixel.0.iter_mut().zip(color) {
            let mixed = f64::from(*below) + (f64::from(above) - f64::from(*below)) * share.min(1.0);
            *below = mixed.round() as u8;
        }
    }

    fn rect(&mut self, area: [f64; 4], fill: Rgb) {
        let [x, y, width, height] = area.map(|length| length * SCALE);
        let covered =
            |start: f64, length: f64, at: i64| ((at + 1) as f64).min(start + length) - (at as f64).max(start);
        for row in y.floor() as i64..(y + height).ceil() as i64 {
            for column in x.floor() as i64..(x + width).ceil() as i64 {
                self.blend(column, row, fill, covered(x, width, column) * covered(y, height, row));
            }
        }
    }

    fn disc(&mut self, (x, y): (f64, f64), radius: f64, fill: Rgb) {
        let (x, y, radius) = (x * SCALE, y * SCALE, radius * SCALE);
        let reach = radius.ceil() as i64 + 1;
        for row in y as i64 - reach..=y as i64 + reach {
            for column in x as i64 - reach..=x as i64 + reach {
                let distance = (column as f64 + 0.5 - x).hypot(row as f64 + 0.5 - y);
                self.blend(column, row, fill, (radius + 0.5 - distance).clamp(0.0, 1.0));
            }
        }
    }

    /// A line whose parts cover a pixel once, however many meet there.
    fn line(&mut self, points: &[(f64, f64)], stroke: Rgb, width: f64, opacity: f64) {
        let radius = width * SCALE / 2.0;
        let mut cover = std::collections::HashMap::<(i64, i64), f64>::new();
        for pair in points.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|(x, y)| (x * SCALE, y * SCALE));
            let (dx, dy) = (b.0 - a.0, b.1 - a.1);
            let length = (dx * dx + dy * dy).max(1e-12);
            let reach = radius + 1.0;
            for row in (a.1.min(b.1) - reach).floor() as i64..=(a.1.max(b.1) + reach).ceil() as i64 {
                for column in (a.0.min(b.0) - reach).floor() as i64..=(a.0.max(b.0) + reach).ceil() as i64 {
                    let (x, y) = (column as f64 + 0.5, row as f64 + 0.5);
                    let along = (((x - a.0) * dx + (y - a.1) * dy) / length).clamp(0.0, 1.0);
                    let distance = (x - a.0 - along * dx).hypot(y - a.1 - along * dy);
                    let share = (radius + 0.5 - distance).clamp(0.0, 1.0).min(2.0 * radius);
                    if share > 0.0 {
                        let covered = cover.entry((column, row)).or_default();
                        *covered = covered.max(share);
                    }
                }
            }
        }
        for ((column, row), share) in cover {
            self.blend(column, row, stroke, share * opacity);
        }
    }

    fn text(&mut self, (x, y): (f64, f64), style: &Style, text: &str) {
        let bold = usize::from(style.bold);
        let zoom = style.size * SCALE / EM;
        // Everything that the plots say is ASCII; other letters of a title become question marks.
        let glyphs: Vec<usize> =
            text.chars().map(|c| if (' '..='~').contains(&c) { c as usize - 32 } else { 31 }).collect();
        let advance = |glyph: usize| f64::from(ADVANCES[bold][glyph]) / 64.0 * zoom;
        let width: f64 = glyphs.iter().map(|&glyph| advance(glyph)).sum();
        let mut left = x * SCALE
            - match style.anchor {
                Anchor::Start => 0.0,
                Anchor::Middle => width / 2.0,
                Anchor::End => width,
            };
        for glyph in glyphs {
            self.glyph(glyph as u32, bold, (left, y * SCALE), zoom, style.fill);
            left += advance(glyph);
        }
    }

    /// One glyph, each pixel the mean of what it covers of the sheet.
    fn glyph(&mut self, glyph: u32, bold: usize, (left, baseline): (f64, f64), zoom: f64, fill: Rgb) {
        let sheet = &SHEETS[bold];
        let (cell_x, cell_y) = (glyph % COLUMNS * CELL.0, glyph / COLUMNS * CELL.1);
        let (x0, y0) = (left - MARGIN * zoom, baseline - BASELINE * zoom);
        let (width, height) = (f64::from(CELL.0) * zoom, f64::from(CELL.1) * zoom);
        const PARTS: i64 = 3;
        for row in y0.floor() as i64..=(y0 + height).ceil() as i64 {
            for column in x0.floor() as i64..=(x0 + width).ceil() as i64 {
                let mut sum = 0.0;
                for part in 0..PARTS * PARTS {
                    let inside = |i: i64| (i as f64 + 0.5) / PARTS as f64;
                    let sx = (column as f64 + inside(part % PARTS) - x0) / zoom;
                    let sy = (row as f64 + inside(part / PARTS) - y0) / zoom;
                    if sx >= 0.0 && sy >= 0.0 && sx < f64::from(CELL.0) && sy < f64::from(CELL.1) {
                        sum += f64::from(sheet.get_pixel(cell_x + sx as u32, cell_y + sy as u32).0[0]);
                    }
                }
                self.blend(column, row, fill, sum / (255 * PARTS * PARTS) as f64);
            }
        }
    }
}
