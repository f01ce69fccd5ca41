//! Fifty steps against transformers and torch's AdamW, and the two ways of finding activations against each other.
//!
//! The fixtures are made by `tools/golden/training.py` and, where there are images or adapters, `tools/golden/adapters.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::{Device, Tensor, TensorData};
use mistral4::checkpoint::adapter::Adapter;
use mistral4::checkpoint::config::{Config, ConfigFile, ConfigOptions, SoftmaxScalePolicy};
use mistral4::checkpoint::weights::{Checkpoint, DType};
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{AdaptedSource, CheckpointSource, InitialSource, ParameterSource};
use mistral4::{Images, Mistral4, ModelInputs};
use mistral4_train::backward::{Activations, Gradients, LabelledInputs, LossScale, forward_backward};
use mistral4_train::optim::{Optimizer, StepFactors};
use mistral4_train::recipe::{Override, Recipe};
use mistral4_train::trainer;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/training")
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Trains a fixture and compares every step's loss, gradient norm and rate.
fn follow(case: &str, expected: &str, more: &[(&str, &str)]) {
    let case = fixtures().join(case);
    let out = tempfile::tempdir().unwrap();
    let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
    let mut overrides = vec![
        set("model.pretrained_model_name_or_path", case.join("model").to_str().unwrap()),
        set("dataset.path_or_dataset", case.join("unshifted.jsonl").to_str().unwrap()),
        set("checkpoint.checkpoint_dir", out.path().to_str().unwrap()),
    ];
    overrides.extend(more.iter().map(|(key, value)| set(key, value)));
    let recipe = Recipe::load(&fixtures().join("recipe.yaml"), &overrides).unwrap();
    let run = trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |_| {}).unwrap();

    let want = lines(&case.join(expected));
    let got = lines(&out.path().join("training.jsonl"));
    assert_eq!((got.len(), run.steps.len()), (want.len(), want.len()));
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got["step"], want["step"]);
        assert_eq!(got["num_label_tokens"], want["num_label_tokens"]);
        for (key, wanted, tolerance) in
            [("loss", "loss", 1e-4), ("grad_norm", "grad_norm", 1e-3), ("lr", "lr_applied", 1e-9)]
        {
            let (g, w) = (got[key].as_f64().unwrap(), want[wanted].as_f64().unwrap());
            assert!((g - w).abs() <= tolerance * w.abs(), "step {}: {key} {g} against {w}", got["step"]);
        }
    }
    assert!(run.checkpoint.unwrap().join("model/consolidated/config.json").is_file());
    assert!(out.path().join("LATEST").exists());
}

#[test]
fn a_text_model_trains_like_transformers() {
    follow("text", "training.jsonl", &[]);
}

#[test]
fn a_multimodal_model_trains_like_transformers() {
    let target = "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained";
    follow("multimodal", "training.jsonl", &[("model._target_", target)]);
}

#[test]
fn two_micro_batches_are_one_batch() {
    follow("text", "training_local_batch_size_2.jsonl", &[("step_scheduler.local_batch_size", "2")]);
}

#[test]
fn recomputed_activations_train_alike() {
    follow("text", "training.jsonl", &[("distributed.activation_checkpointing", "true")]);
}

