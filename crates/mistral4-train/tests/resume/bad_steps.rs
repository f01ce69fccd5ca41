//! Steps whose loss is no number, or far above those before.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use mistral4::Mistral4;
use mistral4::checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::{DType, SaveDType, SaveOptions};
use mistral4::model::moe::MoeOptions;
use mistral4::weights::InitialSource;
use mistral4_train::Error;
use mistral4_train::recipe::{Override, Recipe};
use mistral4_train::trainer::{self, Event};
use serde_json::Value;

use crate::place::{Place, RECIPE, config, files, lines, names};

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
