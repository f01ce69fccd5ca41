//! Noise on the embeddings of a training step.
//!
//! Source: Jain et al. 2023 (NEFTune: Noisy Embeddings Improve Instruction Finetuning).

use burn::tensor::{Tensor, TensorData};

use crate::inputs::{Layout, ModelInputs};
use crate::model::dropout::mix;

/// Uniform noise of at most `alpha / sqrt(L D)` on the embeddings of a sequence of L tokens.
///
/// It is a function of the seed, the step, the sequence's number in the data and the place in the sequence: whatever a
/// sequence shares a batch with, and on whichever rank, it gets the same.
#[derive(Debug, Clone)]
pub struct EmbeddingNoise {
    alpha: f64,
    key: u64,
    rows: Vec<usize>,
}

impl EmbeddingNoise {
    /// The noise of step `step` for the sequences of a batch, `rows` being their numbers in the data.
    pub fn new(alpha: f64, seed: u64, step: usize, rows: &[usize]) -> Self {
        Self { alpha, key: mix(mix(seed ^ NEFTUNE) ^ step as u64), rows: rows.to_vec() }
    }

    /// Adds the noise to embeddings; padding and the places of images, whose token is `image_token`, stay as they are.
    ///
    /// # Panics
    /// When the batch has another number of sequences.
    ///
    /// # Shapes
    /// - `embeds`, output: `[T, D]`
    pub(super) fn add(&self, embeds: Tensor<2>, inputs: &ModelInputs, image_token: Option<u32>) -> Tensor<2> {
        let [tokens, width] = embeds.dims();
        let starts: Vec<usize> = match &inputs.layout {
            Layout::Rows { batch, sequence } => (0..=*batch).map(|row| row * sequence).collect(),
            Layout::Packed { cu_seqlens } => cu_seqlens.clone(),
        };
        assert_eq!(starts.len(), self.rows.len() + 1, "noise for each sequence of the batch");
        let is_token = |t: &usize| inputs.attention_mask.as_ref().is_none_or(|mask| mask[*t]);
        let is_image = |t: usize| match (&inputs.input_ids, image_token) {
            (Some(ids), Some(image_token)) => ids[t] == image_token,
            _ => false,
        };
        let mut noise = vec![0.0f32; tokens * width];
        for (ends, &row) in starts.windows(2).zip(&self.rows) {
            let real: Vec<usize> = (ends[0]..ends[1]).filter(is_token).collect();
            let most = (self.alpha / ((real.len() * width).max(1) as f64).sqrt()) as f32;
            let of_row = mix(self.key ^ row as u64);
            for (place, t) in real.into_iter().enumerate().filter(|&(_, t)| !is_image(t)) {
                let start = mix(of_row ^ place as u64);
                for (pair, values) in (0u64..).zip(noise[t * width..(t + 1) * width].chunks_mut(2)) {
                    // Two numbers of 24 bits from each of 64.
                    let bits = mix(start.wrapping_add(pair));
                    for (value, bits) in values.iter_mut().zip([bits >> 40, bits >> 8 & 0xff_ffff]) {
                        *value = (bits as f32 / (1u64 << 23) as f32 - 1.0) * most;
                    }
                }
            }
        }
        let device = embeds.device().without_autodiff();
        let noise = Tensor::<2>::from_data(TensorData::new(noise, [tokens, width]), &device);
        let dtype = embeds.dtype();
        embeds + noise.cast(dtype)
    }
}

/// Sets these numbers apart from others that a seed gives.
const NEFTUNE: u64 = 0x006e_6566_7475_6e65;

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    const WIDTH: usize = 33;

    /// The noise of a batch, by token.
    fn noise(inputs: &ModelInputs, rows: &[usize], (seed, step): (u64, usize)) -> Vec<Vec<f32>> {
        let zeros = Tensor::<2>::zeros([inputs.layout.tokens(), WIDTH], &Device::flex());
        let noise = EmbeddingNoise::new(5.0, seed, step, rows).add(zeros, inputs, Some(9));
        let values = noise.into_data_as::<f32>().try_into_vec::<f32>().unwrap();
        values.chunks(WIDTH).map(<[f32]>::to_vec).collect()
    }

    #[test]
    fn a_sequence_gets_the_same_noise_in_any_batch() {
        let mask = vec![true, true, true, true, true, true, false, false];
        let padded = noise(&ModelInputs::rows(vec![1; 8], 2).with_attention_mask(mask), &[70, 3], (1, 2));
        let packed = noise(&ModelInputs::packed(vec![1; 9], vec![0, 2, 6, 9]), &[3, 70, 1], (1, 2));
        assert_eq!((&padded[..4], &padded[4..6]), (&packed[2..6], &packed[..2]));
        assert!(padded[6..].iter().flatten().all(|&v| v == 0.0), "padding stays as it is");
        let other = |place| noise(&ModelInputs::rows(vec![1; 4], 1), &[70], place);
        assert_eq!(other((1, 2)), padded[..4]);
        assert_ne!(other((1, 3)), padded[..4]);
        assert_ne!(other((2, 2)), padded[..4]);
        assert_ne!(padded[0], padded[1]);
    }

    #[test]
    fn noise_is_uniform_up_to_alpha_over_the_root_of_the_sequences_size() {
        let length = 400;
        let values = noise(&ModelInputs::rows(vec![1; length], 1), &[0], (7, 0)).concat();
        let most = 5.0 / ((length * WIDTH) as f32).sqrt();
        let largest = values.iter().fold(0.0f32, |a, v| a.max(v.abs()));
        assert!(largest <= most && largest > 0.99 * most, "{largest} {most}");
        let mean = |f: &dyn Fn(f32) -> f32| {
            values.iter().map(|&v| f64::from(f(v))).sum::<f64>() / values.len() as f64
        };
        let (mean, square) = (mean(&|v| v / most), mean(&|v| (v / most).powi(2)));
        assert!(mean.abs() < 0.02 && (square - 1.0 / 3.0).abs() < 0.01, "{mean} {square}");
    }

    #[test]
    fn images_keep_their_features() {
        let got = noise(&ModelInputs::rows(vec![1, 9, 9, 1], 1), &[0], (7, 0));
        assert!(got[1..3].iter().flatten().all(|&v| v == 0.0) && got[0][0] != 0.0 && got[3][0] != 0.0);
    }
}
