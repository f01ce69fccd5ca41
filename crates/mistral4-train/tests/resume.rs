//! Runs that stop anywhere and go on: the same losses and the same weights, bit for bit.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use mistral4::Mistral4;
use mistral4::checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::{DType, SaveDType, SaveOptions};
use mistral4::model::moe::MoeOptions;
use mistral4::weights::InitialSource;
use mistral4_train::Error;
use mistral4_train::checkpoint::{Disk, Operation};
use mistral4_train::recipe::{Override, Recipe, RestoreFrom};
use mistral4_train::trainer::{self, Event, Host, Run};
use proptest::prelude::*;
use serde_json::Value;

/// Errors are boxed, since they are large.
type Outcome = Result<Run, Box<Error>>;

const RECIPE: &str = "
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

fn config() -> Value {
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
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn recipe(&self, run: &str, more: &[(&str, &str)]) -> Recipe {
        recipe(self.0.path(), run, more)
    }

    fn train(&self, run: &str, more: &[(&str, &str)]) -> Outcome {
        let recipe = self.recipe(run, more);
        trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |_| {}).map_err(Box::new)
    }
}

fn recipe(place: &Path, run: &str, more: &[(&str, &str)]) -> Recipe {
    let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
    let mut overrides = vec![
        set("model.config", place.join("config.json").to_str().unwrap()),
        set("checkpoint.checkpoint_dir", place.join(run).to_str().unwrap()),
    ];
    overrides.extend(more.iter().map(|(key, value)| set(key, value)));
    Recipe::parse("recipe.yaml", RECIPE.as_bytes(), &overrides, &|_| None).unwrap()
}

/// Runs until the step `last`, and is then asked to stop.
fn train_until(recipe: &Recipe, last: usize) -> Outcome {
    let stop = AtomicBool::new(false);
    trainer::run(recipe, &Device::flex(), &stop, &mut |event| {
        if let Event::Step(metrics) = event {
            stop.store(metrics.step >= last, Ordering::Relaxed);
        }
    })
    .map_err(Box::new)
}

/// The lines of a metrics file without what depends on the clock.
fn lines(path: &Path) -> Vec<Value> {
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
fn files(checkpoint: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
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
fn assert_same(a: &Path, b: &Path) {
    assert_eq!(lines(&a.join("training.jsonl")), lines(&b.join("training.jsonl")));
    let [last_a, last_b] = [a, b].map(|run| std::fs::read_link(run.join("LATEST")).unwrap());
    assert_eq!(last_a, last_b);
    let (files_a, files_b) = (files(&a.join(last_a)), files(&b.join(last_b)));
    assert_eq!(files_a.keys().collect::<Vec<_>>(), files_b.keys().collect::<Vec<_>>());
    for (name, bytes) in &files_a {
        assert!(bytes == &files_b[name], "{} differs", name.display());
    }
}

fn copy(from: &Path, to: &Path) {
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

/// Run by [`killed_at`] in a process of its own: trains to a step and waits there to be killed.
#[test]
#[ignore = "the process that other tests start and kill"]
fn a_run_to_be_killed() {
    let place = PathBuf::from(std::env::var("MISTRAL4_TEST_PLACE").unwrap());
    let dtype = std::env::var("MISTRAL4_TEST_DTYPE").unwrap();
    let is_async = std::env::var("MISTRAL4_TEST_ASYNC").unwrap();
    let more = [("model.torch_dtype", dtype.as_str()), ("checkpoint.is_async", is_async.as_str())];
    let recipe = recipe(&place, "killed", &more);
    let run = trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |event| {
        if let Event::Step(metrics) = event
            && metrics.step == 12
        {
            println!("reached step 12");
            std::thread::sleep(std::time::Duration::from_secs(600));
        }
    });
    panic!("not killed: {:?}", run.err());
}

/// Starts a run in another process and kills it (SIGKILL) after step 12, two steps past its second checkpoint.
fn killed_at(place: &Place, dtype: &str, is_async: &str) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["a_run_to_be_killed", "--exact", "--ignored", "--nocapture"])
        .env("MISTRAL4_TEST_PLACE", place.0.path())
        .env("MISTRAL4_TEST_DTYPE", dtype)
        .env("MISTRAL4_TEST_ASYNC", is_async)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let reached = output.lines().map_while(|line| line.ok()).any(|line| line.contains("reached step 12"));
    // An asynchronous save may still be under way here: what it left is then no checkpoint.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reached, "the run ended before step 12");
}

