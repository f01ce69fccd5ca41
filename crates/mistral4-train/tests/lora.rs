//! Runs that train adapters: what they cost, what they save, and that they go on bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor};
use mistral4::checkpoint::adapter::{self, Adapter, LoraSettings};
use mistral4::checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::{
    Bits, Checkpoint, DType, HostTensor, SaveDType, SaveOptions, WeightFormat, WeightQuantization, convert,
};
use mistral4::model::dropout::{DropoutPosition, DropoutSeed};
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{
    AdaptedSource, CheckpointSource, InitialSource, ParameterSource, QuantizedSource, adapter_of,
};
use mistral4::{ForwardOptions, LatentCache, Mistral4, ModelInputs};
use mistral4_kernels::StackDims;
use mistral4_train::Error;
use mistral4_train::backward::{
    Activations, Gradients, LabelledInputs, LossScale, evaluate, forward_backward,
};
use mistral4_train::recipe::{Override, Recipe};
use mistral4_train::trainer::{self, Event, Run};

const RECIPE: &str = "
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 4, local_batch_size: 2, max_steps: 10, num_epochs: 100, ckpt_every_steps: 100}
rng: {seed: 5}
model: {_target_: NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: base}
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, target_modules: ['*'], dim: 4, alpha: 8, moe_rank_scaling: true}
checkpoint: {checkpoint_dir: run}
dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}
validation_dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 7, num_samples: 5}
optimizer: {_target_: AdamW, lr: 1.0e-2, betas: [0.9, 0.95], weight_decay: 0.1}
clip_grad_norm: {max_norm: 1.0}
";

fn config() -> ConfigFile {
    let raw = serde_json::json!({
        "model_type": "mistral4", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "initializer_range": 0.3,
        "max_position_embeddings": 64, "tie_word_embeddings": false, "pad_token_id": 11,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
    });
    ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap()
}

fn base_model(config: &ConfigFile) -> Mistral4 {
    let source = InitialSource::new(&config.config, 3, DType::F32);
    Mistral4::new(&config.config, MoeOptions::default(), &source, &Device::flex()).unwrap()
}

/// A folder with a base model, in which runs are made.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let options = SaveOptions { dtype: SaveDType::Float(DType::F32), ..SaveOptions::default() };
        base_model(&config()).save(&place.path("base"), &config(), &options).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn recipe(&self, run: &str, more: &[(&str, &str)]) -> Recipe {
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let mut overrides = vec![
            set("model.pretrained_model_name_or_path", self.path("base").to_str().unwrap()),
            set("checkpoint.checkpoint_dir", self.path(run).to_str().unwrap()),
        ];
        overrides.extend(more.iter().map(|(key, value)| set(key, value)));
        Recipe::parse("recipe.yaml", RECIPE.as_bytes(), &overrides, &|_| None).unwrap()
    }

    fn train(&self, run: &str, more: &[(&str, &str)]) -> Result<Run, Box<Error>> {
        self.train_until(run, more, usize::MAX)
    }

    /// Trains, and asks the run to stop after the step `last`.
    fn train_until(&self, run: &str, more: &[(&str, &str)], last: usize) -> Result<Run, Box<Error>> {
        let stop = AtomicBool::new(false);
        let observe = &mut |event: Event<'_>| {
            if let Event::Step(metrics) = event {
                stop.store(metrics.step >= last, Ordering::Relaxed);
            }
        };
        trainer::run(&self.recipe(run, more), &Device::flex(), &stop, observe).map_err(Box::new)
    }
}

/// Every file under a folder but recipes, which name their run.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else if !path.ends_with("config.yaml") {
            files.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    files
        .into_iter()
        .map(|(path, bytes)| (path.strip_prefix(folder).unwrap_or(&path).to_owned(), bytes))
        .collect()
}

fn keys(file: &Path) -> Vec<String> {
    let bytes = std::fs::read(file).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.names().into_iter().map(str::to_owned).collect()
}

fn batch() -> LabelledInputs {
    let ids: Vec<u32> = (0..30).map(|i| i * 7 % 40).collect();
    let labels = (0..30).map(|i| if i % 5 == 4 { -100 } else { (i * 11 + 3) % 40 }).collect();
    LabelledInputs::plain(ModelInputs::packed(ids, vec![0, 12, 30]), labels)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().unwrap()
}

