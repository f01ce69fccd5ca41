//! What must hold whatever the weights: packing, padding, caching and the order of experts change nothing.

use burn::tensor::{Device, Tensor, TensorData};
use mistral4::checkpoint::config::{Config, ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::DType;
use mistral4::generate::{Generation, Request, SamplingOptions};
use mistral4::inputs::{ForwardOptions, Layout, LogitsToKeep, ModelInputs};
use mistral4::model::PREFILL_TOKENS;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::InitialSource;
use mistral4::{Images, LatentCache, Mistral4};
use proptest::prelude::*;
use serde_json::json;

/// A small model whose every part matters: a dense layer, groups of experts, YaRN, Llama-4 scaling that bites early.
fn config(multimodal: bool) -> Config {
    let text = json!({
        "model_type": "mistral4", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
        "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 12,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "initializer_range": 0.3, "max_position_embeddings": 256,
        "tie_word_embeddings": false,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5
        }
    });
    let raw = if multimodal {
        json!({
            "model_type": "mistral3", "text_config": text, "image_token_index": 10, "spatial_merge_size": 2,
            "tie_word_embeddings": false,
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_channels": 3, "image_size": 64, "patch_size": 4,
                "initializer_range": 0.3
            }
        })
    } else {
        text
    };
    ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
}

fn model(config: &Config) -> Mistral4 {
    let source = InitialSource::new(config, 7, DType::F32);
    Mistral4::new(config, MoeOptions::default(), &source, &Device::flex()).unwrap()
}

fn logits(model: &Mistral4, inputs: &ModelInputs) -> Vec<Vec<f32>> {
    rows(model.forward(inputs, None, &ForwardOptions::default()).unwrap().logits.unwrap())
}

fn rows(tensor: Tensor<2>) -> Vec<Vec<f32>> {
    let [_, width] = tensor.dims();
    let values: Vec<f32> = tensor.into_data().try_into_vec().unwrap();
    values.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

fn assert_same(what: &str, got: &[Vec<f32>], want: &[Vec<f32>]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (row, (got, want)) in got.iter().zip(want).enumerate() {
        let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= 3e-5 * scale, "{what}, row {row}: {g} against {w}");
        }
    }
}

