//! What a step may add to the plain loss: noise on embeddings, z-losses of the vocabulary and of the routers, and routing
//! that is taken again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor, TensorData};
use mistral4::checkpoint::adapter::{self, LoraSettings};
use mistral4::checkpoint::config::{Config, ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::{DType, HostTensor};
use mistral4::model::RouterReplay;
use mistral4::model::decoder_layer::{DecoderLayer, FeedForward};
use mistral4::model::linear::Linear;
use mistral4::model::moe::MoeOptions;
use mistral4::model::norm::RmsNorm;
use mistral4::weights::{AdaptedSource, InitialSource, ParameterSource};
use mistral4::{ForwardOptions, Mistral4, ModelInputs};
use mistral4_train::backward::{
    Activations, Gradients, LabelledInputs, LossScale, MicroBatchLoss, ParameterStore, Stage, Unit, Whole,
    evaluate, forward_backward, forward_backward_from,
};
use mistral4_train::checkpoint::Disk;
use mistral4_train::parallel::communicator::threads;
use mistral4_train::recipe::{Override, Recipe};
use mistral4_train::trainer::{self, Event, Host};
use serde_json::Value;

const RECIPE: &str = "
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler:
  {global_batch_size: 4, local_batch_size: 1, max_steps: 6, num_epochs: 100, ckpt_every_steps: 100, val_every_steps: 2}
rng: {seed: 5}
model: {_target_: NeMoAutoModelForCausalLM.from_config, config: config.json, torch_dtype: float32}
checkpoint: {checkpoint_dir: run}
dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}
validation_dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 7, num_samples: 5}
optimizer: {_target_: AdamW, lr: 1.0e-2, betas: [0.9, 0.95], weight_decay: 0.1}
clip_grad_norm: {max_norm: 1.0}
mfu: {peak_tflops: 1}
";

const EVERYTHING: [(&str, &str); 4] = [
    ("neftune.noise_alpha", "5"),
    ("loss_fn.z_loss", "0.01"),
    ("model.router_z_loss_coeff", "0.02"),
    ("model.aux_loss_coeff", "0.05"),
];

fn config_json() -> Value {
    serde_json::json!({
        "model_type": "mistral4", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 0, "initializer_range": 0.3,
        "max_position_embeddings": 64, "tie_word_embeddings": false, "pad_token_id": 11,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
    })
}

