//! Commands that do what they say.

use std::fs;

use crate::support::{Outcome, Place, read_f32, read_i64};

fn ok(outcome: Outcome) -> String {
    assert_eq!(outcome.code, 0, "{}{}", outcome.stdout, outcome.stderr);
    outcome.stdout
}

fn json(outcome: Outcome) -> serde_json::Value {
    let text = ok(outcome);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn help_and_version() {
    let place = Place::new();
    let help = ok(place.run(&["--help"]));
    for command in [
        "quickstart",
        "train",
        "generate",
        "chat",
        "tokenize",
        "forward",
        "inspect",
        "convert",
        "init",
        "bench",
    ] {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        assert!(ok(place.run(&[command, "--help"])).contains("Usage: mistral4"), "{command}");
    }
    assert!(ok(place.run(&["--version"])).starts_with("mistral4 "));
    assert!(ok(place.run(&[])).contains("Usage"));
}

#[test]
fn inspect_has_the_agreed_keys() {
    let place = Place::with_model();
    let report = json(place.run(&["inspect", "model", "--json"]));
    for key in [
        "model_type",
        "total_parameters",
        "active_parameters",
        "softmax_scale",
        "tensors",
        "dtypes",
        "layers",
        "experts",
        "warnings",
    ] {
        assert!(report.get(key).is_some(), "{key}: {report}");
    }
    assert_eq!(report["model_type"], "mistral3");
    assert_eq!(report["softmax_scale"]["policy"], "standard");
    assert_eq!(report["dtypes"]["F32"].as_u64().unwrap(), 4 * report["total_parameters"].as_u64().unwrap());
    let text = ok(place.run(&["inspect", "model", "--all"]));
    assert!(text.contains("language_model.model.layers.2.mlp.experts.down_proj"), "{text}");
    let forced = json(place.run(&["inspect", "model", "--json", "--softmax-scale", "yarn-mscale"]));
    assert_eq!(forced["softmax_scale"]["policy"], "yarn-mscale");
}

#[test]
fn inspect_looks_as_it_did() {
    let place = Place::with_model();
    insta::assert_snapshot!(ok(place.run(&["inspect", "model"])));
}

#[test]
fn init_repeats_itself_and_convert_comes_back() {
    let place = Place::with_model();
    ok(place.run(&[
        "init",
        "--config",
        "model/config.json",
        "--out",
        "again",
        "--dtype",
        "f32",
        "--seed",
        "0",
    ]));
    ok(place.run(&["init", "--preset", "tiny", "--out", "other", "--dtype", "f32", "--seed", "1"]));
    let weights = |folder: &str| fs::read(place.path(folder).join("model.safetensors")).unwrap();
    assert_eq!(weights("model"), weights("again"));
    assert_ne!(weights("model"), weights("other"));

    ok(place.run(&["convert", "--model", "model", "--out", "native", "--format", "native"]));
    assert!(place.path("native/params.json").is_file());
    assert!(place.path("native/tekken.json").is_file());
    ok(place.run(&["convert", "--model", "native", "--out", "back", "--max-shard-size", "200KB"]));
    assert!(place.path("back/model.safetensors.index.json").is_file());
    ok(place.run(&["convert", "--model", "back", "--out", "whole"]));
    assert_eq!(weights("model"), weights("whole"));

    ok(place.run(&["convert", "--model", "model", "--out", "small", "--dtype", "fp8"]));
    let small = json(place.run(&["inspect", "small", "--json"]));
    assert!(small["dtypes"]["F8_E4M3"].as_u64().unwrap() > 0, "{small}");
    let same = place.run(&["convert", "--model", "model", "--out", "model/../model"]);
    assert_eq!(same.code, 2, "{}", same.stderr);
}

#[test]
fn tokenize_prints_ids_and_writes_what_forward_takes() {
    let place = Place::with_model();
    let plain = json(place.run(&["tokenize", "--model", "model", "--prompt", "the fox"]));
    assert_eq!(plain["text"], "the fox");
    assert_eq!(plain["ids"].as_array().unwrap().len(), plain["tokens"].as_array().unwrap().len());
    place.write("prompt.txt", "the fox");
    assert_eq!(plain, json(place.run(&["tokenize", "--model", "model", "--prompt-file", "prompt.txt"])));
    let dashes = json(place.run(&["tokenize", "--model", "model", "--prompt", "--the"]));
    assert_eq!(dashes["text"], "--the");

    place.write_bmp("grey.bmp", 56, 28);
    place.write(
        "messages.json",
        r#"{"messages": [{"role": "user", "content": [{"type": "image", "path": "grey.bmp"}, {"type": "text", "text": "fox"}]}]}"#,
    );
    let chat = ["tokenize", "--model", "model", "--messages", "messages.json", "--outputs", "in.safetensors"];
    let chat = json(place.run(&chat));
    let ids: Vec<i64> = chat["ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
    let inputs = place.path("in.safetensors");
    assert_eq!(read_i64(&inputs, "input_ids"), (vec![1, ids.len()], ids.clone()));
    assert_eq!(read_i64(&inputs, "image_sizes"), (vec![1, 2], vec![28, 56]));
    assert_eq!(read_f32(&inputs, "pixel_values").0, [1, 3, 28, 56]);
    assert_eq!(ids.iter().filter(|&&id| id == 10).count(), 2);

    let forward =
        ["forward", "--model", "model", "--inputs", "in.safetensors", "--outputs", "out.safetensors"];
    let report = json(place.run(&[&forward[..], &["--json", "--hidden-states", "--greedy", "3"]].concat()));
    assert_eq!(report["tensors"]["logits"], serde_json::json!([1, ids.len(), 1024]));
    assert_eq!(read_i64(&place.path("out.safetensors"), "greedy").0, [1, 3]);
    assert_eq!(read_f32(&place.path("out.safetensors"), "hidden_states.3").0, [1, ids.len(), 64]);
}

#[test]
fn rows_are_continued_alike_wherever_their_padding_is() {
    let place = Place::with_model();
    let greedy = |name: &str, tensors: &[(&str, &[usize], &[i64])]| {
        place.write_i64("in.safetensors", tensors);
        let out = format!("{name}.safetensors");
        ok(place.run(&[
            "forward",
            "--model",
            "model",
            "--inputs",
            "in.safetensors",
            "--outputs",
            &out,
            "--greedy",
            "5",
        ]));
        read_i64(&place.path(&out), "greedy").1
    };
    let alone = greedy("alone", &[("input_ids", &[1, 3], &[1, 70, 80])]);
    let longer: &[i64] = &[1, 90, 91, 92, 93];
    let beside = |row: [i64; 5], mask: [i64; 5]| {
        let ids = [&row[..], longer].concat();
        let mask = [&mask[..], &[1; 5]].concat();
        greedy("both", &[("input_ids", &[2, 5], &ids), ("attention_mask", &[2, 5], &mask)])[..5].to_vec()
    };
    assert_eq!(beside([11, 11, 1, 70, 80], [0, 0, 1, 1, 1]), alone);
    assert_eq!(beside([1, 70, 80, 11, 11], [1, 1, 1, 0, 0]), alone);
}

#[test]
fn gradients_have_the_names_of_the_file() {
    let place = Place::with_model();
    let ids: &[i64] = &[1, 5, 6, 7];
    place.write_i64("in.safetensors", &[("input_ids", &[1, 4], ids), ("labels", &[1, 4], ids)]);
    ok(place.run(&[
        "forward",
        "--model",
        "model",
        "--inputs",
        "in.safetensors",
        "--outputs",
        "out.safetensors",
        "--grads",
    ]));
    let out = place.path("out.safetensors");
    let (shape, values) = read_f32(&out, "grad.language_model.model.layers.1.mlp.experts.gate_up_proj");
    assert_eq!(shape, [8, 64, 64]);
    assert!(values.iter().any(|&value| value != 0.0));
    // No image, so that nothing reaches the tower.
    let (_, tower) = read_f32(&out, "grad.vision_tower.patch_conv.weight");
    assert!(tower.iter().all(|&value| value == 0.0));
    assert!(read_f32(&out, "loss").1[0] > 0.0);
}

#[test]
fn generate_repeats_itself_and_stops() {
    let place = Place::with_model();
    let generate = |more: &[&str]| {
        ok(place.run(
            &[&["generate", "--model", "model", "--prompt", "the dog", "--max-new-tokens", "12"], more]
                .concat(),
        ))
    };
    let greedy = generate(&["--temperature", "0"]);
    assert_eq!(greedy, generate(&[]));
    let hot = generate(&["--temperature", "5", "--seed", "3"]);
    assert_eq!(hot, generate(&["--temperature", "5", "--seed", "3"]));
    assert_ne!(hot, generate(&["--temperature", "5", "--seed", "4"]));
    // Whatever the third character is, an answer that stops at it is shorter.
    let stop: String = hot.chars().skip(2).take(1).collect();
    let stopped = generate(&["--temperature", "5", "--seed", "3", "--stop", &stop]);
    assert!(
        hot.starts_with(stopped.trim_end_matches('\n')) && !stopped.trim_end_matches('\n').contains(&stop),
        "{hot:?} {stopped:?}"
    );
    assert!(!generate(&["--raw"]).is_empty());
    place.write_bmp("grey.bmp", 28, 28);
    generate(&["--image", "grey.bmp", "--system", "be brief"]);
}

#[test]
fn chat_goes_on_after_a_mistake_and_forgets_on_demand() {
    let place = Place::with_model();
    place.write_bmp("grey.bmp", 28, 28);
    let lines =
        "the fox\n/image nowhere.png\n/image grey.bmp\nthe dog\n/what\n/reset\nthe fox\n/quit\nnot read\n";
    let outcome = place.run_with_input(&["chat", "--model", "model", "--max-new-tokens", "4"], lines);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("nowhere.png"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("/what is no command"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("the image goes with the next message"), "{}", outcome.stderr);
    assert!(!outcome.stdout.is_empty());
    // After /reset the first question gets its first answer again.
    let once = place.run_with_input(&["chat", "--model", "model", "--max-new-tokens", "4"], "the fox\n");
    assert!(outcome.stdout.starts_with(&once.stdout) && outcome.stdout.ends_with(&once.stdout));
}

#[test]
fn bench_has_the_agreed_keys() {
    let place = Place::new();
    for mode in ["prefill", "decode", "train"] {
        let report = json(place.run(&[
            "bench",
            "--preset",
            "tiny",
            "--mode",
            mode,
            "--tokens",
            "16",
            "--batch",
            "2",
            "--dtype",
            "f32",
            "--new-tokens",
            "3",
            "--repetitions",
            "2",
            "--threads",
            "1",
            "--json",
        ]));
        for key in ["preset", "dtype", "device", "tokens", "batch", "peak_rss_bytes", "repetitions"] {
            assert!(report.get(key).is_some(), "{key}: {report}");
        }
        assert_eq!((report["mode"].as_str(), report["threads"].as_u64()), (Some(mode), Some(1)));
        for key in ["tokens_per_s", "model_flops_per_s", "median_s"] {
            assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
        }
        assert_eq!(report.get("weight_bytes_per_s").is_some(), mode == "decode");
    }
}

#[test]
fn a_recipe_runs_with_overrides() {
    let place = Place::with_model();
    let row = |ids: &[i64]| format!("{{\"input_ids\": {ids:?}, \"labels\": {ids:?}}}\n");
    place.write("rows.jsonl", [row(&[1, 5, 6, 7]), row(&[1, 8, 9])].concat().repeat(4));
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recipe.yaml");
    assert!(ok(place.run(&["train", recipe, "--dry-run"])).contains("honoured"));
    let out = ok(place.run(&[
        "train",
        recipe,
        "--step_scheduler.max_steps",
        "3",
        "--dataset.path_or_dataset=rows.jsonl",
        "--model.pretrained_model_name_or_path",
        "model",
    ]));
    assert!(out.contains("checkpoint: "), "{out}");
    let log = fs::read_to_string(place.path("checkpoints/training.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 3, "{log}");
    ok(place.run(&["inspect", "checkpoints/LATEST/model/consolidated"]));
}

#[test]
fn nemo_recipes_are_planned_as_they_are_and_say_what_they_need() {
    let place = Place::new();
    for (name, ranks, needs) in [
        (
            "mistral4_lora",
            "ranks: 16,",
            "not on this machine:\n  model.config.pretrained_model_name_or_path: ",
        ),
        ("mistral4_medpix", "ranks: 32,", "then `--validation_dataset.path_or_dataset DIR`"),
    ] {
        let recipe =
            format!("{}/../mistral4-train/tests/recipes/nemo/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        let plan = ok(place.run(&["train", &recipe, "--dry-run"]));
        for part in ["honoured:", "mesh: ", "memory of a rank", ranks, needs] {
            assert!(plan.contains(part), "{part} is not in\n{plan}");
        }
        let run = place.run(&["train", &recipe]);
        assert_eq!(run.code, 2, "{}", run.stderr);
        let three = place.run(&["train", &recipe, "--dry-run", "--nproc", "3"]);
        assert_eq!(three.code, 2, "{}", three.stderr);
    }
    let run = place.run(&[
        "train",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../mistral4-train/tests/recipes/nemo/mistral4_medpix.yaml"),
    ]);
    assert!(run.stderr.contains("hf download --repo-type dataset mmoukouba/MedPix-VQA"), "{}", run.stderr);
}