fn is_exact_after_a_kill(dtype: &str, is_async: &str) {
    let place = Place::new();
    killed_at(&place, dtype, is_async);
    assert_eq!(lines(&place.path("killed/training.jsonl")).len(), 13);
    let more = [("model.torch_dtype", dtype), ("checkpoint.is_async", is_async)];
    let resumed = place.train("killed", &more).unwrap();
    let whole = place.train("whole", &more).unwrap();
    assert_same(&place.path("killed"), &place.path("whole"));
    assert_eq!(lines(&place.path("killed/validation.jsonl")), lines(&place.path("whole/validation.jsonl")));
    let losses =
        |run: &Run| run.steps.iter().map(|step| (step.step, step.loss.to_bits())).collect::<Vec<_>>();
    assert_eq!(losses(&resumed)[13..], losses(&whole)[13..]);
    assert_eq!(resumed.steps.len(), 20);
    let files = files(whole.checkpoint.as_ref().unwrap());
    assert_eq!(files.contains_key(Path::new("optim/master.safetensors")), dtype == "bfloat16");
}

/// Every form of the optimizer's states, in f32 and in bf16 with masters.
#[test]
fn every_optimizer_goes_on_bit_for_bit() {
    let place = Place::new();
    for (name, optimizer, states) in [
        ("bf16", "{lr: 1.0e-2, exp_avg_dtype: torch.bfloat16, exp_avg_sq_dtype: torch.bfloat16}", "exp_avg"),
        (
            "8bit",
            "{_target_: bitsandbytes.optim.AdamW8bit, lr: 1.0e-2, min_8bit_size: 100}",
            "exp_avg_absmax",
        ),
        ("muon", "{_target_: dion.Muon, lr: 1.0e-2, nesterov: true}", "momentum_buffer"),
    ] {
        let dtype = if name == "8bit" { "bfloat16" } else { "float32" };
        let more = [("optimizer", optimizer), ("model.torch_dtype", dtype)];
        let (resumed, whole) = (format!("{name}-resumed"), format!("{name}-whole"));
        train_until(&place.recipe(&resumed, &more), 8).unwrap();
        place.train(&resumed, &more).unwrap();
        let run = place.train(&whole, &more).unwrap();
        assert_same(&place.path(&resumed), &place.path(&whole));
        assert!(run.steps[19].loss < run.steps[0].loss, "{name}");
        let file = format!("optim/{states}.safetensors");
        assert!(files(run.checkpoint.as_ref().unwrap())[Path::new(&file)].len() > 100, "{name}");

        let other = [("optimizer", "{_target_: AdamW}"), more[1], ("step_scheduler.max_steps", "30")];
        let error = place.train(&resumed, &other).err().unwrap().to_string();
        assert!(
            error.contains("what the optimizer remembers of") && error.contains("f32 moments"),
            "{error}"
        );
    }
}

#[test]
fn a_killed_f32_run_goes_on_bit_for_bit() {
    is_exact_after_a_kill("float32", "false");
}

#[test]
fn a_killed_bf16_run_goes_on_bit_for_bit() {
    is_exact_after_a_kill("bfloat16", "false");
}