fn sequences() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec(prop::collection::vec(0u32..50, 1..14), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn packed_sequences_are_as_if_alone(sequences in sequences()) {
        let model = model(&config(false));
        let mut cu_seqlens = vec![0];
        let mut want = Vec::new();
        for sequence in &sequences {
            cu_seqlens.push(cu_seqlens.last().unwrap() + sequence.len());
            want.extend(logits(&model, &ModelInputs::rows(sequence.clone(), 1)));
        }
        assert_same("packed", &logits(&model, &ModelInputs::packed(sequences.concat(), cu_seqlens)), &want);
    }

    #[test]
    fn padding_on_either_side_changes_nothing(sequences in sequences(), left in any::<bool>()) {
        let model = model(&config(false));
        let longest = sequences.iter().map(Vec::len).max().unwrap();
        let (mut ids, mut mask, mut positions, mut want) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for sequence in &sequences {
            let padding = longest - sequence.len();
            let before = if left { padding } else { 0 };
            for t in 0..longest {
                let token = t.checked_sub(before).and_then(|t| sequence.get(t));
                ids.push(*token.unwrap_or(&3));
                mask.push(token.is_some());
                positions.push(t.saturating_sub(before) as i64);
            }
            want.extend(logits(&model, &ModelInputs::rows(sequence.clone(), 1)));
        }
        let inputs = ModelInputs::rows(ids, sequences.len()).with_attention_mask(mask.clone()).with_position_ids(positions);
        let got: Vec<Vec<f32>> =
            logits(&model, &inputs).into_iter().zip(mask).filter(|(_, m)| *m).map(|(row, _)| row).collect();
        assert_same("padded", &got, &want);
    }

    #[test]
    fn cached_decoding_equals_the_full_pass(
        ids in prop::collection::vec(0u32..50, 2..24),
        cuts in prop::collection::vec(1usize..6, 1..12),
    ) {
        let model = model(&config(false));
        let want = logits(&model, &ModelInputs::rows(ids.clone(), 1));
        let mut cache = LatentCache::new();
        let (mut got, mut start, mut cuts) = (Vec::new(), 0, cuts.into_iter().cycle());
        while start < ids.len() {
            let end = (start + cuts.next().unwrap()).min(ids.len());
            let inputs = ModelInputs::rows(ids[start..end].to_vec(), 1);
            let out = model.forward(&inputs, Some(&mut cache), &ForwardOptions::default()).unwrap();
            got.extend(rows(out.logits.unwrap()));
            start = end;
        }
        prop_assert_eq!(cache.len(), ids.len());
        // 3 layers of R + rope = 16 + 8 f32 values a slot, and nothing an expanded key or value would take.
        prop_assert_eq!(cache.bytes() % (3 * (16 + 8) * 4), 0);
        prop_assert!((ids.len()..2 * ids.len() + 300).contains(&(cache.bytes() / (3 * (16 + 8) * 4))));
        assert_same("cached", &got, &want);
    }

    #[test]
    fn a_batch_generates_what_each_prompt_generates_alone(sequences in sequences(), temperature in 0.0f64..1.5) {
        let model = model(&config(false));
        let request = |ids: &Vec<u32>| Request {
            input_ids: ids.clone(),
            images: None,
            sampling: SamplingOptions { temperature, seed: 5, ..Default::default() },
            max_new_tokens: 6,
            stop_tokens: vec![17],
        };
        let finish = |requests: Vec<Request>| {
            let count = requests.len();
            let mut generation = Generation::new(&model, requests).unwrap();
            while !generation.step().unwrap().is_empty() {}
            (0..count).map(|row| generation.generated(row).to_vec()).collect::<Vec<_>>()
        };
        let together = finish(sequences.iter().map(request).collect());
        let alone: Vec<_> = sequences.iter().flat_map(|ids| finish(vec![request(ids)])).collect();
        prop_assert_eq!(together, alone);
    }
}

