//! Wrong usage and bad input: exit code 2, one chain, one hint, and nothing written.

use std::fs;

use crate::support::Place;

/// Runs and describes the failure; everything but the exit code and standard error must be empty.
fn failure(place: &Place, arguments: &[&str]) -> String {
    let outcome = place.run(arguments);
    assert_eq!(outcome.stdout, "", "{arguments:?}");
    let lines = outcome.stderr.lines().filter(|line| line.starts_with("hint: ")).count();
    assert_eq!(lines, 1, "{arguments:?}: {}", outcome.stderr);
    format!("$ mistral4 {}\n{}exit {}\n\n", arguments.join(" "), outcome.stderr, outcome.code)
}

fn failures(place: &Place, commands: &[&[&str]]) -> String {
    commands.iter().map(|arguments| failure(place, arguments)).collect()
}

#[test]
fn wrong_flags() {
    let place = Place::new();
    insta::assert_snapshot!(failures(
        &place,
        &[
            &["frobnicate"],
            &["generate", "--model", "m", "--prompt", "x", "--temprature", "1"],
            &["generate", "--model", "m"],
            &["generate", "--model", "m", "--prompt", "x", "--top-k", "many"],
            &["generate", "--model", "m", "--prompt", "x", "--raw", "--image", "a.png"],
            &["bench", "--device", "tpu"],
            &["bench", "--preset", "giant"],
            &["bench", "--threads", "0"],
            &["forward", "--model", "m", "--inputs", "i", "--outputs", "o", "--softmax-scale", "other"],
            &["convert", "--model", "m", "--out", "o", "--max-shard-size", "huge"],
            &["inspect"],
        ],
    ));
}

#[cfg(not(any(feature = "cuda", feature = "rocm")))]
#[test]
fn devices_that_are_not_compiled_in() {
    let place = Place::new();
    insta::assert_snapshot!(failures(
        &place,
        &[
            &["bench", "--preset", "tiny", "--device", "cuda:1"],
            &["bench", "--preset", "tiny", "--device", "rocm"]
        ],
    ));
}

#[test]
fn models_that_are_not_there_or_not_models() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    for (folder, config) in [
        ("not_json", "{\"model_type\": "),
        ("other", "{\"model_type\": \"llama\", \"hidden_size\": 8}"),
        ("list", "[]"),
    ] {
        fs::create_dir(place.path(folder)).unwrap();
        place.write(&format!("{folder}/config.json"), config);
    }
    insta::assert_snapshot!(failures(
        &place,
        &[
            &["inspect", "nowhere"],
            &["inspect", "empty"],
            &["inspect", "not_json/config.json"],
            &["inspect", "other"],
            &["inspect", "list"],
            &["generate", "--model", "./nowhere", "--prompt", "x"],
            &["tokenize", "--model", "some/model", "--prompt", "x"],
            &["init", "--config", "missing.json", "--out", "out"],
        ],
    ));
    assert!(!place.path("out").exists());
}

#[test]
fn values_of_a_configuration() {
    let place = Place::with_model();
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    let variant = |name: &str, key: &str, value: serde_json::Value| {
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["text_config"][key] = value;
        place.write(name, config.to_string());
    };
    variant("tied.json", "tie_word_embeddings", true.into());
    variant("negative.json", "num_hidden_layers", (-3).into());
    variant("top_k.json", "num_experts_per_tok", 99.into());
    variant("act.json", "hidden_act", "swoosh".into());
    insta::assert_snapshot!(failures(
        &place,
        &[
            &["inspect", "tied.json"],
            &["inspect", "negative.json"],
            &["inspect", "top_k.json"],
            &["inspect", "act.json"]
        ],
    ));
}

#[test]
fn damaged_weights() {
    let place = Place::with_model();
    let model = place.path("model/model.safetensors");
    let whole = fs::read(&model).unwrap();
    let generate = ["generate", "--model", "model", "--prompt", "x"];
    fs::write(&model, &whole[..whole.len() - 1000]).unwrap();
    let mut report = failure(&place, &generate);
    fs::write(&model, &whole[..100]).unwrap();
    report.push_str(&failure(&place, &generate));
    fs::write(&model, b"not a safetensors file").unwrap();
    report.push_str(&failure(&place, &generate));

    // The same bytes under another key: one parameter is missing, one tensor is unknown.
    let key = b"language_model.model.norm.weight";
    let mut renamed = whole.clone();
    let at = whole.windows(key.len()).position(|window| window == key).unwrap();
    renamed[at..at + 4].copy_from_slice(b"LANG");
    fs::write(&model, renamed).unwrap();
    report.push_str(&failure(&place, &generate));
    report.push_str(&failure(&place, &["convert", "--model", "model", "--out", "converted"]));
    assert!(!place.path("converted/config.json").exists());
    insta::assert_snapshot!(report);
}

#[test]
fn a_folder_without_a_tokenizer() {
    let place = Place::with_model();
    fs::remove_file(place.path("model/tekken.json")).unwrap();
    insta::assert_snapshot!(failure(&place, &["chat", "--model", "model"]));
}

