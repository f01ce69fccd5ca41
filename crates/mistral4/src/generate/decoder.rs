//! Decoding of one row, a token at a time, on slices.

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Tensor};
use half::bf16;
use mistral4_kernels::{DecodeNorm, DecodeToken, DecodeWeight, Rotary, decode_head, decode_layer};

use super::MOST_FORESEEN;
use crate::error::{Error, Result};
use crate::model::Mistral4;
use crate::model::cache::LatentCache;
use crate::model::decode::DecodeWeights;
use crate::model::rope::RotaryEmbedding;
use crate::ops;

/// One row behind its prompt, on the CPU, through a model that is packed for inference ([`Mistral4::pack`]).
///
/// A token passes each layer as one kernel. What a step writes lies where the last one left it, so that it takes no memory
/// until the slots that were foreseen are used up.
#[derive(Debug, Clone)]
pub struct Decoder {
    embed_tokens: FloatTensor<Flex>,
    layers: Vec<Layer>,
    norm: DecodeNorm,
    lm_head: DecodeWeight,
    rotary: RotaryEmbedding,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The residual stream before and behind the layer at hand, `[D]`.
    x: Vec<bf16>,
    y: Vec<bf16>,
    logits: Vec<f32>,
}

/// A layer and what it remembers of the row.
#[derive(Debug, Clone)]
struct Layer {
    weights: DecodeWeights,
    kv_b_proj: FloatTensor<Flex>,
    /// `[tokens, R + rope]`
    slots: Vec<bf16>,
}

impl Decoder {
    /// Goes on with the row of `cache`, which is empty afterwards, with memory for `tokens` more; `None`, and the cache as
    /// it was, where several rows were read, or the model is not frozen in bf16 or quantised on the CPU, has adapters, or
    /// lies on several ranks.
    pub fn take_over(model: &Mistral4, cache: &mut LatentCache, tokens: usize) -> Option<Self> {
        let text = model.text();
        let table = text.model.embed_tokens.weight.val();
        if cache.is_empty() || table.dtype() != DType::BF16 || !ops::is_fused(&table.device()) {
            return None;
        }
        let [vocab, hidden] = table.dims();
        let (embed_tokens, lm_head) = (primitive(table)?, text.lm_head.decode_weight()?);
        let layers =
            text.model.layers.iter().map(|layer| {
                Some((layer.decode.clone()?, primitive(layer.self_attn.kv_b_proj.weight.val())?))
            });
        let layers = layers.collect::<Option<Vec<_>>>()?;
        let slots = cache.take_row()?;
        let layers = layers.into_iter().zip(slots).map(|((weights, kv_b_proj), filled)| {
            let filled = filled.into_data();
            let filled = filled.as_slice::<bf16>().expect("a model's latents have its dtype");
            let mut slots =
                Vec::with_capacity(filled.len() + tokens.min(MOST_FORESEEN) * weights.slot_width());
            slots.extend_from_slice(filled);
            Layer { weights, kv_b_proj, slots }
        });
        let pairs = text.model.rotary.pairs();
        Some(Self {
            embed_tokens,
            layers: layers.collect(),
            norm: text.model.norm.decode_norm(),
            lm_head,
            rotary: text.model.rotary.clone(),
            cos: vec![0.0; pairs],
            sin: vec![0.0; pairs],
            x: vec![bf16::ZERO; hidden],
            y: vec![bf16::ZERO; hidden],
            logits: vec![0.0; vocab],
        })
    }

    /// The logits behind one more token, which the caller may overwrite.
    ///
    /// # Shapes
    /// - output: `[V]`
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn step(&mut self, token: u32, position: i64) -> Result<&mut [f32]> {
        let (hidden, vocab) = (self.x.len(), self.logits.len());
        let Some(row) = values(&self.embed_tokens).chunks_exact(hidden).nth(token as usize) else {
            let (value, allowed) = (i64::from(token), format!("0..{vocab} (vocab_size)"));
            return Err(Error::Range { name: "input_ids", value, index: 0, allowed });
        };
        self.x.copy_from_slice(row);
        self.rotary.row(position, &mut self.cos, &mut self.sin);
        let query_scale = self.rotary.query_scale(position);
        let rotary = Rotary { cos: &self.cos, sin: &self.sin, query_scale };
        for Layer { weights, kv_b_proj, slots } in &mut self.layers {
            let filled = slots.len();
            slots.resize(filled + weights.slot_width(), bf16::ZERO);
            let (cached, own) = slots.split_at_mut(filled);
            let token = DecodeToken { x: &self.x, rotary, cached, kv_b: values(kv_b_proj) };
            decode_layer(weights, &token, &mut self.y, own);
            std::mem::swap(&mut self.x, &mut self.y);
        }
        decode_head(&self.norm, &self.lm_head, &self.x, &mut self.logits);
        Ok(&mut self.logits)
    }
}

