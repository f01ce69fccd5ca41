//! Runs on many ranks give the losses, gradients and weights of a run on one, to rounding.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use mistral4_train::checkpoint::{Disk, Operation};
use mistral4_train::parallel::communicator::threads;
use mistral4_train::recipe::{Override, Recipe};
use mistral4_train::trainer::{self, Event, Host};
use serde_json::Value;

/// The trained fixtures of `parity.rs`.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/training")
}

/// A recipe over a fixture.
#[derive(Clone, Copy)]
struct Case {
    fixture: &'static str,
    target: &'static str,
}

const TEXT: Case =
    Case { fixture: "text", target: "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained" };
const MULTIMODAL: Case =
    Case { fixture: "multimodal", target: "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained" };

/// Adapters on everything, in place of the weights.
const ADAPTERS: [(&str, &str); 5] = [
    ("peft.target_modules", "['*']"),
    ("peft.dim", "4"),
    ("peft.alpha", "8"),
    ("peft.dropout", "0.1"),
    ("model.gate_bias_update_factor", "0"),
];

impl Case {
    fn recipe(self, out: &Path, more: &[(&str, &str)]) -> Recipe {
        let case = fixtures().join(self.fixture);
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let mut overrides = vec![
            set("model._target_", self.target),
            set("model.pretrained_model_name_or_path", case.join("model").to_str().unwrap()),
            set("model.gate_bias_update_factor", "0.01"),
            set("model.aux_loss_coeff", "0.05"),
            set("dataset.path_or_dataset", case.join("unshifted.jsonl").to_str().unwrap()),
            set("checkpoint.checkpoint_dir", out.to_str().unwrap()),
            set("step_scheduler.local_batch_size", "1"),
            set("step_scheduler.max_steps", "4"),
        ];
        overrides.extend(more.iter().map(|(key, value)| set(key, value)));
        Recipe::load(&fixtures().join("recipe.yaml"), &overrides).unwrap()
    }

    fn train(self, ranks: usize, out: &Path, more: &[(&str, &str)]) {
        train_until(&self.recipe(out, more), ranks, usize::MAX);
    }
}

/// Runs on `ranks` ranks until the step `last`, and is then asked to stop.
fn train_until(recipe: &Recipe, ranks: usize, last: usize) {
    let stop = AtomicBool::new(false);
    threads::run(ranks, |world| {
        let host = Host { device: Device::flex(), disk: Disk::default(), world };
        let mut observe = |event: Event<'_>| {
            if let Event::Step(metrics) = event {
                stop.store(metrics.step + 1 >= last, Ordering::Relaxed);
            }
        };
        trainer::run_on(host, recipe, &stop, &mut observe)
            .map(|_| ())
            .map_err(|error| error.to_string())
            .unwrap();
    });
}

fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("training.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn tensors(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values = |tensor: safetensors::tensor::TensorView<'_>| match tensor.dtype() {
        safetensors::Dtype::U8 => tensor.data().iter().map(|&b| f32::from(b)).collect(),
        safetensors::Dtype::BF16 => {
            let halves = tensor.data().as_chunks::<2>().0.iter();
            halves.map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect()
        }
        _ => tensor.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    };
    tensors.tensors().into_iter().map(|(key, tensor)| (key, values(tensor))).collect()
}

