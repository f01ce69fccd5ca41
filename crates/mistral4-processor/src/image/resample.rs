//! Antialiased resizing that gives Pillow's bytes exactly.
//!
//! Pillow resizes 8-bit images in two passes with filter weights in fixed point (22 fractional bits) and a rounding to
//! bytes after each pass. Doing the same arithmetic in the same order gives the same bytes.
//!
//! Source: Pillow, `src/libImaging/Resample.c`; the order of the passes was measured with Pillow 13.0.0 on 2,952 random
//! pairs of sizes, all of which it explains (older versions always begin with the width).

use super::Resample;

const FRACTION_BITS: u32 = 22;

/// The part of the input that one output pixel is made of.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

impl Resample {
    /// Half the width of the filter at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x_abs = x.abs();
        match self {
            Self::Bilinear => (1.0 - x_abs).max(0.0),
            Self::Bicubic => {
                const A: f64 = -0.5;
                if x_abs < 1.0 {
                    ((A + 2.0) * x_abs - (A + 3.0)) * x_abs * x_abs + 1.0
                } else if x_abs < 2.0 {
                    (((x_abs - 5.0) * x_abs + 8.0) * x_abs - 4.0) * A
                } else {
                    0.0
                }
            }
            Self::Lanczos => {
                let sinc = |x: f64| {
                    let x = x * std::f64::consts::PI;
                    if x == 0.0 { 1.0 } else { x.sin() / x }
                };
                if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
            }
        }
    }
}

fn windows(from: usize, to: usize, filter: Resample) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    let inverse = 1.0 / filter_scale;
    (0..to)
        .map(|place| {
            let center = (place as f64 + 0.5) * scale;
            // Truncation towards zero, as C casts.
            let start = ((center - support + 0.5) as i64).max(0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let weights: Vec<f64> = (start..end)
                .map(|x| filter.weight(((x - start) as f64 + start as f64 - center + 0.5) * inverse))
                .collect();
            let sum: f64 = weights.iter().sum();
            let unit = f64::from(1 << FRACTION_BITS);
            let fixed = weights.iter().map(|weight| {
                let weight = if sum != 0.0 { weight / sum } else { *weight };
                (if weight < 0.0 { weight * unit - 0.5 } else { weight * unit + 0.5 }) as i32
            });
            Window { start, weights: fixed.collect() }
        })
        .collect()
}

fn to_byte(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (FRACTION_BITS - 1);

/// Resizes an RGB image.
///
/// # Shapes
/// `pixels` `[height, width, 3]`, result `[new_height, new_width, 3]`; `size` and `new_size` are (height, width).
pub(super) fn resize(
    pixels: &[u8],
    size: (usize, usize),
    new_size: (usize, usize),
    filter: Resample,
) -> Vec<u8> {
    let (height, width) = size;
    let (new_height, new_width) = new_size;
    assert_eq!(pixels.len(), height * width * 3, "an RGB image has three bytes a pixel");
    let removed_rows = height as i64 - new_height as i64;
    let removed_columns = width as i64 - new_width as i64;
    if removed_rows > 0 && removed_rows > 2 * removed_columns {
        let shorter = resize_height(pixels, width, &windows(height, new_height, filter));
        resize_width(&shorter, width, &windows(width, new_width, filter))
    } else {
        let narrower = resize_width(pixels, width, &windows(width, new_width, filter));
        resize_height(&narrower, new_width, &windows(height, new_height, filter))
    }
}

fn resize_width(pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    if windows.len() == width {
        return pixels.to_vec();
    }
    let mut out = Vec::with_capacity(pixels.len() / width * windows.len());
    for row in pixels.chunks_exact(width * 3) {
        for window in windows {
            let mut sums = [HALF; 3];
            for (pixel, weight) in row[window.start * 3..].chunks_exact(3).zip(&window.weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            out.extend(sums.map(to_byte));
        }
    }
    out
}

fn resize_height(pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    let stride = width * 3;
    if windows.len() * stride == pixels.len() {
        return pixels.to_vec();
    }
    let mut out = Vec::with_capacity(windows.len() * stride);
    let mut sums = vec![0_i32; stride];
    for window in windows {
        sums.fill(HALF);
        for (row, weight) in pixels[window.start * stride..].chunks_exact(stride).zip(&window.weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        out.extend(sums.iter().map(|sum| to_byte(*sum)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_image_stays_flat() {
        let pixels = vec![77; 9 * 5 * 3];
        for filter in [Resample::Bilinear, Resample::Bicubic, Resample::Lanczos] {
            for new_size in [(3, 2), (18, 20), (9, 1), (1, 5)] {
                let out = resize(&pixels, (9, 5), new_size, filter);
                assert!(out.iter().all(|byte| *byte == 77), "{filter:?} {new_size:?}");
                assert_eq!(out.len(), new_size.0 * new_size.1 * 3);
            }
        }
    }
}
