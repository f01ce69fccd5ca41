//! Runs that stop anywhere and go on: the same losses and the same weights, bit for bit.

mod bad_steps;
mod folder;
mod place;
mod refused;
mod saves;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use mistral4_train::trainer::{self, Event, Run};
use place::{Place, assert_same, files, lines, recipe, train_until};
use proptest::prelude::*;

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
        ("bare", "{lr: 1.0e-2, master_weights: false, exp_avg_dtype: torch.bfloat16}", "exp_avg"),
        ("muon", "{_target_: dion.Muon, lr: 1.0e-2, nesterov: true}", "momentum_buffer"),
    ] {
        let dtype = if ["8bit", "bare"].contains(&name) { "bfloat16" } else { "float32" };
        let more = [("optimizer", optimizer), ("model.torch_dtype", dtype)];
        let (resumed, whole) = (format!("{name}-resumed"), format!("{name}-whole"));
        train_until(&place.recipe(&resumed, &more), 8).unwrap();
        place.train(&resumed, &more).unwrap();
        let run = place.train(&whole, &more).unwrap();
        assert_same(&place.path(&resumed), &place.path(&whole));
        assert!(run.steps[19].loss < run.steps[0].loss, "{name}");
        let has_masters =
            files(run.checkpoint.as_ref().unwrap()).contains_key(Path::new("optim/master.safetensors"));
        assert_eq!(has_masters, name == "8bit");
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