fn config() -> Config {
    ConfigFile::from_value(config_json(), "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
}

/// A folder with a configuration, in which runs are made.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config_json().to_string()).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn recipe(&self, run: &str, more: &[(&str, &str)]) -> Recipe {
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let mut overrides = vec![
            set("model.config", self.path("config.json").to_str().unwrap()),
            set("checkpoint.checkpoint_dir", self.path(run).to_str().unwrap()),
        ];
        overrides.extend(more.iter().map(|(key, value)| set(key, value)));
        Recipe::parse("recipe.yaml", RECIPE.as_bytes(), &overrides, &|_| None).unwrap()
    }

    /// Trains on `ranks` ranks until the step `last`, and is then asked to stop.
    fn train_until(&self, run: &str, ranks: usize, more: &[(&str, &str)], last: usize) {
        let (recipe, stop) = (self.recipe(run, more), AtomicBool::new(false));
        threads::run(ranks, |world| {
            let host = Host { device: Device::flex(), disk: Disk::default(), world };
            let mut observe = |event: Event<'_>| {
                if let Event::Step(metrics) = event {
                    stop.store(metrics.step >= last, Ordering::Relaxed);
                }
            };
            let run = trainer::run_on(host, &recipe, &stop, &mut observe);
            run.map(|_| ()).map_err(|error| error.to_string()).unwrap();
        });
    }

    fn train(&self, run: &str, more: &[(&str, &str)]) -> Vec<Value> {
        self.train_until(run, 1, more, usize::MAX);
        self.lines(run, "training.jsonl")
    }

    /// The lines of a metrics file without what depends on the clock.
    fn lines(&self, run: &str, file: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join(file)).unwrap();
        let line = |line: &str| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            for key in ["timestamp", "mem", "tps", "tps_per_gpu", "mfu", "data_wait_ms"] {
                value.as_object_mut().unwrap().remove(key);
            }
            value
        };
        text.lines().map(line).collect()
    }

    /// The last weights and states of a run.
    fn tensors(&self, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let (latest, mut files, mut folders) =
            (self.path(run).join("LATEST"), BTreeMap::new(), vec![PathBuf::new()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(latest.join(&folder)).unwrap() {
                let name = folder.join(entry.unwrap().file_name());
                match latest.join(&name) {
                    path if path.is_dir() => folders.push(name),
                    path if name.extension().is_some_and(|end| end == "safetensors") => {
                        files.insert(name, std::fs::read(path).unwrap());
                    }
                    _ => {}
                }
            }
        }
        assert!(files.len() > 2, "{:?}", files.keys());
        files
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_bit_for_bit() {
    let place = Place::new();
    let [neftune, z_loss, router, _] = EVERYTHING;
    let recomputed = ("distributed.activation_checkpointing", "true");
    let on_the_way =
        [neftune, z_loss, router, recomputed, ("optimizer_in_bwd", "true"), ("clip_grad_norm", "null")];
    let on_the_way = [&on_the_way[..], &[("step_scheduler.local_batch_size", "4")]].concat();
    let packed = [&EVERYTHING[..], &[("packed_sequence.packed_sequence_size", "20"), recomputed]].concat();
    for (name, more) in [
        ("neftune", &[neftune][..]),
        ("z_loss", &[z_loss]),
        ("router_z_loss", &[router]),
        ("packed", &packed),
        ("on_the_way", &on_the_way),
    ] {
        let (cut, whole) = (format!("{name}-cut"), format!("{name}-whole"));
        place.train_until(&cut, 1, more, 2);
        assert_eq!(
            place.lines(&cut, "training.jsonl").len(),
            4,
            "what is asked in a step is done in the next"
        );
        let (resumed, whole_lines) = (place.train(&cut, more), place.train(&whole, more));
        assert_eq!(resumed, whole_lines, "{name}");
        assert_eq!(resumed.len(), 6);
        assert!(place.tensors(&cut) == place.tensors(&whole), "{name}");
    }
}

#[test]
fn coefficients_of_zero_change_nothing() {
    let place = Place::new();
    let plain = place.train("plain", &[]);
    let zero = EVERYTHING.map(|(key, _)| (key, "0"));
    assert_eq!(place.train("zero", &zero), plain);
    assert!(place.tensors("zero") == place.tensors("plain"));
    assert!(plain[0].get("z_loss").is_none() && plain[0].get("router_z_loss").is_none());
    let extra = place.train("extra", &EVERYTHING);
    for key in ["z_loss", "router_z_loss", "aux_loss"] {
        assert!(extra.iter().all(|line| line[key].as_f64().unwrap() > 0.0), "{key}");
    }
    assert!(place.tensors("extra") != place.tensors("plain"));
}

/// With a learning rate of 0 the weights stay, so that losses show the noise alone.
#[test]
fn noise_is_in_training_steps_only() {
    let place = Place::new();
    let still = [("optimizer.lr", "0"), ("optimizer.weight_decay", "0")];
    let plain = place.train("plain", &still);
    let noisy = place.train("noisy", &[&still[..], &[("neftune", "5.0")]].concat());
    let default = place.train("default", &[&still[..], &[("neftune", "{}")]].concat());
    assert_eq!(noisy, default, "the section alone means NeMo AutoModel's 5");
    for (plain, noisy) in plain.iter().zip(&noisy) {
        let (plain, noisy) = (plain["loss"].as_f64().unwrap(), noisy["loss"].as_f64().unwrap());
        assert!(plain != noisy && (plain - noisy).abs() < 0.5 * plain, "{plain} {noisy}");
    }
    assert_eq!(place.lines("plain", "validation.jsonl"), place.lines("noisy", "validation.jsonl"));
    let other_seed =
        place.train("seed", &[&still[..], &[("neftune", "5.0"), ("dataloader.shuffle", "false")]].concat());
    assert_ne!(other_seed, noisy);
}

#[test]
fn every_layout_of_ranks_trains_like_one_rank() {
    let place = Place::new();
    let one = place.train("one", &EVERYTHING);
    for (ranks, layout) in [
        (2, &[("strategy", "ddp")][..]),
        (4, &[("strategy", "fsdp2")]),
        (2, &[("tp_size", "2")]),
        (2, &[("ep_size", "2")]),
        (2, &[("pp_size", "2")]),
        (4, &[("pp_size", "2"), ("strategy", "fsdp2"), ("activation_checkpointing", "true")]),
    ] {
        let name = format!("{layout:?}");
        let keys: Vec<(String, &str)> =
            layout.iter().map(|(key, value)| (format!("distributed.{key}"), *value)).collect();
        let mut more = EVERYTHING.to_vec();
        more.extend(keys.iter().map(|(key, value)| (key.as_str(), *value)));
        place.train_until(&name, ranks, &more, usize::MAX);
        for (one, many) in one.iter().zip(&place.lines(&name, "training.jsonl")) {
            for key in ["loss", "grad_norm", "z_loss", "aux_loss", "router_z_loss"] {
                let (a, b) = (one[key].as_f64().unwrap(), many[key].as_f64().unwrap());
                assert!(
                    (a - b).abs() <= 2e-5 * a.abs(),
                    "{key}: {a} on one rank, {b} on {ranks} ({layout:?})"
                );
            }
        }
    }
    // Rows keep their noise in other micro-batches too.
    let batched = [&EVERYTHING[..2], &[("step_scheduler.local_batch_size", "4")]].concat();
    let (batched, single) = (place.train("batched", &batched), place.train("single", &EVERYTHING[..2]));
    for (a, b) in batched.iter().zip(&single) {
        let (a, b) = (a["loss"].as_f64().unwrap(), b["loss"].as_f64().unwrap());
        assert!((a - b).abs() <= 2e-5 * a, "{a} {b}");
    }
}

fn model(router_z_loss_coeff: f64) -> Mistral4 {
    let config = config();
    let source = InitialSource::new(&config, 3, DType::F32);
    let moe = MoeOptions { router_z_loss_coeff, ..Default::default() };
    Mistral4::new(&config, moe, &source, &Device::flex()).unwrap()
}

fn batch() -> LabelledInputs {
    let ids: Vec<u32> = (0..30).map(|i| i * 7 % 40).collect();
    let labels = (0..30).map(|i| if i % 5 == 4 { -100 } else { (i * 11 + 3) % 40 }).collect();
    LabelledInputs::plain(ModelInputs::packed(ids, vec![0, 12, 30]), labels)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data_as::<f32>().try_into_vec().unwrap()
}

const SCALE: LossScale = LossScale { per_token: 1.0 / 24.0, z_loss: 0.4, aux: 0.5 };

/// What is minimised.
fn total(measured: &MicroBatchLoss, scale: LossScale) -> f64 {
    (measured.loss_sum + measured.z_loss) * scale.per_token
        + (measured.aux_loss + measured.router_z_loss) * scale.aux
}

fn run(
    model: &Mistral4,
    batch: &LabelledInputs,
    scale: LossScale,
    activations: Activations,
) -> (MicroBatchLoss, Gradients) {
    let mut gradients = Gradients::default();
    let measured = forward_backward(model, batch, scale, activations, &mut gradients).unwrap();
    (measured, gradients)
}

/// The experts that a model chooses for a batch.
fn choices(model: &Mistral4, batch: &LabelledInputs) -> RouterReplay {
    let options = ForwardOptions { output_routing: true, ..Default::default() };
    RouterReplay::of(&model.forward(&batch.inputs, None, &options).unwrap().routing)
}

/// A model with adapters, of the head among others, that change something.
fn adapted(router_z_loss_coeff: f64) -> Mistral4 {
    let config = config();
    let base = InitialSource::new(&config, 3, DType::F32);
    let settings = LoraSettings { target_modules: vec!["*".into()], dim: 4, ..Default::default() };
    let weight = |target: &adapter::Target| base.tensor(&target.weight_key(), &target.shape, true);
    let mut adapter = settings.adapter::<mistral4::Error>(&config, 9, DType::F32, weight).unwrap();
    for lora in adapter.modules.values_mut() {
        let values = (0..lora.b.len()).map(|i| ((i * 37 % 23) as f32 - 11.0) / 60.0).collect();
        lora.b = HostTensor::f32(lora.b.shape.clone(), values);
    }
    let source = AdaptedSource::new(&base, &adapter);
    let moe = MoeOptions { router_z_loss_coeff, ..Default::default() };
    Mistral4::new(&config, moe, &source, &Device::flex()).unwrap().freeze_base()
}

#[test]
fn z_losses_are_the_squared_log_sum_exps() {
    for model in [model(0.0), adapted(0.0)] {
        let batch = batch();
        let logits = model.forward(&batch.inputs, None, &ForwardOptions::default()).unwrap().logits.unwrap();
        let labelled = |(row, label): (&[f32], &i64)| {
            let lse = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            if *label < 0 { 0.0 } else { lse * lse }
        };
        let want: f64 =
            values(logits).chunks(40).zip(&batch.labels).map(labelled).sum::<f64>() * SCALE.z_loss;
        let plain = run(&model, &batch, LossScale { z_loss: 0.0, ..SCALE }, Activations::Kept).0;
        assert!(plain.z_loss == 0.0 && want > 1.0);
        for activations in [Activations::Kept, Activations::Recomputed] {
            let got = run(&model, &batch, SCALE, activations).0;
            assert!((got.z_loss - want).abs() < 1e-5 * want, "{} {want}", got.z_loss);
            assert!((got.loss_sum - plain.loss_sum).abs() < 1e-5 * plain.loss_sum, "cross entropy alone");
        }
        let held_out = evaluate(&model, &batch).unwrap();
        assert!((held_out - plain.loss_sum).abs() < 1e-5 * held_out);
    }
}

#[test]
fn a_router_without_preferences_has_the_z_loss_of_its_experts_number() {
    let flat = model(0.7).map_parameters(|key, _, values| match key.ends_with("gate.weight") {
        true => values.zeros_like(),
        false => values,
    });
    // Two mixture layers; padding counts nowhere.
    let want = 2.0 * 0.7 * 4f64.ln().powi(2);
    let mut padded = batch();
    let mask: Vec<bool> = (0..30).map(|t| t % 15 < 11).collect();
    padded.inputs = ModelInputs::rows(padded.inputs.input_ids.unwrap(), 2).with_attention_mask(mask);
    for batch in [batch(), padded] {
        for activations in [Activations::Kept, Activations::Recomputed] {
            let got = run(&flat, &batch, SCALE, activations).0.router_z_loss;
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }
}

#[test]
fn padding_has_no_part_in_the_routers_z_loss() {
    let model = model(0.7);
    let of = |inputs: ModelInputs| {
        let labels = vec![-100; inputs.layout.tokens()];
        run(&model, &LabelledInputs::plain(inputs, labels), SCALE, Activations::Kept).0.router_z_loss
    };
    let ids: Vec<u32> = (0..12).map(|i| i * 7 % 40).collect();
    let padded = [&ids[..], &[11; 5]].concat();
    let mask = (0..17).map(|t| t < 12).collect();
    let (plain, padded) =
        (of(ModelInputs::rows(ids, 1)), of(ModelInputs::rows(padded, 1).with_attention_mask(mask)));
    assert!((plain - padded).abs() < 1e-5 * plain, "{plain} {padded}");
}

/// The length of the gradient is the slope of the loss along it.
#[test]
fn gradients_of_the_extras_are_the_slope_of_the_loss() {
    for (name, model) in [("weights", model(0.5)), ("adapters", adapted(0.5))] {
        // Choices jump; held fast, the loss is smooth.
        let batch = LabelledInputs { router_replay: Some(choices(&model, &batch())), ..batch() };
        let per_layer = |activations| run(&model, &batch, SCALE, activations).1;
        let mut gradients = per_layer(Activations::Kept);
        let norm = gradients.norm();
        assert!((per_layer(Activations::Recomputed).norm() - norm).abs() < 1e-5 * norm);
        let at = |step: f64| {
            let moved = model.clone().map_parameters(|key, _, values| match gradients.get(key) {
                Some(gradient) => values + gradient.clone() * (step / norm),
                None => values,
            });
            total(&run(&moved, &batch, SCALE, Activations::Recomputed).0, SCALE)
        };
        let slope = (at(2e-3) - at(-2e-3)) / 4e-3;
        assert!((slope - norm).abs() < 1e-2 * norm, "{name}: {slope} {norm}");
    }
}

/// A model whose routers would choose other experts from the second pass over a layer on.
struct Fickle<'a> {
    store: Whole<'a>,
    passes: BTreeMap<usize, usize>,
}

impl ParameterStore for Fickle<'_> {
    fn front(&mut self, next: Option<Unit>) -> Mistral4 {
        self.store.front(next)
    }

    fn layer(&mut self, index: usize, next: Option<Unit>) -> DecoderLayer {
        let mut layer = self.store.layer(index, next);
        let passes = self.passes.entry(index).or_default();
        *passes += 1;
        if *passes > 1 {
            prefer_the_first(&mut layer);
        }
        layer
    }

    fn head(&mut self, next: Option<Unit>) -> (RmsNorm, Linear) {
        self.store.head(next)
    }

    fn trains(&self, unit: Unit) -> bool {
        self.store.trains(unit)
    }

    fn add(&mut self, unit: Unit, gradients: Vec<(String, Tensor<1>)>) {
        self.store.add(unit, gradients);
    }
}

/// Makes a layer's router choose experts 0 and 1, by the bias that has a say in the choice alone.
fn prefer_the_first(layer: &mut DecoderLayer) {
    let FeedForward::Moe(moe) = &mut layer.mlp else { return };
    let bias = moe.gate.e_score_correction_bias.clone();
    moe.gate.e_score_correction_bias = bias.map(|bias| {
        let values = TensorData::new(vec![9.0f32, 8.0, 0.0, 0.0], [4]);
        Tensor::from_data(values, &bias.device()).set_require_grad(false)
    });
}

#[test]
fn a_layer_that_is_run_again_sends_its_tokens_to_the_same_experts() {
    let model = model(0.5);
    let batch = batch();
    let (_, want) = run(&model, &batch, SCALE, Activations::Recomputed);
    let mut got = Gradients::default();
    let mut store = Fickle { store: Whole::new(&model, &mut got), passes: BTreeMap::new() };
    let stage = Stage::whole(&model, Activations::Recomputed);
    forward_backward_from(&mut store, stage, &batch, SCALE).unwrap();
    assert_eq!(store.passes, BTreeMap::from([(0, 2), (1, 2)]));
    assert_eq!(got.iter().count(), want.iter().count());
    for (key, got) in got.iter() {
        assert_eq!(values(got.clone()), values(want.get(key).unwrap().clone()), "{key}");
    }
}

#[test]
fn recorded_choices_are_taken_again_by_another_model() {
    let (model, batch) = (model(0.0), batch());
    let replay = choices(&model, &batch);
    let mut other = model.clone();
    other.text_mut().model.layers.iter_mut().for_each(prefer_the_first);
    let logits = |model: &Mistral4, router_replay| {
        let options = ForwardOptions { router_replay, ..Default::default() };
        values(model.forward(&batch.inputs, None, &options).unwrap().logits.unwrap())
    };
    assert_ne!(logits(&other, None), logits(&model, None));
    assert_eq!(logits(&other, Some(replay.clone())), logits(&model, None));
    let replayed = LabelledInputs { router_replay: Some(replay.clone()), ..batch.clone() };
    for activations in [Activations::Kept, Activations::Recomputed] {
        let (want, want_gradients) = run(&model, &batch, SCALE, activations);
        let (got, gradients) = run(&other, &replayed, SCALE, activations);
        assert_eq!((got.loss_sum, &got.loads), (want.loss_sum, &want.loads));
        let gate = "model.layers.1.mlp.gate.weight";
        assert_eq!(
            values(gradients.get(gate).unwrap().clone()),
            values(want_gradients.get(gate).unwrap().clone()),
            "the router is trained through the experts that were given"
        );
    }
    assert_eq!(evaluate(&other, &replayed).unwrap(), evaluate(&model, &batch).unwrap());

    let short = LabelledInputs {
        inputs: ModelInputs::packed(vec![1; 5], vec![0, 5]),
        labels: vec![1; 5],
        ..replayed.clone()
    };
    let empty = LabelledInputs { router_replay: Some(RouterReplay::default()), ..batch };
    let error = |batch| {
        let mut gradients = Gradients::default();
        let run = forward_backward(&model, batch, SCALE, Activations::Recomputed, &mut gradients);
        run.unwrap_err().to_string()
    };
    assert!(
        error(&short).contains("layer 0 is [30, 2], expected [5 tokens, 2 experts each]"),
        "{}",
        error(&short)
    );
    assert!(error(&empty).contains("no experts for layer 0"), "{}", error(&empty));
}

#[test]
fn sizes_that_are_no_size_are_refused() {
    for (key, value) in
        [("neftune.noise_alpha", "-1"), ("loss_fn.z_loss", "-0.1"), ("model.router_z_loss_coeff", "high")]
    {
        let set = Override { key: key.to_owned(), value: value.to_owned() };
        let error =
            Recipe::parse("recipe.yaml", RECIPE.as_bytes(), &[set], &|_| None).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains(value), "{error}");
    }
}
