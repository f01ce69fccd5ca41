//! Which checkpoints a run's folder keeps, and from which a run goes on.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use mistral4_train::Error;
use mistral4_train::recipe::{Override, Recipe, RestoreFrom};
use mistral4_train::trainer::{self, Event};
use serde_json::Value;

use crate::place::{Place, RECIPE, assert_same, config, files, lines, names};

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