/// Compares tensor files, each tensor by the norm of what differs.
fn assert_close(a: &Path, b: &Path, tolerance: f64) {
    let (a, b) = (tensors(a), tensors(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (key, a) in &a {
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let size = norm(&mut a.iter().copied());
        let diff = norm(&mut a.iter().zip(&b[key]).map(|(a, b)| a - b));
        assert!(diff <= tolerance * size + 1e-9, "{key}: {diff} of {size}");
    }
}

/// Compares a run on several ranks with one on a single rank: every step's loss and norm, the first gradient (as Adam
/// remembers it) and the last weights.
fn assert_same_run(case: Case, ranks: usize, layout: &[(&str, &str)]) {
    assert_same_run_within(case, ranks, layout, 2e-5);
}

/// As [`assert_same_run`], every step's loss and norm within a tolerance of its own.
fn assert_same_run_within(case: Case, ranks: usize, layout: &[(&str, &str)], tolerance: f64) {
    let place = tempfile::tempdir().unwrap();
    let [one, many] = ["one", "many"].map(|name| place.path().join(name));
    let saving = [("step_scheduler.ckpt_every_steps", "1")];
    let same: Vec<(&str, &str)> =
        layout.iter().copied().filter(|(key, _)| !key.starts_with("distributed.")).collect();
    case.train(1, &one, &[&same[..], &saving].concat());
    case.train(ranks, &many, &[layout, &saving].concat());
    let (a, b) = (metrics(&one), metrics(&many));
    assert!(a.len() >= 4 && a.len() == b.len());
    for (a, b) in a.iter().zip(&b) {
        for key in ["loss", "grad_norm", "aux_loss", "expert_load_entropy"] {
            let (a, b) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
            assert!(
                (a - b).abs() <= tolerance * a.abs(),
                "{key}: {a} on one rank, {b} on {ranks} ({layout:?})"
            );
        }
        for key in ["num_label_tokens", "num_tokens_per_step", "lr"] {
            assert_eq!(a[key], b[key], "{key}");
        }
        assert!(b["rank_time_max"].as_f64() >= b["rank_time_mean"].as_f64() && b["slowest_rank"].is_string());
        assert!(a.get("slowest_rank").is_none());
    }
    for state in ["exp_avg", "momentum_buffer", "exp_avg_absmax"] {
        let first = format!("epoch_0_step_0/optim/{state}.safetensors");
        if one.join(&first).exists() {
            assert_close(&one.join(&first), &many.join(&first), 0.5 * tolerance);
        }
    }
    // An adapter's B begins at 0, so that all of it is Adam's quotients, in which small gradients' rounding grows.
    let (last, growth) = match layout.iter().any(|(key, _)| key.starts_with("peft.")) {
        true => ("LATEST/model/adapter_model.safetensors", 25.0),
        false => ("LATEST/model/consolidated/model.safetensors", 5.0),
    };
    assert_close(&one.join(last), &many.join(last), growth * tolerance);
}

#[test]
fn replicas_train_like_one_rank() {
    for case in [TEXT, MULTIMODAL] {
        for ranks in [2, 4] {
            assert_same_run(case, ranks, &[("distributed.strategy", "ddp")]);
        }
    }
    assert_same_run(
        TEXT,
        2,
        &[("distributed.strategy", "ddp"), ("distributed.activation_checkpointing", "true")],
    );
}

#[test]
fn shards_train_like_one_rank() {
    for case in [TEXT, MULTIMODAL] {
        for ranks in [2, 4] {
            assert_same_run(case, ranks, &[("distributed.strategy", "fsdp2")]);
        }
    }
    assert_same_run(TEXT, 2, &[("distributed.defer_fsdp_grad_sync", "false")]);
}

#[test]
fn shards_whose_weights_stay_train_like_one_rank() {
    let stay = ("distributed.reshard_after_forward", "false");
    for (case, ranks, more) in [
        (TEXT, 4, &[][..]),
        (MULTIMODAL, 2, &[]),
        (MULTIMODAL, 2, &[("distributed.activation_checkpointing", "true")]),
        (TEXT, 4, &[("distributed.pp_size", "2")]),
        (MULTIMODAL, 2, &ADAPTERS),
    ] {
        assert_same_run(case, ranks, &[&[stay], more].concat());
    }
}

#[test]
fn a_short_step_at_the_end_of_an_epoch_is_the_same() {
    // Rows 5 and 6 of 6: a step in which half of the ranks have nothing of their own.
    let short = [("dataset.limit_dataset_samples", "6"), ("step_scheduler.num_epochs", "2")];
    for strategy in ["fsdp2", "ddp"] {
        assert_same_run(TEXT, 4, &[&short[..], &[("distributed.strategy", strategy)]].concat());
    }
}

#[test]
fn replicas_of_shards_train_like_one_rank() {
    for case in [TEXT, MULTIMODAL] {
        assert_same_run(case, 4, &[("distributed.dp_replicate_size", "2")]);
    }
}

#[test]
fn experts_over_ranks_train_like_one_rank() {
    for case in [TEXT, MULTIMODAL] {
        for strategy in ["ddp", "fsdp2"] {
            assert_same_run(case, 2, &[("distributed.ep_size", "2"), ("distributed.strategy", strategy)]);
        }
        assert_same_run(case, 4, &[("distributed.ep_size", "2")]);
    }
}

#[test]
fn heads_and_columns_over_ranks_train_like_one_rank() {
    for case in [TEXT, MULTIMODAL] {
        assert_same_run(case, 2, &[("distributed.tp_size", "2")]);
    }
    assert_same_run(TEXT, 4, &[("distributed.tp_size", "2"), ("distributed.ep_size", "2")]);
}

#[test]
fn layers_over_ranks_train_like_one_rank() {
    for case in [TEXT, MULTIMODAL] {
        assert_same_run(case, 2, &[("distributed.pp_size", "2")]);
    }
    let both = [("distributed.pp_size", "2"), ("distributed.ep_size", "2")];
    assert_same_run(MULTIMODAL, 4, &both);
    assert_same_run(TEXT, 4, &[both[0], both[1], ("distributed.strategy", "ddp")]);
}

#[test]
fn adapters_over_ranks_train_like_one_rank() {
    let ddp = ("distributed.strategy", "ddp");
    let [pp, tp, ep] = ["pp_size", "tp_size", "ep_size"].map(|key| format!("distributed.{key}"));
    let [pp, tp, ep] = [(pp.as_str(), "2"), (tp.as_str(), "2"), (ep.as_str(), "2")];
    for (case, ranks, layout) in [
        (TEXT, 2, &[ddp][..]),
        (MULTIMODAL, 2, &[]),
        (TEXT, 4, &[("distributed.dp_replicate_size", "2")]),
        (MULTIMODAL, 2, &[ep, ddp]),
        (TEXT, 2, &[ep]),
        (TEXT, 4, &[ep]),
        (MULTIMODAL, 2, &[tp]),
        (MULTIMODAL, 2, &[pp]),
        (TEXT, 4, &[pp, ep]),
        (TEXT, 4, &[tp, ep]),
    ] {
        assert_same_run(case, ranks, &[&ADAPTERS[..], layout].concat());
    }
    let dora = [("peft.use_dora", "true"), ("peft.target_modules", "['*_proj']")];
    assert_same_run(TEXT, 2, &[&ADAPTERS[..], &dora, &[tp]].concat());
}

#[test]
fn adapters_begin_and_are_written_as_on_one_rank() {
    let place = tempfile::tempdir().unwrap();
    let first = [("step_scheduler.max_steps", "1"), ("optimizer.lr", "0"), ("lr_scheduler", "null")];
    let spread = [("distributed.tp_size", "2"), ("distributed.ep_size", "2")];
    let staged = [("distributed.pp_size", "2"), ("distributed.ep_size", "2")];
    for (name, ranks, layout) in [("one", 1, &[][..]), ("spread", 4, &spread[..]), ("staged", 4, &staged[..])]
    {
        TEXT.train(ranks, &place.path().join(name), &[&ADAPTERS[..], &first, layout].concat());
    }
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let read =
            |name: &str| std::fs::read(place.path().join(name).join("LATEST/model").join(file)).unwrap();
        for name in ["spread", "staged"] {
            assert!(read("one") == read(name), "{file} of {name}");
        }
    }
}

/// Weights that are quantised when they are read: whole on a rank, some of the experts, or panels of rows.
#[test]
fn quantised_bases_over_ranks_train_like_one_rank() {
    // Products with integer codes round activations to 15 bits; what tensor parallelism divides is dense.
    for (weights, ranks, layout, tolerance) in [
        ("int8", 2, &[][..], 2e-4),
        ("int4", 4, &[("distributed.dp_replicate_size", "2")], 2e-4),
        ("int4", 4, &[("distributed.ep_size", "2")], 2e-4),
        ("int8", 2, &[("distributed.ep_size", "2"), ("distributed.strategy", "ddp")], 2e-4),
        ("int4", 2, &[("distributed.tp_size", "2")], 5e-3),
        ("fp8", 2, &[("distributed.pp_size", "2")], 2e-4),
    ] {
        let quantised = [&ADAPTERS[..], &[("quantization.weights", weights)], layout].concat();
        assert_same_run_within(TEXT, ranks, &quantised, tolerance);
    }
}

const MUON: (&str, &str) =
    ("optimizer", "{_target_: dion.Muon, lr: 1.0e-2, nesterov: true, newton_schulz_dtype: torch.float32}");
const EIGHT_BITS: (&str, &str) =
    ("optimizer", "{_target_: bitsandbytes.optim.AdamW8bit, lr: 1.0e-3, min_8bit_size: 512}");

#[test]
fn muon_and_8_bit_states_over_ranks_train_like_one_rank() {
    for (optimizer, tolerance) in [(MUON, 2e-4), (EIGHT_BITS, 2e-3)] {
        for (ranks, layout) in [
            (2, &[][..]),
            (4, &[("distributed.dp_replicate_size", "2")]),
            (2, &[("distributed.ep_size", "2"), ("distributed.strategy", "ddp")]),
            (4, &[("distributed.ep_size", "2")]),
            (4, &[("distributed.pp_size", "2")]),
        ] {
            assert_same_run_within(TEXT, ranks, &[&[optimizer], layout].concat(), tolerance);
        }
    }
}

#[test]
fn a_short_last_step_waits_for_nobody() {
    // 120 rows are 15 batches: one rank has none in the last step.
    let short = [
        ("step_scheduler.local_batch_size", "8"),
        ("step_scheduler.global_batch_size", "16"),
        ("step_scheduler.max_steps", "8"),
    ];
    for layout in [("distributed.strategy", "fsdp2"), ("distributed.ep_size", "2")] {
        assert_same_run(TEXT, 2, &[&short[..], &[layout]].concat());
    }
}

#[test]
fn checkpoints_go_from_one_layout_to_another() {
    let tp = ("distributed.tp_size", "2");
    checkpoint_goes_on_elsewhere(&[], tp, 2e-5);
    checkpoint_goes_on_elsewhere(&ADAPTERS, tp, 2e-5);
}

#[test]
fn checkpoints_of_muon_and_8_bit_states_go_from_one_layout_to_another() {
    let ep = ("distributed.ep_size", "2");
    checkpoint_goes_on_elsewhere(&[MUON], ep, 2e-4);
    checkpoint_goes_on_elsewhere(&[EIGHT_BITS], ep, 2e-3);
}

/// From a pipeline with experts spread over its stages' ranks to one rank, and to another layout of two.
fn checkpoint_goes_on_elsewhere(what: &[(&str, &str)], other: (&str, &str), tolerance: f64) {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let longer = [what, &[("step_scheduler.max_steps", "6")]].concat();
    let pipeline = [&longer[..], &[("distributed.pp_size", "2"), ("distributed.ep_size", "2")]].concat();
    TEXT.train(4, &path("whole"), &pipeline);
    train_until(&TEXT.recipe(&path("parts"), &pipeline), 4, 3);
    for name in ["one", "other"] {
        copy(&path("parts"), &path(name));
    }
    TEXT.train(1, &path("one"), &longer);
    TEXT.train(2, &path("other"), &[&longer[..], &[other]].concat());
    TEXT.train(4, &path("parts"), &pipeline);
    let whole = metrics(&path("whole"));
    for (name, tolerance) in [("parts", 0.0), ("one", tolerance), ("other", tolerance)] {
        let resumed = metrics(&path(name));
        assert_eq!(resumed.len(), 6, "{name}");
        for (a, b) in whole.iter().zip(&resumed) {
            for key in ["loss", "grad_norm"] {
                let (a, b) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
                assert!((a - b).abs() <= tolerance * a.abs(), "{name}: {key} {a} against {b}");
            }
        }
    }
}

#[test]
fn frozen_parts_are_spread_too_and_stay() {
    let frozen = [("freeze_config.freeze_embeddings", "true"), ("freeze_config.freeze_vision_tower", "true")];
    let place = tempfile::tempdir().unwrap();
    let [one, many] = ["one", "many"].map(|name| place.path().join(name));
    MULTIMODAL.train(1, &one, &frozen);
    MULTIMODAL.train(2, &many, &frozen);
    let last = "LATEST/model/consolidated/model.safetensors";
    assert_close(&one.join(last), &many.join(last), 1e-4);
    let before = tensors(&fixtures().join("multimodal/model/model.safetensors"));
    let after = tensors(&many.join(last));
    let tower = |key: &&String| key.contains("vision_tower") || key.contains("embed_tokens");
    assert!(before.keys().any(|key| tower(&key)));
    for key in before.keys().filter(tower) {
        assert_eq!(before[key], after[key], "{key}");
    }
}

#[test]
fn ranks_that_stop_go_on_bit_for_bit_and_on_another_number_to_rounding() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let longer = [("step_scheduler.max_steps", "6"), ("checkpoint.is_async", "true")];
    TEXT.train(4, &path("whole"), &longer);
    train_until(&TEXT.recipe(&path("parts"), &longer), 4, 3);
    for ranks in [2, 1] {
        copy(&path("parts"), &path(&format!("on_{ranks}")));
        TEXT.train(ranks, &path(&format!("on_{ranks}")), &longer);
    }
    TEXT.train(4, &path("parts"), &longer);
    let whole = metrics(&path("whole"));
    for (name, tolerance) in [("parts", 0.0), ("on_2", 2e-5), ("on_1", 2e-5)] {
        let resumed = metrics(&path(name));
        assert_eq!(resumed.len(), 6, "{name}");
        for (a, b) in whole.iter().zip(&resumed) {
            for key in ["loss", "grad_norm"] {
                let (a, b) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
                assert!((a - b).abs() <= tolerance * a.abs(), "{name}: {key} {a} against {b}");
            }
        }
    }
    for file in
        ["model/consolidated/model.safetensors", "optim/exp_avg.safetensors", "optim/exp_avg_sq.safetensors"]
    {
        let read = |name: &str| std::fs::read(path(name).join("LATEST").join(file)).unwrap();
        assert!(read("whole") == read("parts"), "{file} differs after stopping and going on");
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&from, &to),
            kind if kind.is_symlink() => {
                std::os::unix::fs::symlink(std::fs::read_link(&from).unwrap(), &to).unwrap();
            }
            _ => drop(std::fs::copy(&from, &to).unwrap()),
        }
    }
}

