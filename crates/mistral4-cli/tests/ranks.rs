//! Training on ranks that `mpirun` starts: their losses, their deaths, their checkpoints.
#![cfg(all(feature = "mpi", unix))]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const RECIPE: &str = "
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler:
  {global_batch_size: 4, local_batch_size: 2, max_steps: 20, num_epochs: 10000, ckpt_every_steps: 5,
   save_checkpoint_every_epoch: false}
rng: {seed: 5}
model: {_target_: NeMoAutoModelForCausalLM.from_config, config: CONFIG, torch_dtype: float32}
dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}
optimizer: {_target_: AdamW, lr: 1.0e-2, betas: [0.9, 0.95], weight_decay: 0.1}
clip_grad_norm: {max_norm: 1.0}
";

/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a recipe; `None`, said loudly, where there is no `mpirun`.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Option<Self> {
        if Command::new("mpirun").arg("--version").output().is_err() {
            eprintln!("SKIPPED, NOTHING WAS TESTED: mpirun is not installed (Debian: openmpi-bin)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "model_type": "mistral4", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24,
            "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8,
            "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "first_k_dense_replace": 1, "initializer_range": 0.3, "max_position_embeddings": 64,
            "tie_word_embeddings": false, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
        });
        let path = folder.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let recipe = RECIPE.replace("CONFIG", path.to_str().unwrap());
        std::fs::write(folder.path().join("recipe.yaml"), recipe).unwrap();
        Some(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, run: &str, ranks: usize, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mistral4"));
        command.arg("train").arg(self.path("recipe.yaml")).args(["--threads", "1"]);
        command.args(["--nproc", &ranks.to_string()]);
        command.arg("--checkpoint.checkpoint_dir").arg(self.path(run)).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn train(&self, run: &str, ranks: usize, more: &[&str]) -> Output {
        let output = self.command(run, ranks, more).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        output
    }

    fn losses(&self, run: &str) -> Vec<(u64, f64, f64)> {
        let text = std::fs::read_to_string(self.path(run).join("training.jsonl")).unwrap();
        let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|line| (line["step"].as_u64().unwrap(), number(&line, "loss"), number(&line, "grad_norm")))
            .collect()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `done` says so.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Processes whose parent is `parent`, oldest first.
fn children(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Ok(pid) = entry.unwrap().file_name().into_string().unwrap_or_default().parse::<u32>() else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // The name may hold anything, and ends at the last parenthesis.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        if after_name.split_whitespace().nth(1).and_then(|ppid| ppid.parse().ok()) == Some(parent) {
            found.push(pid);
        }
    }
    found.sort_unstable();
    found
}

/// The ranks that a launcher started.
fn ranks_of(launcher: &Child) -> Vec<u32> {
    children(launcher.id())
        .into_iter()
        .flat_map(children)
        .filter(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "mistral4")
        })
        .collect()
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

fn saved(run: &Path, step: usize) -> bool {
    std::fs::read_link(run.join("LATEST"))
        .is_ok_and(|name| name.to_string_lossy().rsplit('_').next().is_some_and(|s| s.parse() == Ok(step)))
}

/// Kills the rank `rank` with signal 9 as soon as the checkpoint of `step` is there; returns how the launcher ended and
/// how long after.
fn kill_after(place: &Place, run: &str, step: usize, rank: usize, more: &[&str]) -> (Output, Duration) {
    let launcher = place.command(run, 2, more).spawn().unwrap();
    wait_for("a checkpoint", || saved(&place.path(run), step));
    let ranks = ranks_of(&launcher);
    assert_eq!(ranks.len(), 2, "two ranks run");
    signal("-KILL", ranks[rank]);
    let killed = Instant::now();
    let output = launcher.wait_with_output().unwrap();
    (output, killed.elapsed())
}

#[test]
fn two_ranks_train_like_one_and_one_of_them_speaks() {
    let Some(place) = Place::new() else { return };
    for (run, ranks, key, value) in [
        ("one", 1, "strategy", "fsdp2"),
        ("copies", 2, "strategy", "ddp"),
        ("shards", 2, "strategy", "fsdp2"),
        ("experts", 2, "ep_size", "2"),
        ("heads", 2, "tp_size", "2"),
        ("layers", 2, "pp_size", "2"),
    ] {
        let output = place.train(run, ranks, &[&format!("--distributed.{key}"), value]);
        let lines = stderr(&output).lines().filter(|line| line.starts_with("step 3 ")).count();
        assert_eq!(lines, 1, "{}", stderr(&output));
    }
    let one = place.losses("one");
    for run in ["copies", "shards", "experts", "heads", "layers"] {
        let many = place.losses(run);
        assert_eq!(many.len(), one.len());
        for ((step, a, _), (_, b, _)) in one.iter().zip(&many) {
            assert!((a - b).abs() < 1e-4 * a.abs(), "{run}, step {step}: {a} on one rank, {b} on two");
        }
    }
}

#[test]
fn a_killed_rank_ends_all_and_the_run_goes_on_bit_for_bit() {
    let Some(place) = Place::new() else { return };
    place.train("whole", 2, &[]);
    let (output, took) = kill_after(&place, "parts", 9, 1, &["--step_scheduler.max_steps", "1000000"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("error: a rank was ended by signal 9"), "{text}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    // Steps after the checkpoint are lost, and taken again.
    let parts = place.path("parts");
    for entry in std::fs::read_dir(&parts).unwrap() {
        let path = entry.unwrap().path();
        let step = path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .rsplit("_step_")
            .next()
            .and_then(|s| s.parse::<usize>().ok());
        if step.is_some_and(|step| step > 9) {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    place.train("parts", 2, &[]);
    assert_eq!(place.losses("parts"), place.losses("whole"));
    for file in ["model/consolidated/model.safetensors", "optim/exp_avg.safetensors"] {
        let read = |run: &str| std::fs::read(place.path(run).join("LATEST").join(file)).unwrap();
        assert!(read("parts") == read("whole"), "{file} differs after a kill");
    }
}

#[test]
fn a_signal_to_end_saves_on_all_ranks() {
    let Some(place) = Place::new() else { return };
    let launcher = place
        .command(
            "run",
            2,
            &["--step_scheduler.max_steps", "1000000", "--step_scheduler.ckpt_every_steps", "1000000"],
        )
        .spawn()
        .unwrap();
    wait_for("a step", || {
        std::fs::metadata(place.path("run/training.jsonl")).is_ok_and(|file| file.len() > 0)
    });
    signal("-TERM", launcher.id());
    let output = launcher.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("the run was stopped early"));
    let last = place.losses("run").last().unwrap().0 as usize;
    assert!(saved(&place.path("run"), last));
}

#[test]
fn what_the_ranks_refuse_is_said_once_and_is_wrong_input() {
    let Some(place) = Place::new() else { return };
    let output = place.command("run", 2, &["--distributed.dp_size", "3"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert_eq!(
        stderr(&output).matches("3 * 1 * 1 * 1 = 3, and there are 2 ranks").count(),
        1,
        "{}",
        stderr(&output)
    );
}