#[test]
fn the_explicit_causal_mask_is_the_default_one() {
    let model = model(&config(false));
    let ids: Vec<u32> = (0..12).collect();
    let mask: Vec<f32> =
        (0..2 * 6 * 6).map(|i| if i % 6 > i / 6 % 6 { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::<4>::from_data(TensorData::new(mask, [2, 1, 6, 6]), &Device::flex());
    let want = logits(&model, &ModelInputs::rows(ids.clone(), 2));
    let got = logits(&model, &ModelInputs::rows(ids, 2).with_explicit_mask(mask));
    assert_same("explicit mask", &got, &want);
}

#[test]
fn a_mask_with_holes_hides_exactly_the_holes() {
    let model = model(&config(false));
    let ids: Vec<u32> = vec![4, 9, 22, 31, 8, 40];
    let mask = vec![true, true, false, true, true, true];
    let positions = vec![0, 1, 2, 2, 3, 4];
    let inputs = ModelInputs::rows(ids, 1).with_attention_mask(mask).with_position_ids(positions);
    let got = logits(&model, &inputs);
    let want = logits(&model, &ModelInputs::rows(vec![4, 9, 31, 8, 40], 1));
    assert_same("holes", &[&got[..2], &got[3..]].concat(), &want);
}

#[test]
fn permuting_experts_with_their_router_rows_changes_nothing() {
    let config = config(false);
    let plain = model(&config);
    let order = [1usize, 0, 3, 2, 5, 4, 7, 6];
    let permute = |values: Tensor<1>| {
        let count = values.dims()[0];
        let stride = count / order.len();
        let parts =
            order.iter().map(|&e| values.clone().slice_dim(0, e * stride..(e + 1) * stride)).collect();
        Tensor::cat(parts, 0)
    };
    let permuted = plain.clone().map_parameters(|key, _, values| {
        let stacked = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"];
        if stacked.iter().any(|name| key.ends_with(name)) { permute(values) } else { values }
    });
    let inputs = ModelInputs::rows((0..20).collect(), 2);
    assert_same("permuted experts", &logits(&permuted, &inputs), &logits(&plain, &inputs));
}

#[test]
fn logits_to_keep_and_embeddings_agree_with_the_whole() {
    let model = model(&config(false));
    let inputs = ModelInputs::rows((0..14).collect(), 2);
    let all = logits(&model, &inputs);
    let keep = |logits_to_keep| {
        let options = ForwardOptions { logits_to_keep, ..Default::default() };
        rows(model.forward(&inputs, None, &options).unwrap().logits.unwrap())
    };
    assert_eq!(keep(LogitsToKeep::Last(2)), [&all[5..7], &all[12..14]].concat());
    assert_eq!(
        keep(LogitsToKeep::Indices(vec![0, 3])),
        [&all[0..1], &all[3..4], &all[7..8], &all[10..11]].concat()
    );
    let embeds = model.text().model.embed_ids(inputs.input_ids.as_ref().unwrap());
    let by_embeds = ModelInputs::embeddings(embeds, Layout::Rows { batch: 2, sequence: 7 });
    assert_eq!(logits(&model, &by_embeds), all);
}

#[test]
fn images_of_other_sizes_in_one_batch_do_not_touch_each_other() {
    let model = model(&config(true));
    let device = Device::flex();
    let picture = |seed: usize, h: usize, w: usize| {
        let data: Vec<f32> = (0..3 * h * w).map(|i| ((i * 37 + seed) % 101) as f32 / 50.0 - 1.0).collect();
        let pixel_values = Tensor::<4>::from_data(TensorData::new(data, [1, 3, h, w]), &device);
        Images { pixel_values, image_sizes: vec![(h, w)] }
    };
    // 16 x 8 pixels: 4 x 2 patches, merged 2 x 1; 8 x 24: 1 x 3.
    let (tall, wide) = (picture(1, 16, 8), picture(2, 8, 24));
    let tall_ids = vec![1u32, 10, 12, 10, 13, 20];
    let wide_ids = vec![1u32, 10, 10, 10, 13, 21];
    let alone = |ids: &[u32], images: &Images| {
        logits(&model, &ModelInputs::rows(ids.to_vec(), 1).with_images(images.clone()))
    };
    let want = [alone(&tall_ids, &tall), alone(&wide_ids, &wide)].concat();
    let both = Images::join(vec![tall, wide]).unwrap();
    let inputs = ModelInputs::rows([tall_ids, wide_ids].concat(), 2).with_images(both);
    assert_same("two images", &logits(&model, &inputs), &want);
}

#[test]
fn wrong_inputs_are_named() {
    let text = model(&config(false));
    let eyes = model(&config(true));
    let message = |model: &Mistral4, inputs: ModelInputs| {
        model.forward(&inputs, None, &ForwardOptions::default()).unwrap_err().to_string()
    };
    let pixels = Tensor::<4>::zeros([1, 3, 8, 8], &Device::flex());
    let images = Images { pixel_values: pixels, image_sizes: vec![(8, 8)] };
    assert!(
        message(&text, ModelInputs::rows(vec![1, 50], 1))
            .contains("input_ids is 50 at index 1, allowed is 0..50")
    );
    let mut neither = ModelInputs::rows(vec![1], 1);
    neither.input_ids = None;
    assert!(message(&text, neither).contains("got neither"));
    assert!(
        message(&text, ModelInputs::rows(vec![1], 1).with_images(images.clone())).contains("no vision tower")
    );
    let two_tokens = ModelInputs::rows(vec![10, 10, 3], 1).with_images(images.clone());
    assert!(message(&eyes, two_tokens).contains("2 image tokens (id 10), but the images give 1 features"));
    let short = ModelInputs::rows(vec![1, 2], 1).with_position_ids(vec![0]);
    assert!(message(&text, short).contains("position_ids has 1 entries, expected 2"));
    assert!(
        message(&text, ModelInputs::packed(vec![1, 2], vec![0, 2, 1])).contains("cu_seqlens is 1 at index 2")
    );
    let too_large = Images { image_sizes: vec![(8, 12)], ..images };
    assert!(
        message(&eyes, ModelInputs::rows(vec![10], 1).with_images(too_large)).contains("image_sizes is 12")
    );
}

#[test]
fn the_gate_bias_moves_towards_an_even_load() {
    let mut model = model(&config(false));
    let text = model.text_mut();
    text.model.update_moe_gate_bias(&[(1, vec![8, 0, 4, 4, 4, 4, 4, 4])], 1e-2);
    let parameters = model.parameters();
    let bias = |layer: usize| {
        let key = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
        let found = parameters.iter().find(|p| p.key == key).unwrap();
        assert!(!found.trainable, "the bias is moved by its own rule, not by gradients");
        found.values.clone().into_data().try_into_vec::<f32>().unwrap()
    };
    assert_eq!(bias(1), [-1e-2, 1e-2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(bias(2), [0.0; 8]);
}

#[test]
fn the_balanced_gate_gives_every_expert_the_same_load_and_padding_counts_nowhere() {
    let config = config(false);
    let source = InitialSource::new(&config, 7, DType::F32);
    let run = |fake_balanced_gate, mask: Option<Vec<bool>>| {
        let options = MoeOptions { fake_balanced_gate, ..Default::default() };
        let model = Mistral4::new(&config, options, &source, &Device::flex()).unwrap();
        let mut inputs = ModelInputs::rows((0..16).collect(), 2);
        inputs.attention_mask = mask;
        let options = ForwardOptions { output_routing: true, ..Default::default() };
        model.forward(&inputs, None, &options).unwrap().routing
    };
    for (_, routing) in run(true, None) {
        assert_eq!(routing.load, [4; 8]);
    }
    let mut mask = vec![true; 16];
    mask[13..].fill(false);
    for (layer, routing) in run(false, Some(mask)) {
        assert_eq!(routing.load.iter().sum::<u64>(), 13 * 2, "layer {layer}");
    }
}

#[test]
fn parameters_carry_the_names_of_the_checkpoint() {
    for multimodal in [false, true] {
        let config = config(multimodal);
        let mut got: Vec<_> = model(&config).parameters().into_iter().map(|p| (p.key, p.shape)).collect();
        let mut want: Vec<_> = mistral4::checkpoint::weights::names::tensors(&config)
            .into_iter()
            .map(|spec| (spec.key, spec.shape))
            .collect();
        got.sort();
        want.sort();
        assert_eq!(got, want);
    }
}

/// The first piece begins the cache, the others continue it; the last token then continues all of them.
#[test]
fn a_long_prompt_read_in_pieces_is_as_if_read_at_once() {
    let model = model(&config(false));
    let length = 2 * PREFILL_TOKENS + 77;
    let ids: Vec<u32> = (0..length as u32).map(|i| i * i % 50).collect();
    let last = ForwardOptions { logits_to_keep: LogitsToKeep::Last(1), ..Default::default() };
    let prompt = ModelInputs::rows(ids, 1);
    let (mut whole, mut pieces) = (LatentCache::new(), LatentCache::new());
    let want = model.forward(&prompt, Some(&mut whole), &last).unwrap();
    let got = model.prefill(&prompt, &mut pieces, &last).unwrap();
    assert_eq!(pieces.len(), length);
    assert_same("prompt", &rows(got.logits.unwrap()), &rows(want.logits.unwrap()));
    let next = |cache| {
        rows(model.forward(&ModelInputs::rows(vec![7], 1), Some(cache), &last).unwrap().logits.unwrap())
    };
    assert_same("next token", &next(&mut pieces), &next(&mut whole));
}