#[test]
fn a_killed_run_that_saves_beside_training_goes_on_bit_for_bit() {
    is_exact_after_a_kill("float32", "true");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_run_asked_to_stop_anywhere_goes_on_bit_for_bit(
        cuts in proptest::collection::btree_set(0usize..11, 1..4),
        every in 1usize..7,
        local in prop_oneof![Just("1"), Just("2"), Just("4")],
        packed in any::<bool>(),
        is_async in any::<bool>(),
        keep in any::<bool>(),
    ) {
        let place = Place::new();
        let (every, is_async) = (every.to_string(), is_async.to_string());
        let mut more = vec![
            ("step_scheduler.max_steps", "12"),
            ("step_scheduler.ckpt_every_steps", every.as_str()),
            ("step_scheduler.local_batch_size", local),
            ("checkpoint.is_async", is_async.as_str()),
        ];
        if packed {
            more.push(("packed_sequence.packed_sequence_size", "20"));
        }
        if keep {
            more.push(("checkpoint.max_recent_checkpoints", "1"));
        }
        place.train("whole", &more).unwrap();
        let recipe = place.recipe("cut", &more);
        for cut in cuts {
            let run = train_until(&recipe, cut).unwrap();
            if !run.interrupted {
                // What is asked in a step is done in the next, and the last step has none.
                prop_assert_eq!(run.steps.last().map(|metrics| metrics.step), Some(11));
                break;
            }
        }
        place.train("cut", &more).unwrap();
        assert_same(&place.path("cut"), &place.path("whole"));
    }
}

/// How a disk fails at one operation.
#[derive(Debug, Clone, Copy)]
enum Failure {
    /// That one operation fails, as on a full disk.
    Once,
    /// So does all that follows, as in a process that was killed.
    FromThenOn,
}

/// One rank that saves to `disk`.
fn on(disk: Disk) -> Host {
    Host { disk, ..Host::single(&Device::flex()) }
}

/// A disk that fails at the operation `at`, and the operations that it was asked for.
fn failing(at: usize, failure: Failure) -> (Disk, Arc<Mutex<Vec<Operation>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let disk = Disk::gated(move |operation, _| {
        let mut log = log.lock().unwrap();
        log.push(operation);
        let number = log.len() - 1;
        match failure {
            Failure::Once if number == at => Err(ErrorKind::StorageFull.into()),
            Failure::FromThenOn if number >= at => Err(IoError::other("killed")),
            _ => Ok(()),
        }
    });
    (disk, asked)
}

#[test]
fn a_save_that_fails_at_any_operation_leaves_the_checkpoint_before_it() {
    let place = Place::new();
    let more = [("step_scheduler.max_steps", "6"), ("checkpoint.max_recent_checkpoints", "1")];
    place.train("whole", &more).unwrap();
    train_until(&place.recipe("before", &more), 3).unwrap();
    let before = std::fs::read_link(place.path("before/LATEST")).unwrap();
    let stop = AtomicBool::new(false);
    let recipe = place.recipe("cut", &more);
    let attempt = |disk| trainer::run_on(on(disk), &recipe, &stop, &mut |_| {}).map_err(Box::new);
    let again = || {
        let _ = std::fs::remove_dir_all(place.path("cut"));
        copy(&place.path("before"), &place.path("cut"));
    };
    again();
    let (disk, asked) = failing(usize::MAX, Failure::Once);
    attempt(disk).unwrap();
    let operations = asked.lock().unwrap().clone();
    assert!(operations.len() > 60, "{operations:?}");

    for (at, failure) in (0..operations.len()).flat_map(|at| [(at, Failure::Once), (at, Failure::FromThenOn)])
    {
        // Most operations are writes of one tensor after another: some of them stand for all where more is tried.
        let is_one_of_many = operations[at] == Operation::Write && !at.is_multiple_of(16);
        if is_one_of_many && matches!(failure, Failure::FromThenOn) {
            continue;
        }
        again();
        let error = attempt(failing(at, failure).0).err().unwrap_or_else(|| panic!("{failure:?} at {at}"));
        let Error::Write { path, .. } = &*error else { panic!("{failure:?} at {at}: {error}") };
        assert!(path.starts_with(place.path("cut")));
        let latest = place.path("cut").join(std::fs::read_link(place.path("cut/LATEST")).unwrap());
        assert!(latest.join("step_scheduler.json").is_file(), "{failure:?} at {at}: LATEST leads nowhere");
        if place.path("cut").join(&before).exists() {
            assert_eq!(files(&place.path("cut").join(&before)), files(&place.path("before").join(&before)));
        } else {
            assert_ne!(latest, place.path("cut").join(&before), "{failure:?} at {at}");
        }
        if matches!(failure, Failure::Once) {
            let left = std::fs::read_dir(place.path("cut")).unwrap();
            let partial = left
                .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".partial"));
            assert_eq!(partial.count(), 0, "{failure:?} at {at}: room is still taken");
        }
        if is_one_of_many {
            continue;
        }
        let resumed =
            place.train("cut", &more).unwrap_or_else(|error| panic!("{failure:?} at {at}: {error}"));
        assert_eq!(resumed.steps.len(), 6);
        assert_same(&place.path("cut"), &place.path("whole"));
        let names = std::fs::read_dir(place.path("cut")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let hidden: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        assert!(hidden.is_empty(), "{failure:?} at {at}: {hidden:?}");
    }
}