/// The tensor as the CPU backend holds it; `None` where it is another backend's or tracked.
fn primitive(tensor: Tensor<2>) -> Option<FloatTensor<Flex>> {
    tensor.try_into_primitive::<Flex>().ok()
}

fn values(tensor: &FloatTensor<Flex>) -> &[bf16] {
    tensor.as_slice().expect("a contiguous tensor in bf16")
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use mistral4_checkpoint::config::{Config, ConfigFile, ConfigOptions};
    use mistral4_checkpoint::weights::DType;
    use serde_json::json;

    use super::Decoder;
    use crate::inputs::{ForwardOptions, LogitsToKeep, ModelInputs};
    use crate::model::moe::MoeOptions;
    use crate::weights::InitialSource;
    use crate::{LatentCache, Mistral4};

    /// Tokens go to all experts, because a choice between scores that differ by a rounding may fall either way.
    fn config(q_lora_rank: Option<usize>) -> Config {
        let raw = json!({
            "model_type": "mistral4", "vocab_size": 40, "hidden_size": 48, "intermediate_size": 56,
            "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
            "n_shared_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 4, "kv_lora_rank": 16,
            "q_lora_rank": q_lora_rank, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "initializer_range": 0.2, "max_position_embeddings": 256,
            "tie_word_embeddings": false,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5
            }
        });
        ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
    }

    /// The logits behind the last token of some inputs.
    fn last_logits(model: &Mistral4, inputs: &ModelInputs, cache: &mut LatentCache) -> Vec<f32> {
        let options = ForwardOptions { logits_to_keep: LogitsToKeep::Last(1), ..Default::default() };
        let logits = model.forward(inputs, Some(cache), &options).unwrap().logits.unwrap();
        logits.into_data_as::<f32>().try_into_vec().unwrap()
    }

    #[test]
    fn tokens_through_a_decoder_are_as_through_the_model() {
        for q_lora_rank in [Some(20), None] {
            let config = config(q_lora_rank);
            let source = InitialSource::new(&config, 11, DType::BF16);
            let model = Mistral4::new(&config, MoeOptions::default(), &source, &Device::flex()).unwrap();
            let prompt = ModelInputs::rows(vec![0, 0, 3, 1, 4, 1, 5], 1);
            let padded = prompt
                .clone()
                .with_attention_mask(vec![false, false, true, true, true, true, true])
                .with_position_ids(vec![0, 0, 0, 1, 2, 3, 4]);
            for (prompt, first) in [(prompt, 7), (padded, 5)] {
                let (mut cache, mut other) = (LatentCache::new(), LatentCache::new());
                assert!(Decoder::take_over(&model, &mut cache, 2).is_none(), "nothing was read");
                last_logits(&model, &prompt, &mut cache);
                assert!(Decoder::take_over(&model, &mut cache, 2).is_none(), "not frozen yet");
                assert_eq!(cache.len(), 7);
                let model = model.clone().pack();
                last_logits(&model, &prompt, &mut other);
                // More tokens than memory was taken for.
                let mut decoder = Decoder::take_over(&model, &mut cache, 2).unwrap();
                assert!(cache.is_empty());
                for (position, token) in (first..).zip([9, 2, 6, 5, 3, 5, 8]) {
                    let got = decoder.step(token, position).unwrap();
                    let inputs = ModelInputs::rows(vec![token], 1).with_position_ids(vec![position]);
                    let want = last_logits(&model, &inputs, &mut other);
                    let norm =
                        |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
                    let error = norm(&mut got.iter().zip(&want).map(|(got, want)| got - want));
                    let size = norm(&mut want.iter().copied());
                    // Both are off by up to 2e-2, each in its own way.
                    assert!(error < 2e-2 * 2.0f32.sqrt() * size, "{error} of {size}");
                }
                let error = decoder.step(40, 20).unwrap_err().to_string();
                assert!(error.contains("input_ids is 40") && error.contains("0..40"), "{error}");
            }
        }
    }

    #[test]
    fn several_rows_are_left_to_the_model() {
        let config = config(None);
        let source = InitialSource::new(&config, 11, DType::BF16);
        let model = Mistral4::new(&config, MoeOptions::default(), &source, &Device::flex()).unwrap().pack();
        let mut cache = LatentCache::new();
        last_logits(&model, &ModelInputs::rows(vec![1; 6], 2), &mut cache);
        assert!(Decoder::take_over(&model, &mut cache, 2).is_none());
        assert_eq!(cache.len(), 3);
    }
}