fn gradients(model: &Mistral4, activations: Activations) -> (f64, BTreeMap<String, Vec<f32>>) {
    let mut gradients = Gradients::default();
    let scale = LossScale { per_token: 1.0 / 24.0, z_loss: 0.0, aux: 0.0 };
    let measured = forward_backward(model, &batch(), scale, activations, &mut gradients).unwrap();
    let all = gradients.iter().map(|(key, gradient)| (key.to_owned(), values(gradient.clone()))).collect();
    (measured.loss_sum, all)
}

/// A model with adapters on everything that change something, and those adapters.
fn adapted(
    settings: &LoraSettings,
    dropout: Option<(f64, DropoutPosition, DropoutSeed)>,
) -> (Mistral4, Adapter) {
    let config = config();
    let base = InitialSource::new(&config.config, 3, DType::F32);
    let weight = |target: &adapter::Target| base.tensor(&target.weight_key(), &target.shape, true);
    let mut adapter = settings.adapter::<mistral4::Error>(&config.config, 9, DType::F32, weight).unwrap();
    for lora in adapter.modules.values_mut() {
        let values = (0..lora.b.len()).map(|i| ((i * 37 % 23) as f32 - 11.0) / 40.0).collect();
        lora.b = mistral4::checkpoint::weights::HostTensor::f32(lora.b.shape.clone(), values);
    }
    let source = AdaptedSource::new(&base, &adapter);
    let source = match dropout {
        Some((share, position, seed)) => source.with_dropout(share, position, seed),
        None => source,
    };
    let model = Mistral4::new(&config.config, MoeOptions::default(), &source, &Device::flex()).unwrap();
    (model.freeze_base(), adapter)
}

fn everything() -> LoraSettings {
    LoraSettings { target_modules: vec!["*".into()], dim: 4, moe_rank_scaling: true, ..Default::default() }
}

fn dora() -> LoraSettings {
    LoraSettings { match_all_linear: true, dim: 4, use_dora: true, ..Default::default() }
}

#[test]
fn the_frozen_base_has_no_gradient_and_no_state_and_is_not_written() {
    let place = Place::new();
    let before = files(&place.path("base"));
    let run = place.train("run", &[]).unwrap();
    let is_adapter = |key: &str| key.contains("lora.");
    let trainable: Vec<String> =
        run.setup.model.parameters().into_iter().filter(|p| p.trainable).map(|p| p.key).collect();
    assert!(!trainable.is_empty() && trainable.iter().all(|key| is_adapter(key)));
    let (_, gradients) = gradients(&run.setup.model, Activations::Kept);
    assert_eq!(gradients.keys().collect::<Vec<_>>().len(), trainable.len());
    assert!(gradients.keys().all(|key| trainable.contains(key)));
    assert!(gradients.keys().any(|key| key.contains("experts.down_proj_lora")));

    let checkpoint = run.checkpoint.unwrap();
    let mut states = keys(&checkpoint.join("optim/exp_avg.safetensors"));
    let mut wanted = trainable.clone();
    states.sort();
    wanted.sort();
    assert_eq!(states, wanted);
    let written: Vec<PathBuf> = files(&checkpoint.join("model")).into_keys().collect();
    assert_eq!(written, ["adapter_config.json", "adapter_model.safetensors"].map(PathBuf::from));
    assert!(
        keys(&checkpoint.join("model/adapter_model.safetensors")).iter().all(|key| key.contains("lora_"))
    );
    assert_eq!(files(&place.path("base")), before);
    assert!(run.steps.last().unwrap().loss < run.steps[0].loss);
    let (trained, all) = (run.setup.adapter.unwrap(), run.setup.model.parameters().len());
    assert!(trainable.len() < all && trained.modules.len() * 2 == trainable.len());
}

#[test]
fn a_run_that_was_stopped_goes_on_bit_for_bit_dropout_included() {
    for more in [
        vec![("peft.dropout", "0.2"), ("peft.dropout_position", "pre")],
        vec![("peft.dropout", "0.3"), ("model.torch_dtype", "bfloat16")],
        vec![("peft.use_dora", "true"), ("peft.target_modules", "[lm_head, '*self_attn*']")],
        vec![("model.torch_dtype", "bfloat16"), ("peft.lora_dtype", "float32")],
    ] {
        let place = Place::new();
        let run = place.train_until("cut", &more, 3).unwrap();
        assert!(run.interrupted);
        place.train("cut", &more).unwrap();
        place.train("whole", &more).unwrap();
        let last = |run: &str| files(&place.path(run).join("LATEST").canonicalize().unwrap());
        assert!(last("cut") == last("whole"), "{more:?}");
    }
}