#[test]
fn a_full_disk_is_named_with_the_file() {
    let place = Place::new();
    let disk = Disk::gated(|operation, path| {
        let is_optimizer = path.ends_with("optim/exp_avg_sq.safetensors");
        if operation == Operation::Write && is_optimizer {
            Err(ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    });
    let recipe = place.recipe("run", &[]);
    let run = trainer::run_on(on(disk), &recipe, &AtomicBool::new(false), &mut |_| {});
    let error = run.err().unwrap();
    assert!(error.to_string().ends_with("exp_avg_sq.safetensors"), "{error}");
    let source = std::error::Error::source(&error).unwrap().downcast_ref::<IoError>().unwrap();
    assert_eq!(source.kind(), ErrorKind::StorageFull);
    let names = std::fs::read_dir(place.path("run")).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["expert_load.jsonl", "status.json", "training.jsonl", "validation.jsonl"]);
}

fn names(run: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("epoch_")).collect();
    names.sort_by_key(|name| name.rsplit('_').next().unwrap().parse::<usize>().unwrap());
    names
}

#[test]
fn the_last_and_the_best_checkpoints_are_kept() {
    let place = Place::new();
    // The rate rises at every step until nothing is learned, so that the held-out loss is lowest early.
    let more = [
        ("step_scheduler.ckpt_every_steps", "2"),
        ("checkpoint.max_recent_checkpoints", "2"),
        ("lr_scheduler.lr_warmup_steps", "19"),
        ("lr_scheduler.max_lr", "3.0"),
    ];
    let run = place.train("run", &more).unwrap();
    let measured = run.validations[0].1.iter().filter(|v| v.step % 2 == 1);
    let best = measured.min_by(|a, b| a.val_loss.total_cmp(&b.val_loss)).unwrap();
    assert!(best.step < 16, "the best is step {}", best.step);
    let target = |pointer| std::fs::read_link(place.path("run").join(pointer)).unwrap();
    assert_eq!(target("LATEST"), Path::new(&format!("epoch_{}_step_19", run.steps[19].epoch)));
    let best = format!("epoch_{}_step_{}", best.epoch, best.step);
    assert_eq!(target("LOWEST_VAL"), Path::new(&best));
    let kept = names(&place.path("run"));
    assert_eq!((kept.len(), &kept[0]), (3, &best), "{kept:?}");
    assert!(kept[1].ends_with("_17") && kept[2].ends_with("_19"), "{kept:?}");
    let losses = std::fs::read_to_string(place.path("run").join(&best).join("losses.json")).unwrap();
    let losses: Value = serde_json::from_str(&losses).unwrap();
    assert!(losses["train_loss"].is_f64() && losses["val_loss"].is_f64(), "{losses}");
}

