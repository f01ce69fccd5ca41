//! The mean cross entropy of logits.

/// Mean over labelled tokens of `log(sum exp(logits)) - logits[target]`; 0 when no token is labelled.
///
/// # Shapes
/// - `logits`: `[T, V]`, `targets`: `[T]`, -100 where there is none
pub(super) fn mean_cross_entropy(logits: &[f32], vocab: usize, targets: &[i64]) -> f32 {
    let mut sum = 0.0f64;
    let mut count = 0usize;
    for (row, &target) in logits.chunks_exact(vocab).zip(targets) {
        let Ok(target) = usize::try_from(target) else { continue };
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        sum += total.ln() - f64::from(row[target] - max);
        count += 1;
    }
    if count == 0 { 0.0 } else { (sum / count as f64) as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labelled_rows_count() {
        let logits = [0.0, 0.0, 5.0, 1.0, 0.0, f32::ln(3.0)];
        let loss = mean_cross_entropy(&logits, 2, &[0, -100, 1]);
        let expected = (2.0f64.ln() + (4.0f64 / 3.0).ln()) / 2.0;
        assert!((f64::from(loss) - expected).abs() < 1e-6);
        assert_eq!(mean_cross_entropy(&logits, 2, &[-100; 3]), 0.0);
    }
}
