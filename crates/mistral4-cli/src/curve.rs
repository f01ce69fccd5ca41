//! A curve in letters, for terminals and logs.

use std::fmt::Write;

const WIDTH: usize = 64;
const HEIGHT: usize = 12;

/// Draws values over their steps, each column the mean of a run of neighbours, on a linear scale. Empty for fewer than two
/// finite values.
pub(crate) fn draw(title: &str, values: &[f64]) -> String {
    let values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    if values.len() < 2 {
        return String::new();
    }
    let columns = WIDTH.min(values.len());
    let mean = |column: usize| {
        let part = &values[column * values.len() / columns..(column + 1) * values.len() / columns];
        part.iter().sum::<f64>() / part.len() as f64
    };
    let means: Vec<f64> = (0..columns).map(mean).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = (high - low).max(f64::MIN_POSITIVE);
    let level = |value: f64| (((value - low) / span) * (HEIGHT - 1) as f64).round() as usize;
    let mut text = format!("{title}\n");
    for row in (0..HEIGHT).rev() {
        let label = low + span * row as f64 / (HEIGHT - 1) as f64;
        let line: String = means.iter().map(|&mean| if level(mean) == row { '*' } else { ' ' }).collect();
        let _ = writeln!(text, "{label:8.3} |{}", line.trim_end());
    }
    let last = (values.len() - 1).to_string();
    let _ = writeln!(text, "{:8} +{}", "", "-".repeat(columns));
    let _ = writeln!(text, "{:8}  0{last:>width$}", "", width = columns.saturating_sub(1));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_curve_falls() {
        let text = draw("loss", &(0..200).map(|step| 2.0 - step as f64 / 100.0).collect::<Vec<_>>());
        let stars: Vec<Option<usize>> =
            text.lines().skip(1).take(HEIGHT).map(|line| line.find('*')).collect();
        assert!(stars.iter().all(Option::is_some), "{text}");
        assert!(stars.windows(2).all(|pair| pair[0] < pair[1]), "{text}");
        assert!(text.trim_end().ends_with("199"), "{text}");
    }

    #[test]
    fn too_few_or_equal_values_do_no_harm() {
        assert_eq!(draw("loss", &[1.0, f64::NAN]), "");
        assert!(draw("loss", &[1.0, 1.0, 1.0]).contains('*'));
    }
}
