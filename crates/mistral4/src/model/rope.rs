//! Rotary frequencies with YaRN, the cos and sin tables of a forward pass, and Llama-4 query scaling.

use std::f64::consts::PI;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use mistral4_checkpoint::config::{RopeParameters, TextConfig, YarnParameters};

/// The rotary embedding of a model.
#[derive(Debug, Clone)]
pub struct RotaryEmbedding {
    inv_freq: Vec<f32>,
    attention_factor: f32,
    llama_4_scaling: Option<(f64, usize)>,
}

/// The tables of one forward pass.
#[derive(Debug, Clone)]
pub struct RotaryTables {
    /// `[T, pairs]` f32
    pub cos: Tensor<2>,
    /// `[T, pairs]` f32
    pub sin: Tensor<2>,
    /// Factor on the whole query, `[T]`; `None` when it is 1 for every token.
    pub query_scale: Option<Arc<[f32]>>,
}

impl RotaryEmbedding {
    /// Computes the frequencies of `config`.
    pub fn new(config: &TextConfig) -> Self {
        let RopeParameters { rope_theta, yarn, llama_4_scaling } = &config.rope;
        let dim = config.qk_rope_head_dim;
        let extends =
            |y: &&YarnParameters| config.max_position_embeddings > y.original_max_position_embeddings;
        let inv_freq = match yarn.as_ref().filter(extends) {
            Some(yarn) => yarn_frequencies(*rope_theta, dim, yarn),
            None => frequencies(*rope_theta, dim),
        };
        let attention_factor = yarn.as_ref().map_or(1.0, |y| y.attention_factor) as f32;
        Self { inv_freq, attention_factor, llama_4_scaling: *llama_4_scaling }
    }

    /// Cos, sin and query scale at `positions`, computed in f32.
    pub fn tables(&self, positions: &[i64], device: &Device) -> RotaryTables {
        let pairs = self.inv_freq.len();
        let (mut cos, mut sin) = (vec![0.0; positions.len() * pairs], vec![0.0; positions.len() * pairs]);
        let rows = cos.chunks_exact_mut(pairs.max(1)).zip(sin.chunks_exact_mut(pairs.max(1)));
        positions.iter().zip(rows).for_each(|(&position, (cos, sin))| self.row(position, cos, sin));
        let table =
            |data| Tensor::from_data(TensorData::new(data, [positions.len(), pairs]), (device, DType::F32));
        RotaryTables { cos: table(cos), sin: table(sin), query_scale: self.query_scales(positions) }
    }

    /// Entries of a row of cos or sin: half of the rotated entries of a head.
    pub fn pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// Cos and sin of one position.
    ///
    /// # Shapes
    /// - `cos`, `sin`: `[pairs]`
    pub fn row(&self, position: i64, cos: &mut [f32], sin: &mut [f32]) {
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
            let angle = position as f32 * frequency;
            *cos = angle.cos() * self.attention_factor;
            *sin = angle.sin() * self.attention_factor;
        }
    }

    /// Factor on the whole query of a token.
    pub fn query_scale(&self, position: i64) -> f32 {
        self.llama_4_scaling.map_or(1.0, |(beta, original)| llama_4_attention_scale(position, beta, original))
    }

    fn query_scales(&self, positions: &[i64]) -> Option<Arc<[f32]>> {
        let (_, original) = self.llama_4_scaling?;
        if positions.iter().all(|&p| (p as usize) < original) {
            return None;
        }
        Some(positions.iter().map(|&p| self.query_scale(p)).collect())
    }
}

/// `1 + beta * ln(1 + floor(position / original_max_position_embeddings))`.
///
/// Source: `_get_llama_4_attn_scale` in NeMo AutoModel.
pub fn llama_4_attention_scale(position: i64, beta: f64, original_max_position_embeddings: usize) -> f32 {
    let spans = (position as f32 / original_max_position_embeddings as f32).floor();
    1.0 + beta as f32 * (1.0 + spans).ln()
}

/// `theta^(-2i/dim)`.
fn frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / dim as f32)).collect()
}

/// Frequencies interpolated by `factor` where they turn slowly, kept where they turn fast, with a ramp between.
///
/// Source: Peng et al. 2023 (YaRN), `_compute_yarn_parameters` in transformers.
fn yarn_frequencies(theta: f64, dim: usize, yarn: &YarnParameters) -> Vec<f32> {
    let dimension_of = |rotations: f64| {
        let span = yarn.original_max_position_embeddings as f64 / (rotations * 2.0 * PI);
        dim as f64 * span.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    frequencies(theta, dim)
        .into_iter()
        .enumerate()
        .map(|(i, kept)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
            let interpolated = kept / yarn.factor as f32;
            interpolated * ramp + kept * (1.0 - ramp)
        })
        .collect()
}