#[test]
fn inputs_of_forward() {
    let place = Place::with_model();
    let ids: &[i64] = &[1, 5, 6, 7];
    place.write_i64("good.safetensors", &[("input_ids", &[1, 4], ids)]);
    place.write_i64("unknown.safetensors", &[("input_ids", &[1, 4], ids), ("token_types", &[1, 4], ids)]);
    place.write_i64("absent.safetensors", &[("labels", &[1, 4], ids)]);
    place.write_i64("range.safetensors", &[("input_ids", &[2, 2], &[1, 5, 6, 4096])]);
    place.write_i64("rank.safetensors", &[("input_ids", &[1, 2, 2], ids)]);
    place.write_i64("packed.safetensors", &[("input_ids", &[4], ids)]);
    place.write_i64("offsets.safetensors", &[("input_ids", &[4], ids), ("cu_seqlens", &[3], &[0, 3, 5])]);
    place.write_i64(
        "mask.safetensors",
        &[("input_ids", &[1, 4], ids), ("attention_mask", &[1, 3], &[1, 1, 1])],
    );
    place.write_i64("label.safetensors", &[("input_ids", &[1, 4], ids), ("labels", &[1, 4], &[1, -7, 3, 4])]);
    place.write_i64("pixels.safetensors", &[("input_ids", &[1, 4], ids), ("pixel_values", &[1, 4], ids)]);
    place.write_i64("sizes.safetensors", &[("input_ids", &[1, 4], ids), ("image_sizes", &[1, 2], &[28, 28])]);
    place.write("cut.safetensors", [8, 0, 0, 0]);
    let mut report = String::new();
    for name in [
        "unknown", "absent", "range", "rank", "packed", "offsets", "mask", "label", "pixels", "sizes", "cut",
        "nowhere",
    ] {
        let file = format!("{name}.safetensors");
        report.push_str(&failure(
            &place,
            &["forward", "--model", "model", "--inputs", &file, "--outputs", "out.safetensors"],
        ));
        assert!(!place.path("out.safetensors").exists(), "{name}");
    }
    let good = ["forward", "--model", "model", "--inputs", "good.safetensors", "--outputs"];
    report.push_str(&failure(&place, &[&good[..], &["out.safetensors", "--grads"]].concat()));
    report.push_str(&failure(&place, &[&good[..], &["no/such/folder/out.safetensors"]].concat()));
    insta::assert_snapshot!(report);
}

#[test]
fn image_tokens_and_images_that_differ_in_number() {
    let place = Place::with_model();
    place.write_bmp("grey.bmp", 56, 28);
    place.write(
        "messages.json",
        r#"[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "fox"}]}]"#,
    );
    let outcome = place.run(&[
        "tokenize",
        "--model",
        "model",
        "--messages",
        "messages.json",
        "--image",
        "grey.bmp",
        "--outputs",
        "in.safetensors",
    ]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    // The image tokens are replaced by text.
    let mut bytes = fs::read(place.path("in.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let offsets = &names["input_ids"]["data_offsets"];
    let range = offsets[0].as_u64().unwrap() as usize..offsets[1].as_u64().unwrap() as usize;
    for id in bytes[8 + header..][range].chunks_exact_mut(8) {
        if id[0] == 10 && id[1..].iter().all(|&byte| byte == 0) {
            id[0] = 60;
        }
    }
    fs::write(place.path("in.safetensors"), bytes).unwrap();
    insta::assert_snapshot!(failure(
        &place,
        &["forward", "--model", "model", "--inputs", "in.safetensors", "--outputs", "out.safetensors"],
    ));
}

#[test]
fn conversations_and_images() {
    let place = Place::with_model();
    place.write("broken.png", b"\x89PNG\r\n\x1a\nand then nothing");
    place.write("roles.json", r#"[{"role": "assistant", "content": "I begin"}]"#);
    place.write("unknown.json", r#"[{"role": "wizard", "content": "x"}]"#);
    place.write(
        "image.json",
        r#"[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]"#,
    );
    place.write("not.json", "[{");
    place.write("latin1.txt", [0xe9]);
    insta::assert_snapshot!(failures(
        &place,
        &[
            &["generate", "--model", "model", "--prompt", "x", "--image", "broken.png"],
            &["generate", "--model", "model", "--prompt", "x", "--image", "nowhere.png"],
            &["generate", "--model", "model", "--prompt", "x", "--temperature", "-1"],
            &["generate", "--model", "model", "--prompt", "x", "--reasoning-effort", "medium"],
            &["tokenize", "--model", "model", "--messages", "roles.json"],
            &["tokenize", "--model", "model", "--messages", "unknown.json"],
            &["tokenize", "--model", "model", "--messages", "image.json"],
            &["tokenize", "--model", "model", "--messages", "not.json"],
            &["tokenize", "--model", "model", "--messages", "nowhere.json"],
            &["tokenize", "--model", "model", "--prompt-file", "latin1.txt"],
        ],
    ));
}

#[test]
fn recipes() {
    let place = Place::new();
    place.write("recipe.yaml", include_str!("../recipe.yaml"));
    place.write("broken.yaml", "recipe: [\n");
    insta::assert_snapshot!(failures(
        &place,
        &[
            &["train", "nowhere.yaml"],
            &["train", "broken.yaml"],
            &["train", "recipe.yaml", "stray"],
            &["train", "recipe.yaml", "--recipe", "MakeCoffee"],
            &["train", "recipe.yaml", "--step_schedular.max_steps", "1"],
            &["train", "recipe.yaml", "--step_scheduler.max_steps=many"],
            &[
                "train",
                "recipe.yaml",
                "--step_scheduler.global_batch_size=4",
                "--step_scheduler.local_batch_size=3"
            ],
            &["train", "recipe.yaml", "--model.pretrained_model_name_or_path", "./nowhere"],
        ],
    ));
}

#[test]
fn a_failed_write_is_a_failed_run() {
    let place = Place::new();
    place.write("file", "");
    let outcome = place.run(&["init", "--preset", "tiny", "--out", "file/below"]);
    assert_eq!(outcome.code, 1, "{}", outcome.stderr);
}