#[test]
fn a_run_goes_back_only_where_it_overwrites_nothing() {
    let place = Place::new();
    place.train("whole", &[]).unwrap();
    place.train("run", &[]).unwrap();
    let all = names(&place.path("run"));
    let back = [("checkpoint.restore_from", all[1].as_str())];
    let error = place.train("run", &back).err().unwrap();
    let Error::LaterCheckpoints { first_step: 10, later, .. } = &*error else { panic!("{error}") };
    assert_eq!(later, &all[2..]);
    assert_eq!(lines(&place.path("run/training.jsonl")).len(), 20, "nothing has changed");

    for name in &all[2..] {
        std::fs::rename(place.path("run").join(name), place.path(name)).unwrap();
    }
    place.train("run", &back).unwrap();
    assert_same(&place.path("run"), &place.path("whole"));

    // Elsewhere, by path.
    let path = place.path("whole").join(&all[2]);
    let run = place.train("other", &[("checkpoint.restore_from", path.to_str().unwrap())]).unwrap();
    assert_eq!(run.steps.iter().map(|step| step.step).collect::<Vec<_>>(), [15, 16, 17, 18, 19]);
    assert_eq!(files(&run.checkpoint.unwrap()), files(&place.path("whole").join(&all[3])));

    let error = place.train("run", &[("checkpoint.restore_from", "epoch_9_step_99")]).err().unwrap();
    let text = error.to_string();
    assert!(text.contains("epoch_9_step_99") && all.iter().all(|name| text.contains(name)), "{text}");
}

#[test]
fn a_run_begins_at_its_best_checkpoint() {
    let place = Place::new();
    let run = place.train("run", &[]).unwrap();
    let best = std::fs::read_link(place.path("run/LOWEST_VAL")).unwrap();
    let best_step: usize = best.to_str().unwrap().rsplit('_').next().unwrap().parse().unwrap();
    for name in names(&place.path("run")) {
        if name.rsplit('_').next().unwrap().parse::<usize>().unwrap() > best_step {
            std::fs::remove_dir_all(place.path("run").join(name)).unwrap();
        }
    }
    let mut first = None;
    let recipe = place.recipe("run", &[("checkpoint.restore_from", "LOWEST_VAL")]);
    let again = trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |event| {
        if let Event::Step(metrics) = event {
            first.get_or_insert(metrics.step);
        }
    });
    again.unwrap();
    assert_eq!(first, (best_step < 19).then_some(best_step + 1));
    assert_eq!(run.steps.len(), 20);
}

#[test]
fn a_run_that_has_ended_is_left_alone() {
    let place = Place::new();
    let run = place.train("run", &[]).unwrap();
    let before = files(&place.path("run"));
    let again = place.train("run", &[]).unwrap();
    assert_eq!(again.checkpoint, run.checkpoint);
    assert_eq!(again.steps.len(), 20);
    let after = files(&place.path("run"));
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    // More steps are taken when they are asked for.
    let longer = place.train("run", &[("step_scheduler.max_steps", "22")]).unwrap();
    assert_eq!(longer.steps.len(), 22);
}

