//! Runs in a folder of their own, and what they left there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use mistral4_train::Error;
use mistral4_train::recipe::{Override, Recipe};
use mistral4_train::trainer::{self, Event, Run};
use serde_json::Value;

/// Errors are boxed, since they are large.
pub(crate) type Outcome = Result<Run, Box<Error>>;

pub(crate) const RECIPE: &str = "
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler:
  {global_batch_size: 4, local_batch_size: 2, max_steps: 20, num_epochs: 100, ckpt_every_steps: 5,
   save_checkpoint_every_epoch: false, val_every_steps: 3}
rng: {seed: 5}
model: {_target_: NeMoAutoModelForCausalLM.from_config, config: config.json, torch_dtype: float32}
checkpoint: {checkpoint_dir: run}
dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}
validation_dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 7, num_samples: 5}
validation_dataloader: {shuffle: true}
optimizer: {_target_: AdamW, lr: 1.0e-2, betas: [0.9, 0.95], weight_decay: 0.1}
lr_scheduler: {lr_decay_style: cosine, lr_warmup_steps: 3}
clip_grad_norm: {max_norm: 1.0}
mfu: {peak_tflops: 1}
";

pub(crate) fn config() -> Value {
    serde_json::json!({
        "model_type": "mistral4", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "initializer_range": 0.3,
        "max_position_embeddings": 64, "tie_word_embeddings": false, "pad_token_id": 11,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
    })
}

/// A folder with a configuration, in which runs are made.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn recipe(&self, run: &str, more: &[(&str, &str)]) -> Recipe {
        recipe(self.0.path(), run, more)
    }

    pub(crate) fn train(&self, run: &str, more: &[(&str, &str)]) -> Outcome {
        let recipe = self.recipe(run, more);
        trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |_| {}).map_err(Box::new)
    }
}

pub(crate) fn recipe(place: &Path, run: &str, more: &[(&str, &str)]) -> Recipe {
    let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
    let mut overrides = vec![
        set("model.config", place.join("config.json").to_str().unwrap()),
        set("checkpoint.checkpoint_dir", place.join(run).to_str().unwrap()),
    ];
    overrides.extend(more.iter().map(|(key, value)| set(key, value)));
    Recipe::parse("recipe.yaml", RECIPE.as_bytes(), &overrides, &|_| None).unwrap()
}

/// Runs until the step `last`, and is then asked to stop.
pub(crate) fn train_until(recipe: &Recipe, last: usize) -> Outcome {
    let stop = AtomicBool::new(false);
    trainer::run(recipe, &Device::flex(), &stop, &mut |event| {
        if let Event::Step(metrics) = event {
            stop.store(metrics.step >= last, Ordering::Relaxed);
        }
    })
    .map_err(Box::new)
}

/// The lines of a metrics file without what depends on the clock.
pub(crate) fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for key in ["timestamp", "mem", "tps", "tps_per_gpu", "mfu", "data_wait_ms"] {
            value.as_object_mut().unwrap().remove(key);
        }
        value
    };
    text.lines().map(line).collect()
}

/// Every file of a checkpoint but the recipe, which names the run's folder.
pub(crate) fn files(checkpoint: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![checkpoint.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("config.yaml") {
                let name = path.strip_prefix(checkpoint).unwrap().to_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Compares metrics and last checkpoints of two runs.
pub(crate) fn assert_same(a: &Path, b: &Path) {
    assert_eq!(lines(&a.join("training.jsonl")), lines(&b.join("training.jsonl")));
    let [last_a, last_b] = [a, b].map(|run| std::fs::read_link(run.join("LATEST")).unwrap());
    assert_eq!(last_a, last_b);
    let (files_a, files_b) = (files(&a.join(last_a)), files(&b.join(last_b)));
    assert_eq!(files_a.keys().collect::<Vec<_>>(), files_b.keys().collect::<Vec<_>>());
    for (name, bytes) in &files_a {
        assert!(bytes == &files_b[name], "{} differs", name.display());
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.symlink_metadata().unwrap().file_type() {
            kind if kind.is_symlink() => {
                std::os::unix::fs::symlink(std::fs::read_link(&path).unwrap(), target).unwrap();
            }
            kind if kind.is_dir() => copy(&path, &target),
            _ => drop(std::fs::copy(&path, target).unwrap()),
        }
    }
}

/// The checkpoints of a run, oldest first.
pub(crate) fn names(run: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("epoch_")).collect();
    names.sort_by_key(|name| name.rsplit('_').next().unwrap().parse::<usize>().unwrap());
    names
}
