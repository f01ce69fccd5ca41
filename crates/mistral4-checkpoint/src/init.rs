//! Initial values of a new model.

use rayon::prelude::*;

use crate::config::Config;
use crate::weights::names::{TensorKind, TensorSpec};

/// Values of a parameter of a new model, the same for a seed whatever the number of threads.
///
/// Embeddings are normal with deviation 1; the output projection is normal with deviation `hidden_size^-0.5`, cut at 3
/// deviations; every other matrix is normal with deviation `initializer_range`, cut at 2; norms are 1 and biases 0.
///
/// Source: NeMo AutoModel, `Mistral4ForCausalLM.initialize_weights` and `Mistral4Model.init_weights`.
pub fn initial_tensor(spec: &TensorSpec, config: &Config, seed: u64) -> Vec<f32> {
    let count = spec.elements();
    let text = &config.text;
    let normal = |std: f64, cut: f64| {
        let stream = Stream::new(seed, &spec.key);
        let mut values = vec![0.0; count];
        values.par_chunks_mut(1 << 14).enumerate().for_each(|(chunk, values)| {
            let start = (chunk << 14) as u64;
            for (pair, values) in values.chunks_mut(2).enumerate() {
                let first = stream.normals(start / 2 + pair as u64, 0);
                for (lane, value) in values.iter_mut().enumerate() {
                    let mut sample = first[lane];
                    let mut attempt = 0;
                    while (sample * std).abs() > cut {
                        attempt += 1;
                        sample = stream.normals(start / 2 + pair as u64, attempt)[lane];
                    }
                    *value = (sample * std) as f32;
                }
            }
        });
        values
    };
    // The plain truncated normal of PyTorch is cut at 2, in values and not in deviations.
    const CUT: f64 = 2.0;
    match spec.kind {
        TensorKind::Norm => vec![1.0; count],
        TensorKind::Bias | TensorKind::GateBias => vec![0.0; count],
        TensorKind::Embedding => normal(1.0, f64::INFINITY),
        TensorKind::LmHead => {
            let std = (text.hidden_size as f64).powf(-0.5);
            normal(std, 3.0 * std)
        }
        TensorKind::Linear | TensorKind::ExpertsGateUp | TensorKind::ExpertsDown | TensorKind::Gate => {
            normal(text.initializer_range, CUT)
        }
        TensorKind::VisionLinear | TensorKind::PatchConv => {
            let range =
                config.vision.as_ref().map_or(text.initializer_range, |v| v.vision_config.initializer_range);
            normal(range, CUT)
        }
    }
}

/// Random numbers of one parameter, each a function of its index.
pub(crate) struct Stream {
    key: [u32; 2],
}

impl Stream {
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a over the name, then the finaliser of SplitMix64 to spread seed and name over all bits.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut mixed = hash.wrapping_add(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        Stream { key: [mixed as u32, (mixed >> 32) as u32] }
    }

    /// Two independent standard normal numbers, by the method of Box and Muller.
    pub(crate) fn normals(&self, pair: u64, attempt: u32) -> [f64; 2] {
        let [a, b, c, d] = philox4x32([pair as u32, (pair >> 32) as u32, attempt, 0], self.key);
        let radius = (-2.0 * uniform(a, b).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform(c, d)).sin_cos();
        [radius * cos, radius * sin]
    }

    /// A number between 0 and 1.
    pub(crate) fn uniform(&self, index: u64) -> f64 {
        let [a, b, ..] = philox4x32([index as u32, (index >> 32) as u32, 0, 1], self.key);
        uniform(a, b)
    }
}

fn uniform(high: u32, low: u32) -> f64 {
    ((u64::from(high) << 21 | u64::from(low) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// The counter-based generator Philox4x32 with 10 rounds.
///
/// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = u64::from(counter[0]) * 0xd251_1f53;
        let second = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigFile, ConfigOptions};

    #[test]
    fn philox_gives_the_published_numbers() {
        // Known answers of the authors' Random123 library.
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    fn draw(kind: TensorKind, seed: u64, key: &str) -> Vec<f32> {
        let config = ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap().config;
        initial_tensor(&TensorSpec { key: key.into(), shape: vec![501, 401], kind }, &config, seed)
    }

    fn deviation(values: &[f32]) -> f64 {
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    }

    #[test]
    fn deviations_are_those_of_the_kinds() {
        assert!((deviation(&draw(TensorKind::Embedding, 1, "a")) - 1.0).abs() < 0.01);
        assert!((deviation(&draw(TensorKind::Linear, 1, "a")) - 0.02).abs() < 0.0002);
        let head = draw(TensorKind::LmHead, 1, "a");
        // tiny has hidden size 64; cutting at 3 deviations leaves 0.9866 of the deviation.
        assert!((deviation(&head) - 0.125 * 0.9866).abs() < 0.001);
        assert!(head.iter().all(|value| value.abs() <= 0.375));
        assert!(head.iter().any(|value| value.abs() > 0.36));
        assert!(draw(TensorKind::Norm, 1, "a").iter().all(|&value| value == 1.0));
        assert!(draw(TensorKind::GateBias, 1, "a").iter().all(|&value| value == 0.0));
    }

    #[test]
    fn values_depend_on_seed_and_key_only() {
        let threads = |count| rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
        let one = threads(1).install(|| draw(TensorKind::LmHead, 7, "a"));
        assert_eq!(one, threads(3).install(|| draw(TensorKind::LmHead, 7, "a")));
        assert_ne!(one, draw(TensorKind::LmHead, 8, "a"));
        assert_ne!(one, draw(TensorKind::LmHead, 7, "b"));
    }
}
