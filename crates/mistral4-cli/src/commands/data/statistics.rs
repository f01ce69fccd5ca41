//! Counts over samples.

use std::fmt::Write;

use mistral4_train::data::{Batch, Skipped};
use serde_json::{Value, json};

use super::page::{Sequence, counted};
use crate::format;

/// Widest bar of the histogram.
const BAR: usize = 40;

/// What is counted.
pub(super) struct Statistics {
    /// Tokens of a packed row.
    row_size: Option<usize>,
    /// Samples that are enough; 0: all.
    wanted: usize,
    rows: usize,
    lengths: Vec<usize>,
    learned: usize,
    images: usize,
    ended: bool,
}

impl Statistics {
    pub(super) fn new(row_size: Option<usize>, wanted: usize) -> Self {
        Self { row_size, wanted, rows: 0, lengths: Vec::new(), learned: 0, images: 0, ended: false }
    }

    pub(super) fn add(&mut self, batch: &Batch, sequences: &[Sequence]) {
        self.rows += 1;
        self.lengths.extend(sequences.iter().map(|sequence| sequence.labels.len()));
        self.learned += batch.num_label_tokens;
        self.images += batch.images.len();
    }

    pub(super) fn end(&mut self, ended: bool) {
        self.ended = ended;
    }

    /// Whether every sample was counted.
    pub(super) fn is_complete(&self) -> bool {
        self.ended
    }

    /// Whether as many were counted as were wanted.
    pub(super) fn is_enough(&self) -> bool {
        self.wanted > 0 && self.lengths.len() >= self.wanted
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Length below which a share of the samples lies.
    fn quantile(&self, share: f64) -> usize {
        let mut lengths = self.lengths.clone();
        lengths.sort_unstable();
        let last = lengths.len().saturating_sub(1);
        lengths.get((share * last as f64).round() as usize).copied().unwrap_or(0)
    }

    /// `(from, to, samples)`: lengths from a power of two up to, not including, the next.
    fn histogram(&self) -> Vec<(usize, usize, usize)> {
        let bin = |length: usize| length.max(1).ilog2();
        let Some(first) = self.lengths.iter().copied().map(bin).min() else { return Vec::new() };
        let last = self.lengths.iter().copied().map(bin).max().unwrap_or(first);
        let count = |wanted| self.lengths.iter().filter(|&&length| bin(length) == wanted).count();
        (first..=last).map(|bin| (1 << bin, 1 << (bin + 1), count(bin))).collect()
    }

    fn fill(&self) -> Option<f64> {
        let size = self.row_size?;
        Some(self.tokens() as f64 / (self.rows * size).max(1) as f64)
    }

    fn label_share(&self) -> f64 {
        self.learned as f64 / self.tokens().max(1) as f64
    }

    pub(super) fn to_json(&self, total: Option<usize>, skipped: &Skipped) -> Value {
        let histogram: Vec<Value> = self
            .histogram()
            .into_iter()
            .map(|(from, to, samples)| json!({"from": from, "to": to, "samples": samples}))
            .collect();
        json!({
            "total_samples": total,
            "samples_counted": self.lengths.len(),
            "complete": self.ended,
            "tokens": self.tokens(),
            "label_tokens": self.learned,
            "label_share": self.label_share(),
            "images": self.images,
            "length": {
                "min": self.quantile(0.0), "median": self.quantile(0.5), "p95": self.quantile(0.95),
                "max": self.quantile(1.0)
            },
            "histogram": histogram,
            "packed_rows": self.row_size.map(|_| self.rows),
            "packed_fill": self.fill(),
            "skipped": {
                "malformed": skipped.unusable, "too_long": skipped.too_long, "messages": skipped.messages
            },
        })
    }

    pub(super) fn to_text(&self, total: Option<usize>, skipped: &Skipped) -> String {
        let mut out = String::new();
        let of = match (self.ended, total) {
            (true, _) => " (all)".to_owned(),
            (false, Some(total)) => format!(" (the first of {})", format::grouped(total as u64)),
            (false, None) => " (the first of a stream)".to_owned(),
        };
        let _ = writeln!(out, "samples  {}{of}", format::grouped(self.lengths.len() as u64));
        let _ = writeln!(out, "tokens   {}", format::grouped(self.tokens() as u64));
        let share = 100.0 * self.label_share();
        let _ = writeln!(out, "learned  {} ({share:.1} %)", format::grouped(self.learned as u64));
        if self.images > 0 {
            let _ = writeln!(out, "images   {}", format::grouped(self.images as u64));
        }
        if let Some(fill) = self.fill() {
            let rows = counted(self.rows, "row");
            let _ = writeln!(out, "packed   {rows}, {:.1} % full", 100.0 * fill);
        }
        if skipped.total() > 0 {
            let _ = writeln!(out, "left out {} malformed, {} too long", skipped.unusable, skipped.too_long);
            for message in &skipped.messages {
                let _ = writeln!(out, "         {message}");
            }
        }
        let _ = writeln!(
            out,
            "length   {} to {}, median {}, 95 % up to {}",
            self.quantile(0.0),
            self.quantile(1.0),
            self.quantile(0.5),
            self.quantile(0.95)
        );
        let histogram = self.histogram();
        let most = histogram.iter().map(|&(.., samples)| samples).max().unwrap_or(0).max(1);
        for (from, to, samples) in histogram {
            let bar = "#".repeat((samples * BAR).div_ceil(most));
            let _ = writeln!(out, "{:>8} to {:<8} {samples:>8} {bar}", from, to - 1);
        }
        out
    }
}
