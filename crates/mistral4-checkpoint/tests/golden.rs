//! Checkpoints that transformers 5.24 wrote.

use std::path::{Path, PathBuf};

use mistral4_checkpoint::config::{ConfigFile, ConfigOptions, SoftmaxScale, SoftmaxScalePolicy};
use mistral4_checkpoint::weights::Checkpoint;
use serde_json::Value;

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(folder)
}

#[test]
fn every_model_fixture_opens_and_fits() {
    let mut count = 0;
    for case in std::fs::read_dir(golden("model")).unwrap().flatten() {
        let folder = case.path().join("model");
        let checkpoint = Checkpoint::open(&folder, &ConfigOptions::default());
        let checkpoint = checkpoint.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        checkpoint.check(&checkpoint.tensors()).unwrap();
        assert_eq!(checkpoint.config_file().warnings, Vec::<String>::new(), "{}", folder.display());
        count += 1;
    }
    assert!(count > 0);
}

fn parse(raw: &Value) -> ConfigFile {
    ConfigFile::from_value(raw.clone(), Path::new("config.json"), &ConfigOptions::default())
        .unwrap_or_else(|error| panic!("{raw}: {error}"))
}

/// Compares the keys that we write with what transformers made of the same file.
fn compare(ours: &Value, theirs: &Value, skip: &[&str], place: &str) {
    for (key, value) in ours.as_object().unwrap() {
        let place = format!("{place}.{key}");
        if skip.contains(&key.as_str()) {
            continue;
        }
        match (value, &theirs[key]) {
            (Value::Object(_), inner) => compare(value, inner, skip, &place),
            (Value::Number(a), Value::Number(b)) => assert_eq!(a.as_f64(), b.as_f64(), "{place}"),
            // Null switches are false.
            (Value::Bool(false), Value::Null) => {}
            (ours, theirs) => assert_eq!(ours, theirs, "{place}"),
        }
    }
}

#[test]
fn configurations_resolve_as_in_transformers() {
    let facts = std::fs::read_to_string(golden("checkpoint/configurations.json")).unwrap();
    let facts: Value = serde_json::from_str(&facts).unwrap();
    assert_eq!(facts["format_version"], 1);
    for case in facts["text"].as_array().unwrap() {
        let raw = &case["raw"];
        let file = parse(raw);
        let yarn = file.config.text.rope.yarn.as_ref().unwrap();
        assert!((yarn.attention_factor - case["attention_factor"].as_f64().unwrap()).abs() < 1e-12, "{raw}");
        let scale = SoftmaxScale::new(SoftmaxScalePolicy::YarnMscale, &file.config.text, "");
        assert!((scale.value - case["softmax_scale_yarn_mscale"].as_f64().unwrap()).abs() < 1e-12, "{raw}");
        // We write every resolved value, where transformers keeps the source's null, zero or absence.
        let skip =
            ["architectures", "attention_factor", "beta_fast", "beta_slow", "factor", "truncate", "type"];
        compare(&file.config.to_hf_json(), &case["resolved"], &skip, &raw.to_string());
    }
    for case in facts["wrappers"].as_array().unwrap() {
        let file = parse(&case["raw"]);
        compare(
            &file.config.to_hf_json(),
            &case["resolved"],
            &["architectures", "attention_factor", "truncate", "type"],
            "",
        );
    }
    assert!(facts["text"].as_array().unwrap().len() > 20);
}
