//! OpenCV's cubic resizing of float images, without antialiasing, as `mistral_common` uses it.
//!
//! Source: OpenCV, `modules/imgproc/src/resize.cpp`, `INTER_CUBIC` (a = -0.75, borders replicated).

/// The four input places and weights of each output place.
fn taps(from: usize, to: usize) -> Vec<([usize; 4], [f32; 4])> {
    const A: f32 = -0.75;
    let scale = from as f64 / to as f64;
    (0..to)
        .map(|place| {
            let position = ((place as f64 + 0.5) * scale - 0.5) as f32;
            let floor = position.floor();
            let x = position - floor;
            let first = ((A * (x + 1.0) - 5.0 * A) * (x + 1.0) + 8.0 * A) * (x + 1.0) - 4.0 * A;
            let second = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
            let third = ((A + 2.0) * (1.0 - x) - (A + 3.0)) * (1.0 - x) * (1.0 - x) + 1.0;
            let weights = [first, second, third, 1.0 - first - second - third];
            let places =
                [-1, 0, 1, 2].map(|offset| (floor as i64 + offset).clamp(0, from as i64 - 1) as usize);
            (places, weights)
        })
        .collect()
}

/// Resizes an RGB image; values may leave 0 to 255.
///
/// # Shapes
/// `pixels` `[height, width, 3]`, result `[new_height, new_width, 3]`; `size` and `new_size` are (height, width).
pub(super) fn resize(pixels: &[u8], size: (usize, usize), new_size: (usize, usize)) -> Vec<f32> {
    let (height, width) = size;
    let (new_height, new_width) = new_size;
    if size == new_size {
        return pixels.iter().map(|value| f32::from(*value)).collect();
    }
    let columns = taps(width, new_width);
    let mut rows = Vec::with_capacity(height * new_width * 3);
    for row in pixels.chunks_exact(width * 3) {
        for (places, weights) in &columns {
            for channel in 0..3 {
                let value = |tap: usize| f32::from(row[places[tap] * 3 + channel]) * weights[tap];
                rows.push(value(0) + value(1) + value(2) + value(3));
            }
        }
    }
    let stride = new_width * 3;
    let mut out = Vec::with_capacity(new_height * stride);
    for (places, weights) in taps(height, new_height) {
        let row = |tap: usize| &rows[places[tap] * stride..][..stride];
        let (first, second, third, fourth) = (row(0), row(1), row(2), row(3));
        for at in 0..stride {
            let sum = first[at] * weights[0]
                + second[at] * weights[1]
                + third[at] * weights[2]
                + fourth[at] * weights[3];
            out.push(sum);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_a_flat_image_stays_flat() {
        let pixels = vec![200; 7 * 4 * 3];
        let out = resize(&pixels, (7, 4), (14, 28));
        assert_eq!(out.len(), 14 * 28 * 3);
        assert!(out.iter().all(|value| (value - 200.0).abs() < 1e-3));
    }
}