/// Each rank writes its own part of the optimizer's states.
#[test]
fn a_rank_whose_disk_fails_fails_all_and_nothing_is_published() {
    let place = tempfile::tempdir().unwrap();
    let recipe = TEXT.recipe(place.path(), &[("step_scheduler.ckpt_every_steps", "1")]);
    let failed = threads::run(2, |world| {
        let is_second = world.rank() == 1;
        let disk = Disk::gated(move |operation, path| match operation {
            Operation::Write if is_second && path.ends_with("exp_avg.safetensors") => {
                Err(std::io::Error::other("disk on fire"))
            }
            _ => Ok(()),
        });
        let host = Host { device: Device::flex(), disk, world };
        let run = trainer::run_on(host, &recipe, &AtomicBool::new(false), &mut |_| {});
        run.err().map(|error| error.to_string()).unwrap()
    });
    assert!(failed[0].contains("rank 1") && failed[0].contains("exp_avg.safetensors"), "{}", failed[0]);
    assert!(failed[1].contains("cannot write"), "{}", failed[1]);
    let left = std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("epoch")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_mesh_that_does_not_fit_is_refused_on_every_rank() {
    for (ranks, key, size, expected) in [
        (2, "dp_size", "3", "3 * 1 * 1 * 1 = 3, and there are 2 ranks"),
        (3, "ep_size", "3", "n_routed_experts 8 is not divisible by ep_size 3"),
        (3, "tp_size", "3", "num_attention_heads 4 is not divisible by tp_size 3"),
        (3, "pp_size", "3", "num_hidden_layers 2 is less than the 3 stages of pp_size 3 x 1 a rank"),
    ] {
        let place = tempfile::tempdir().unwrap();
        let recipe = TEXT.recipe(place.path(), &[(&format!("distributed.{key}"), size)]);
        let refused = threads::run(ranks, |world| {
            let host = Host { device: Device::flex(), disk: Disk::default(), world };
            let run = trainer::run_on(host, &recipe, &AtomicBool::new(false), &mut |_| {});
            run.err().map(|error| error.to_string())
        });
        for message in refused {
            let message = message.unwrap();
            assert!(message.contains(expected), "{message}");
        }
    }
}