#[test]
fn a_checkpoint_of_another_run_is_refused_by_what_differs() {
    let place = Place::new();
    let few = ("step_scheduler.max_steps", "5");
    place.train("run", &[few]).unwrap();
    let other = place.path("other.json");
    let mut config = config();
    config["moe_intermediate_size"] = 12.into();
    std::fs::write(&other, config.to_string()).unwrap();
    for (key, value, differs) in [
        ("model.config", other.to_str().unwrap(), "moe_intermediate_size was 8, is 12"),
        ("model.torch_dtype", "bfloat16", "model.torch_dtype was float32, is bfloat16"),
        ("rng.seed", "6", "rng.seed was 5, is 6"),
        ("dataset.num_samples", "27", "number of samples was 26, is 27"),
        ("packed_sequence.packed_sequence_size", "64", "packed_sequence_size was 0, is 64"),
    ] {
        let error = place.train("run", &[few, (key, value)]).err().unwrap();
        assert!(matches!(*error, Error::Incompatible { .. }), "{error}");
        assert!(error.to_string().contains(differs), "{error}");
    }
    assert_eq!(lines(&place.path("run/training.jsonl")).len(), 5);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_file() {
    let place = Place::new();
    let few = [("step_scheduler.max_steps", "5")];
    let checkpoint = place.train("run", &few).unwrap().checkpoint.unwrap();
    for name in ["optim/exp_avg.safetensors", "trainer.json", "dataloader/dataloader_dp_rank_0.json"] {
        let path = checkpoint.join(name);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = place.train("run", &few).err().unwrap();
        assert!(matches!(&*error, Error::Damaged { path: named, .. } if named == &path), "{error}");
        std::fs::write(&path, whole).unwrap();
    }
    place.train("run", &few).unwrap();
}

#[test]
fn a_learned_tokenizer_is_kept() {
    let place = Place::new();
    let text = place.path("text.txt");
    let words =
        ["a tale of two cities", "it was the best of times", "the worst of times", "we had all before us"];
    let lines: Vec<String> = (0..120).map(|i| format!("{} {}", words[i % 4], words[(i / 4) % 4])).collect();
    std::fs::write(&text, lines.join("\n")).unwrap();
    let mut wide = config();
    wide["vocab_size"] = 1400.into();
    std::fs::write(place.path("config.json"), wide.to_string()).unwrap();
    let dataset = |vocab_size: &str| {
        format!(
            "{{_target_: text, path_or_dataset: {}, seq_length: 16, tokenizer: {{_target_: learned, vocab_size: {vocab_size}}}}}",
            text.display()
        )
    };
    let train = |vocab_size: &str, steps: &str| {
        let recipe = RECIPE.replace(
            "{_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}",
            &dataset(vocab_size),
        );
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let overrides = [
            set("model.config", place.path("config.json").to_str().unwrap()),
            set("checkpoint.checkpoint_dir", place.path("run").to_str().unwrap()),
            set("step_scheduler.max_steps", steps),
        ];
        let recipe = Recipe::parse("recipe.yaml", recipe.as_bytes(), &overrides, &|_| None).unwrap();
        trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |_| {}).unwrap()
    };
    let first = train("300", "4").checkpoint.unwrap().join("model/consolidated/tekken.json");
    let learned = std::fs::read(&first).unwrap();
    std::fs::remove_dir_all(place.path("run/tokenizer")).unwrap();
    // Learned anew, the vocabulary would have another size.
    let second = train("320", "6").checkpoint.unwrap().join("model/consolidated/tekken.json");
    assert_ne!(first, second);
    assert!(std::fs::read(second).unwrap() == learned);
}

/// A checkpoint whose embedding of token 7 is no number.
fn poisoned(place: &Place) -> PathBuf {
    let file = ConfigFile::from_value(config(), "config.json".as_ref(), &ConfigOptions::default()).unwrap();
    let source = InitialSource::new(&file.config, 3, DType::F32);
    let model = Mistral4::new(&file.config, MoeOptions::default(), &source, &Device::flex()).unwrap();
    let model = model.map_parameters(|key, _, values| {
        let mut data = values.into_data().try_into_vec::<f32>().unwrap();
        if key == "model.embed_tokens.weight" {
            data[7 * 16..8 * 16].fill(f32::NAN);
        }
        burn::tensor::Tensor::from_floats(data.as_slice(), &Device::flex())
    });
    let folder = place.path("poisoned");
    let options = SaveOptions { dtype: SaveDType::Float(DType::F32), ..SaveOptions::default() };
    model.save(&folder, &file, &options).unwrap();
    folder
}