#[test]
fn a_checkpoint_of_other_adapters_is_not_continued() {
    let place = Place::new();
    place.train_until("run", &[], 2).unwrap();
    for (more, want) in [
        (("peft.dim", "8"), "rank"),
        (("peft.alpha", "9"), "adapter of"),
        (("peft.target_modules", "[lm_head]"), "rank"),
        (("peft", "null"), "what is trained"),
    ] {
        let message = place.train("run", &[more]).err().expect("it must be refused").to_string();
        assert!(message.contains(want), "{more:?}: {message}");
    }
}

#[test]
fn the_merged_model_is_the_adapted_one() {
    let place = Place::new();
    let base = Checkpoint::open(&place.path("base"), &ConfigOptions::default()).unwrap();
    for settings in [everything(), dora()] {
        let (model, adapter) = adapted(&settings, None);
        let out = place.path("merged");
        let options = SaveOptions { dtype: SaveDType::Float(DType::F32), ..SaveOptions::default() };
        adapter::merge(&base, &adapter, &out, &options).unwrap();
        let merged = Checkpoint::open(&out, &ConfigOptions::default()).unwrap();
        let source = CheckpointSource { checkpoint: &merged, dtype: DType::F32 };
        let merged = Mistral4::new(merged.config(), MoeOptions::default(), &source, &Device::flex()).unwrap();
        let [a, b] = [&model, &merged].map(|model| evaluate(model, &batch()).unwrap());
        assert!((a - b).abs() < 1e-4 * a, "{a} {b}");
        assert_eq!(adapter_of(&model.parameters(), &adapter), adapter);
        let plain = evaluate(&base_model(&config()), &batch()).unwrap();
        assert!((a - plain).abs() > 1e-2 * a, "the adapter changes something: {a} {plain}");
    }
}

#[test]
fn decoding_with_a_cache_sees_the_adapters() {
    for settings in [everything(), dora()] {
        let (model, _) = adapted(&settings, None);
        let ids: Vec<u32> = (0..9).map(|i| i * 5 % 40).collect();
        let all = ForwardOptions::default();
        let whole = model.forward(&ModelInputs::rows(ids.clone(), 1), None, &all).unwrap().logits.unwrap();
        let mut cache = LatentCache::new();
        let mut rows = Vec::new();
        for part in [&ids[..5], &ids[5..6], &ids[6..9]] {
            let inputs = ModelInputs::rows(part.to_vec(), 1);
            rows.push(model.forward(&inputs, Some(&mut cache), &all).unwrap().logits.unwrap());
        }
        let diff = (Tensor::cat(rows, 0) - whole).abs().max().into_scalar::<f32>();
        assert!(diff < 1e-4, "{diff}");
    }
}

#[test]
fn recomputed_activations_drop_the_same_values() {
    for position in [DropoutPosition::Pre, DropoutPosition::Post] {
        for settings in [everything(), dora()] {
            let seed = DropoutSeed::default();
            let (model, _) = adapted(&settings, Some((0.3, position, seed.clone())));
            let (plain, _) = gradients(&model, Activations::Kept);
            seed.begin(1, 0);
            let (whole_loss, whole) = gradients(&model, Activations::Kept);
            let (layered_loss, layered) = gradients(&model, Activations::Recomputed);
            seed.end();
            assert!((whole_loss - layered_loss).abs() < 1e-4, "{whole_loss} {layered_loss}");
            assert!((whole_loss - plain).abs() > 1e-3, "something was dropped");
            assert_eq!(whole.keys().collect::<Vec<_>>(), layered.keys().collect::<Vec<_>>());
            for (key, whole) in &whole {
                let norm = whole.iter().map(|v| v * v).sum::<f32>().sqrt();
                let diff = whole.iter().zip(&layered[key]).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                assert!(diff <= 1e-5 * norm + 1e-8, "{key}: {diff} of {norm}");
            }
        }
    }
}