/// The tensors of a safetensors file: shape and bytes.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(key, view): (String, safetensors::tensor::TensorView)| {
        (key, (view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(tensor).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// A batch whose tensors' names begin with `prefix`, labels moved to the place of the token before.
fn batch_of(tensors: &BTreeMap<String, (Vec<usize>, Vec<u8>)>, prefix: &str) -> LabelledInputs {
    let integers = |name: &str| -> Vec<i64> {
        let bytes = &tensors[&format!("{prefix}{name}")].1;
        bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    };
    let [rows, length] = tensors[&format!("{prefix}input_ids")].0[..] else { panic!("rows of ids") };
    let mut inputs = ModelInputs::rows(integers("input_ids").into_iter().map(|id| id as u32).collect(), rows);
    if tensors.contains_key(&format!("{prefix}attention_mask")) {
        inputs = inputs.with_attention_mask(integers("attention_mask").into_iter().map(|m| m == 1).collect());
    }
    if let Some((shape, bytes)) = tensors.get(&format!("{prefix}pixel_values")) {
        let pixels = TensorData::new(floats(bytes), shape.clone());
        let sizes = integers("image_sizes");
        inputs.images = Some(Images {
            pixel_values: Tensor::from_data(pixels, &Device::flex()),
            image_sizes: sizes.chunks_exact(2).map(|size| (size[0] as usize, size[1] as usize)).collect(),
        });
    }
    let labels = integers("labels");
    let next = |i: usize| if i % length == length - 1 { -100 } else { labels[i + 1] };
    LabelledInputs::plain(inputs, (0..labels.len()).map(next).collect())
}

#[test]
fn gradients_with_z_losses_are_those_of_transformers() {
    let golden = tensors(&fixtures().join("z_losses.safetensors"));
    for case in ["labels_ignored", "right_padding"] {
        let folder = fixtures().join("../model").join(case);
        let options = ConfigOptions { softmax_scale: Some(SoftmaxScalePolicy::Standard) };
        let checkpoint = Checkpoint::open(&folder.join("model"), &options).unwrap();
        let source = CheckpointSource { checkpoint: &checkpoint, dtype: DType::F32 };
        let moe = MoeOptions { router_z_loss_coeff: 0.07, ..MoeOptions::default() };
        let model = Mistral4::new(checkpoint.config(), moe, &source, &Device::flex()).unwrap();
        let batch = batch_of(&tensors(&folder.join("inputs.safetensors")), "");
        let tokens = batch.labels.iter().filter(|&&label| label >= 0).count() as f64;
        let scale = LossScale { per_token: 1.0 / tokens, z_loss: 0.03, aux: 1.0 };
        for activations in [Activations::Kept, Activations::Recomputed] {
            let mut gradients = Gradients::default();
            let measured = forward_backward(&model, &batch, scale, activations, &mut gradients).unwrap();
            let losses = [("z_loss", measured.z_loss / tokens), ("router_z_loss", measured.router_z_loss)];
            for (name, is) in losses {
                let want = f64::from(floats(&golden[&format!("{case}/{name}")].1)[0]);
                assert!((is - want).abs() < 1e-5 * want, "{case}: {name} {is} against {want}");
            }
            let prefix = format!("{case}/grad.");
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            let mut compared = 0;
            for (key, (_, bytes)) in &golden {
                let Some(key) = key.strip_prefix(&prefix) else { continue };
                let want = floats(bytes);
                let Some(got) = gradients.get(key) else {
                    assert!(want.iter().all(|&value| value == 0.0), "{case}: {key} has no gradient");
                    continue;
                };
                let got = got.clone().into_data().try_into_vec::<f32>().unwrap();
                let difference = norm(&mut got.iter().zip(&want).map(|(got, want)| got - want));
                let size = norm(&mut want.iter().copied());
                assert!(difference <= 1e-4 * size, "{case}: {key}: {difference} of {size}");
                compared += 1;
            }
            assert!(compared > 20, "{case}: {compared} gradients");
        }
    }
}

/// Takes the steps of a fixture, with its adapter if it has one, and compares every step's loss and gradient norm.
fn follow_batches(case: &str, activations: Activations) {
    let case = fixtures().join(case);
    let options = ConfigOptions { softmax_scale: Some(SoftmaxScalePolicy::Standard) };
    let checkpoint = Checkpoint::open(&case.join("model"), &options).unwrap();
    let base = CheckpointSource { checkpoint: &checkpoint, dtype: DType::F32 };
    let build = |source: &dyn ParameterSource| {
        Mistral4::new(checkpoint.config(), MoeOptions::default(), source, &Device::flex()).unwrap()
    };
    let adapter = case.join("adapter");
    let mut model = match adapter.is_dir() {
        true => {
            let adapter = Adapter::open(&adapter, checkpoint.config()).unwrap();
            build(&AdaptedSource::new(&base, &adapter)).freeze_base()
        }
        false => build(&base),
    };
    let description: Value = serde_json::from_slice(&std::fs::read(case.join("case.json")).unwrap()).unwrap();
    let settings = &description["optimizer"];
    let recipe = format!(
        "recipe: FinetuneRecipeForVLM\nmodel: {{config: tiny}}\ndataset: {{_target_: optdigits}}\n\
         optimizer: {{_target_: AdamW, lr: {}, betas: {}, eps: {}, weight_decay: {}}}\n",
        settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"]
    );
    let recipe = Recipe::parse("recipe.yaml", recipe.as_bytes(), &[], &|_| None).unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    let mut optimizer = Optimizer::new(recipe.optimizer);
    let steps = tensors(&case.join("steps.safetensors"));
    let want = lines(&case.join("training.jsonl"));
    assert_eq!(want.len(), 50);
    for (step, want) in want.iter().enumerate() {
        let batch = batch_of(&steps, &format!("{step}."));
        let tokens = batch.labels.iter().filter(|&&label| label >= 0).count() as f64;
        let mut gradients = Gradients::default();
        let scale = LossScale { per_token: 1.0 / tokens, z_loss: 0.0, aux: 0.0 };
        let measured = forward_backward(&model, &batch, scale, activations, &mut gradients).unwrap();
        let (loss, norm) = (measured.loss_sum / tokens, gradients.norm());
        for (name, is, tolerance) in [("loss", loss, 1e-3), ("grad_norm", norm, 1e-2)] {
            let want = number(&want[name]);
            assert!((is - want).abs() <= tolerance * want, "step {step}: {name} {is} against {want}");
        }
        let factors = StepFactors {
            lr: number(&settings["lr"]),
            weight_decay: number(&settings["weight_decay"]),
            grad_scale: (number(&settings["max_norm"]) / (norm + 1e-6)).min(1.0),
        };
        model = optimizer.step(model, gradients, factors);
    }
    let (first, last) = (number(&want[0]["loss"]), number(&want[49]["loss"]));
    assert!(last < 0.6 * first, "the reference learns: {first} to {last}");
}

#[test]
fn a_model_with_images_trains_like_transformers() {
    follow_batches("images", Activations::Kept);
}

#[test]
fn adapters_of_a_text_model_train_like_peft() {
    follow_batches("text_lora", Activations::Kept);
    follow_batches("text_lora", Activations::Recomputed);
}

#[test]
fn adapters_of_a_model_with_images_train_like_peft() {
    follow_batches("images_lora", Activations::Kept);
}

fn config() -> Config {
    let raw = serde_json::json!({
        "model_type": "mistral4", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
        "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 12, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 8, "first_k_dense_replace": 1, "initializer_range": 0.3,
        "max_position_embeddings": 64, "tie_word_embeddings": false, "pad_token_id": 11,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
    });
    ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
}

fn model(aux_loss_coeff: f64) -> Mistral4 {
    let config = config();
    let source = InitialSource::new(&config, 3, DType::F32);
    let moe = MoeOptions { aux_loss_coeff, ..Default::default() };
    Mistral4::new(&config, moe, &source, &Device::flex()).unwrap()
}

fn batch() -> LabelledInputs {
    // Token 11 is padding to the model, yet stands among the tokens here.
    let ids: Vec<u32> = (0..30).map(|i| if i == 7 { 11 } else { i * 7 % 40 }).collect();
    let labels = (0..30).map(|i| if i % 5 == 4 { -100 } else { (i * 11 + 3) % 40 }).collect();
    LabelledInputs::plain(ModelInputs::packed(ids, vec![0, 12, 30]), labels)
}

fn gradients(model: &Mistral4, activations: Activations) -> (f64, BTreeMap<String, Vec<f32>>) {
    let mut gradients = Gradients::default();
    let scale = LossScale { per_token: 1.0 / 24.0, z_loss: 0.0, aux: 1.0 };
    let measured = forward_backward(model, &batch(), scale, activations, &mut gradients).unwrap();
    let values = |t: &Tensor<1>| t.clone().into_data().try_into_vec::<f32>().unwrap();
    let all = gradients.iter().map(|(key, gradient)| (key.to_owned(), values(gradient))).collect();
    (measured.loss_sum + measured.aux_loss, all)
}

#[test]
fn layer_by_layer_gives_the_gradients_of_the_whole() {
    for aux in [0.0, 0.1] {
        let model = model(aux);
        let (whole_loss, whole) = gradients(&model, Activations::Kept);
        let (layered_loss, layered) = gradients(&model, Activations::Recomputed);
        assert!((whole_loss - layered_loss).abs() < 1e-5);
        assert_eq!(whole.keys().collect::<Vec<_>>(), layered.keys().collect::<Vec<_>>());
        for (key, whole) in &whole {
            let norm = whole.iter().map(|v| v * v).sum::<f32>().sqrt();
            let diff = whole.iter().zip(&layered[key]).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            assert!(diff <= 1e-5 * norm + 1e-9, "{key}: {diff} of {norm}");
        }
    }
}

#[test]
fn the_load_balancing_loss_reaches_the_router_and_is_one_when_even() {
    let (_, without) = gradients(&model(0.0), Activations::Kept);
    let (_, with) = gradients(&model(1.0), Activations::Kept);
    let gate = "model.layers.1.mlp.gate.weight";
    assert!(without[gate].iter().zip(&with[gate]).any(|(a, b)| (a - b).abs() > 1e-4));
    // With scores all alike, E * sum f_e p_e is 1 for any load.
    let flat = model(1.0).map_parameters(|key, _, values| match key.ends_with("gate.weight") {
        true => values.zeros_like(),
        false => values,
    });
    let mut sink = Gradients::default();
    let scale = LossScale { per_token: 1.0, z_loss: 0.0, aux: 1.0 };
    let measured = forward_backward(&flat, &batch(), scale, Activations::Kept, &mut sink).unwrap();
    assert!((measured.aux_loss - 2.0).abs() < 1e-5, "two mixture layers: {}", measured.aux_loss);
}

#[test]
fn the_padding_tokens_embedding_is_not_trained() {
    let (_, all) = gradients(&model(0.0), Activations::Kept);
    let rows: Vec<&[f32]> = all["model.embed_tokens.weight"].chunks_exact(24).collect();
    assert!(rows[11].iter().all(|&g| g == 0.0), "padding");
    assert!(rows[7].iter().any(|&g| g != 0.0), "a token of the batch");
}

#[test]
fn frozen_parameters_get_no_gradient_and_do_not_change_the_others() {
    let (_, all) = gradients(&model(0.0), Activations::Kept);
    for activations in [Activations::Kept, Activations::Recomputed] {
        let frozen = model(0.0).freeze(|key| key.contains("experts") || key.contains("embed_tokens"));
        let (_, some) = gradients(&frozen, activations);
        assert!(some.keys().all(|key| !key.contains("experts") && !key.contains("embed_tokens")));
        assert!(some.len() < all.len());
        let key = "model.layers.0.self_attn.q_a_proj.weight";
        let diff = all[key].iter().zip(&some[key]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(diff < 1e-6, "{diff}");
    }
}

#[test]
fn parameters_that_move_during_the_backward_pass_end_alike() {
    let more = [("clip_grad_norm", "null"), ("step_scheduler.max_steps", "6")];
    let losses = |in_bwd: &str, recomputed: &str| {
        let case = fixtures().join("text");
        let out = tempfile::tempdir().unwrap();
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let mut overrides = vec![
            set("model.pretrained_model_name_or_path", case.join("model").to_str().unwrap()),
            set("dataset.path_or_dataset", case.join("unshifted.jsonl").to_str().unwrap()),
            set("checkpoint.checkpoint_dir", out.path().to_str().unwrap()),
            set("optimizer_in_bwd", in_bwd),
            set("distributed.activation_checkpointing", recomputed),
        ];
        overrides.extend(more.iter().map(|(key, value)| set(key, value)));
        let recipe = Recipe::load(&fixtures().join("recipe.yaml"), &overrides).unwrap();
        let run = trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |_| {}).unwrap();
        run.steps.iter().map(|step| (step.loss.to_bits(), step.grad_norm)).collect::<Vec<_>>()
    };
    for recomputed in ["true", "false"] {
        let (on_the_way, after) = (losses("true", recomputed), losses("false", recomputed));
        assert_eq!(on_the_way.len(), 6);
        for (a, b) in on_the_way.iter().zip(&after) {
            assert_eq!(a.0, b.0);
            assert!((a.1 - b.1).abs() < 1e-9 * b.1, "{} against {}", a.1, b.1);
        }
    }
}

#[test]
fn what_the_whole_gradient_is_needed_for_is_refused_during_the_backward_pass() {
    let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
    let load = |more: &[Override]| Recipe::load(&fixtures().join("recipe.yaml"), more);
    let error = load(&[set("optimizer_in_bwd", "true")]).unwrap_err().to_string();
    assert!(error.contains("no clip_grad_norm"), "{error}");
    let fitting = [set("optimizer_in_bwd", "true"), set("clip_grad_norm", "null")];
    load(&fitting).unwrap();
    let mut skipping = fitting.to_vec();
    skipping.push(set("step_scheduler.on_non_finite", "skip"));
    let error = load(&skipping).unwrap_err().to_string();
    assert!(error.contains("cannot be skipped"), "{error}");
}
