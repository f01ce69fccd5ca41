//! The tiny models and their micro-batches.

use burn::tensor::{DType, Device, Tensor, TensorData};
use mistral4::checkpoint::adapter::{Adapter, LoraSettings};
use mistral4::checkpoint::config::{Config, ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::{DType as StorageDType, HostTensor};
use mistral4::model::dropout::DropoutPosition;
use mistral4::weights::{InitialSource, ParameterSource};
use mistral4::{Images, ModelInputs};
use mistral4_train::backward::LabelledInputs;
use serde_json::{Value, json};

/// A configuration with what a step reads.
pub(crate) struct TinyModel {
    pub(crate) name: &'static str,
    pub(crate) config: Config,
    pub(crate) batches: Vec<LabelledInputs>,
    /// The adapters that are trained in place of the weights, and where they drop values.
    pub(crate) adapter: Option<(Adapter, DropoutPosition)>,
}

impl TinyModel {
    /// The weights of the model, or of its base.
    pub(crate) fn source(&self) -> InitialSource<'_> {
        InitialSource::new(&self.config, 3, StorageDType::F32)
    }

    /// The same model with adapters that change something and are trained.
    pub(crate) fn adapted(self, settings: &LoraSettings, position: DropoutPosition) -> Self {
        let source = self.source();
        let weight = |target: &mistral4::checkpoint::adapter::Target| {
            source.tensor(&target.weight_key(), &target.shape, true)
        };
        let adapter = settings.adapter::<mistral4::Error>(&self.config, 9, StorageDType::F32, weight);
        let mut adapter = adapter.unwrap();
        for lora in adapter.modules.values_mut() {
            let values = (0..lora.b.len()).map(|i| ((i * 37 % 23) as f32 - 11.0) / 40.0).collect();
            lora.b = HostTensor::f32(lora.b.shape.clone(), values);
        }
        Self { adapter: Some((adapter, position)), ..self }
    }
}

const TEXT_WIDTHS: &str = r#"{
    "model_type": "mistral4", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
    "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 12, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 8, "first_k_dense_replace": 1, "initializer_range": 0.3,
    "max_position_embeddings": 64, "tie_word_embeddings": false, "pad_token_id": 11,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
}"#;

fn config(raw: Value) -> Config {
    ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
}

fn text_json(change: Value) -> Value {
    let mut raw: Value = serde_json::from_str(TEXT_WIDTHS).unwrap();
    for (key, value) in change.as_object().unwrap() {
        raw[key] = value.clone();
    }
    raw
}

/// Packed sequences, one of the micro-batches a single token long.
pub(crate) fn text() -> TinyModel {
    let config = config(text_json(json!({"q_lora_rank": null})));
    let batches = [(30, 12), (17, 16), (1, 1), (24, 5)]
        .iter()
        .enumerate()
        .map(|(seed, &(tokens, first))| {
            let ends = if first < tokens { vec![0, first, tokens] } else { vec![0, tokens] };
            batch(ModelInputs::packed(ids(seed, tokens), ends))
        })
        .collect();
    TinyModel { name: "text", config, batches, adapter: None }
}

/// Rows with images in the first and last micro-batch alone, biases, and padding in the second.
pub(crate) fn multimodal() -> TinyModel {
    let text = text_json(json!({"attention_bias": true, "n_shared_experts": 2}));
    let config = config(json!({
        "model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": false,
        "projector_hidden_act": "gelu", "spatial_merge_size": 2, "vision_feature_layer": -1,
        "tie_word_embeddings": false, "text_config": text,
        "vision_config": {
            "model_type": "pixtral", "head_dim": 8, "hidden_act": "gelu", "hidden_size": 16, "image_size": 32,
            "initializer_range": 0.3, "intermediate_size": 24, "num_attention_heads": 2, "num_channels": 3,
            "num_hidden_layers": 2, "patch_size": 4,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
        }
    }));
    let rows = |seed: usize, sequence: usize| ModelInputs::rows(ids(seed, 2 * sequence), 2);
    let mut first = rows(5, 14);
    put_images(&mut first, &[(16, 24), (8, 8)]);
    let mut padded = rows(6, 9);
    let mask: Vec<bool> = (0..18).map(|i| i % 9 < 6).collect();
    padded.attention_mask = Some(mask.clone());
    let mut padded = batch(padded);
    padded.labels.iter_mut().zip(mask).filter(|(_, seen)| !seen).for_each(|(label, _)| *label = -100);
    let mut last = rows(8, 10);
    put_images(&mut last, &[(8, 16)]);
    let batches = vec![batch(first), padded, batch(rows(7, 4)), batch(last)];
    TinyModel { name: "multimodal", config, batches, adapter: None }
}

fn ids(seed: usize, count: usize) -> Vec<u32> {
    // Token 10 stands for images.
    let id = |i: usize| (i * i * 7 + i * 3 + seed * 13) % 40;
    (0..count).map(|i| if id(i) == 10 { 12 } else { id(i) as u32 }).collect()
}

fn batch(inputs: ModelInputs) -> LabelledInputs {
    let count = inputs.input_ids.as_ref().unwrap().len();
    let label = |i: usize| if i % 5 == 4 { -100 } else { ((i * 11 + 3) % 40) as i64 };
    LabelledInputs::plain(inputs, (0..count).map(label).collect())
}

/// Images of these heights and widths, and their tokens at the beginning of the ids.
fn put_images(inputs: &mut ModelInputs, sizes: &[(usize, usize)]) {
    let (height, width) =
        (sizes.iter().map(|s| s.0).max().unwrap(), sizes.iter().map(|s| s.1).max().unwrap());
    let shape = [sizes.len(), 3, height, width];
    let pixels: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 17) as f32 / 8.0 - 1.0).collect();
    let pixels = Tensor::from_data(TensorData::new(pixels, shape), (&Device::flex(), DType::F32));
    inputs.images = Some(Images { pixel_values: pixels, image_sizes: sizes.to_vec() });
    // A merged patch is 8 pixels a side.
    let tokens: usize = sizes.iter().map(|(h, w)| h / 8 * (w / 8)).sum();
    inputs.input_ids.as_mut().unwrap()[..tokens].fill(10);
}