#[test]
fn adapters_over_quantised_weights_train_as_over_their_values() {
    let place = Place::new();
    let options = ConfigOptions::default();
    let config = ConfigFile::preset("tiny", &options).unwrap().text_only();
    let f32 = SaveOptions { dtype: SaveDType::Float(DType::F32), ..SaveOptions::default() };
    base_model(&config).save(&place.path("full"), &config, &f32).unwrap();
    let weights = WeightFormat::Int { bits: Bits::Four, group_size: 32, symmetric: true };
    let packed = SaveDType::Packed(WeightQuantization { weights, lm_head: None });
    for (from, to, dtype) in [("full", "packed", packed), ("packed", "values", SaveDType::Float(DType::F32))]
    {
        let from = Checkpoint::open(&place.path(from), &options).unwrap();
        convert(&from, &place.path(to), &SaveOptions { dtype, ..f32 }).unwrap();
    }
    let losses = |run: &str, base: &str, more: &[(&str, &str)]| -> Vec<f64> {
        let base = place.path(base);
        let base = ("model.pretrained_model_name_or_path", base.to_str().unwrap());
        let more = [&[base, ("model.torch_dtype", "float32")], more].concat();
        place.train(run, &more).unwrap().steps.iter().map(|step| step.loss).collect()
    };
    let values = losses("over_values", "values", &[]);
    assert!(values[9] < values[0]);
    // Stored scales are rounded to bf16, those of weights that are quantised when loaded are not.
    for (run, base, more, tolerance) in [
        ("over_packed", "packed", &[][..], 2e-3),
        ("quantised_when_loaded", "full", &[("quantization.weights", "int4")], 2e-2),
        ("bitsandbytes_key", "full", &[("quantization.load_in_4bit", "true")], 2e-2),
    ] {
        for (step, (is, want)) in losses(run, base, more).iter().zip(&values).enumerate() {
            assert!((is - want).abs() < tolerance * want, "{run}, step {step}: {is} against {want}");
        }
    }
}

/// The values that a source holds quantised, as a dense source.
struct Values<'a>(&'a QuantizedSource<'a>);

impl ParameterSource for Values<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor, mistral4::Error> {
        let Some(weight) = self.0.quantized(key, shape)? else { return self.0.tensor(key, shape, f32) };
        let StackDims { matrices, rows, columns } = weight.dims();
        let mut values = vec![0.0f32; matrices * rows * columns];
        for (matrix, values) in values.chunks_mut(rows * columns).enumerate() {
            weight.dequantize(matrix, values);
        }
        Ok(HostTensor::f32(shape.to_vec(), values))
    }

    fn dtype(&self) -> DType {
        self.0.dtype()
    }
}

#[test]
fn gradients_over_quantised_weights_are_those_over_their_values() {
    let config = ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap().text_only();
    let base = InitialSource::new(&config.config, 3, DType::F32);
    let weight = |target: &adapter::Target| base.tensor(&target.weight_key(), &target.shape, true);
    let mut adapter = everything().adapter::<mistral4::Error>(&config.config, 9, DType::F32, weight).unwrap();
    for lora in adapter.modules.values_mut() {
        let values = (0..lora.b.len()).map(|i| ((i * 37 % 23) as f32 - 11.0) / 400.0).collect();
        lora.b = HostTensor::f32(lora.b.shape.clone(), values);
    }
    let int = |bits, symmetric| WeightFormat::Int { bits, group_size: 32, symmetric };
    for weights in [int(Bits::Four, false), int(Bits::Eight, true), WeightFormat::Fp8] {
        let quantized =
            QuantizedSource::new(&base, &config.config, WeightQuantization { weights, lm_head: None });
        let model = |source: &dyn ParameterSource| {
            let source = AdaptedSource::new(source, &adapter);
            let model = Mistral4::new(&config.config, MoeOptions::default(), &source, &Device::flex());
            model.unwrap().freeze_base()
        };
        let (over_codes, over_values) = (model(&quantized), model(&Values(&quantized)));
        assert!(over_codes.parameters().len() < over_values.parameters().len(), "codes are no parameters");
        for activations in [Activations::Kept, Activations::Recomputed] {
            let (loss, got) = gradients(&over_codes, activations);
            let (want_loss, want) = gradients(&over_values, activations);
            assert!((loss - want_loss).abs() < 1e-3 * want_loss, "{weights:?}: {loss} {want_loss}");
            assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
            assert!(got.keys().any(|key| key.contains("experts.gate_up_proj_lora")));
            for (key, want) in &want {
                let norm = want.iter().map(|v| v * v).sum::<f32>().sqrt();
                let diff = want.iter().zip(&got[key]).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                assert!(norm > 0.0 && diff <= 2e-3 * norm, "{weights:?}, {key}: {diff} of {norm}");
            }
        }
    }
}

#[test]
fn the_bundled_lora_recipe_can_run() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/digits_lora.yaml");
    let recipe = Recipe::load(&path, &[]).unwrap();
    recipe.check_runnable().unwrap();
    assert!(recipe.peft.is_some());
}