#[test]
fn a_loss_that_is_no_number_names_its_rows_and_stops_or_is_skipped() {
    let place = Place::new();
    let model = poisoned(&place);
    let rows = place.path("rows.jsonl");
    // Row 5 alone holds token 7.
    let row = |row: usize| {
        let ids: Vec<usize> =
            (0..6).map(|i| if row == 5 && i == 2 { 7 } else { 20 + (row + i) % 10 }).collect();
        serde_json::json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
    };
    std::fs::write(&rows, (0..12).map(row).collect::<String>()).unwrap();
    let run = |folder: &str, on_non_finite: &str| {
        let text = RECIPE
            .replace("NeMoAutoModelForCausalLM.from_config, config: config.json", &format!(
                "NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: {}",
                model.display()
            ))
            .replace("{_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}", &format!(
                "{{_target_: pretokenized_jsonl, path_or_dataset: {}, unshifted: true}}",
                rows.display()
            ))
            .replace("validation_dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 7, num_samples: 5}", "");
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let overrides = [
            set("checkpoint.checkpoint_dir", place.path(folder).to_str().unwrap()),
            set("dataloader.shuffle", "false"),
            set("step_scheduler.max_steps", "5"),
            set("step_scheduler.ckpt_every_steps", "1"),
            set("step_scheduler.on_non_finite", on_non_finite),
        ];
        let recipe = Recipe::parse("recipe.yaml", text.as_bytes(), &overrides, &|_| None).unwrap();
        let mut notes = Vec::new();
        let run = trainer::run(&recipe, &Device::flex(), &AtomicBool::new(false), &mut |event| {
            if let Event::Note(text) = event {
                notes.push(text);
            }
        });
        (run, notes)
    };
    // Rows 4 and 5 are the first micro-batch of step 1.
    let error = run("stopped", "stop").0.err().unwrap();
    assert!(matches!(&error, Error::NotFinite { step: 1, rows, .. } if rows == &[4, 5]), "{error}");

    let (run, notes) = run("skipped", "skip");
    let run = run.unwrap();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].starts_with("step 1 skipped") && notes[0].ends_with("rows [4, 5]"), "{notes:?}");
    let lines = lines(&place.path("skipped/training.jsonl"));
    let skipped: Vec<_> =
        lines.iter().map(|line| line.get("skipped_steps").and_then(Value::as_u64)).collect();
    assert_eq!(skipped, [None, Some(1), None, None, Some(2)]);
    assert_eq!((&lines[1]["loss"], &lines[1]["skipped"]), (&Value::Null, &"non_finite".into()));
    assert!(run.steps[2].loss.is_finite());
    let all = names(&place.path("skipped"));
    let [before, after] = [0, 1].map(|step| files(&place.path("skipped").join(&all[step])));
    for name in ["model/consolidated/model.safetensors", "optim/exp_avg.safetensors", "optim/optimizer.json"]
    {
        assert!(before[Path::new(name)] == after[Path::new(name)], "a skipped step changed {name}");
    }
}

#[test]
fn a_spike_of_the_loss_stops_the_run_where_it_is_asked_to() {
    let place = Place::new();
    let more = [
        ("step_scheduler.max_steps", "80"),
        ("step_scheduler.on_loss_spike", "stop"),
        ("step_scheduler.loss_spike_sigma", "1"),
        ("step_scheduler.ckpt_every_steps", "1000"),
        // The rate rises at every step until nothing is learned.
        ("lr_scheduler.lr_warmup_steps", "70"),
        ("lr_scheduler.max_lr", "3.0"),
    ];
    let error = place.train("run", &more).err().unwrap();
    let Error::LossSpike { step, loss, limit, rows } = &*error else { panic!("{error}") };
    assert!(*step >= 32 && loss > limit && rows.len() == 2, "{error}");
}

#[test]
fn keys_of_checkpoints_are_read_and_checked() {
    let read = |lines: &str| {
        let text = RECIPE.replace("checkpoint: {checkpoint_dir: run}", lines);
        Recipe::parse("recipe.yaml", text.as_bytes(), &[], &|_| None).map_err(|error| error.to_string())
    };
    let config =
        read("checkpoint: {restore_from: LOWEST_VAL, max_recent_checkpoints: 3, is_async: true}").unwrap();
    config.check_runnable().unwrap();
    let config = config.checkpoint;
    assert_eq!(config.restore_from, RestoreFrom::LowestVal);
    assert_eq!((config.max_recent_checkpoints, config.is_async), (Some(3), true));
    let config = read("checkpoint: {max_recent_checkpoints: null, restore_from: null}").unwrap().checkpoint;
    assert_eq!((config.restore_from, config.max_recent_checkpoints), (RestoreFrom::Latest, None));

    let none_kept = read("checkpoint: {max_recent_checkpoints: 0}").unwrap_err();
    assert!(none_kept.contains("max_recent_checkpoints: 0"), "{none_kept}");
    let disabled = read("checkpoint: {enabled: false, restore_from: LATEST}").unwrap_err();
    assert!(disabled.contains("`enabled`"), "{disabled}");
    let sets = "checkpoint: {best_metric_key: easy}\n\
                validation_dataset_hard: {_target_: MockIterableDataset}";
    let unknown = read(sets).unwrap_err();
    assert!(unknown.contains("best_metric_key: easy") && unknown.contains("default, hard"), "{unknown}");
}
