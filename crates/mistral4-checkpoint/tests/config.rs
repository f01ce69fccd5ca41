//! Configurations as a user meets them: presets, files, round trips.

use std::path::Path;

use mistral4_checkpoint::config::{
    ConfigFile, ConfigOptions, SoftmaxScalePolicy, preset_names, supports_config,
};
use mistral4_checkpoint::weights::names;
use serde_json::json;

fn preset(name: &str) -> ConfigFile {
    ConfigFile::preset(name, &ConfigOptions::default()).unwrap()
}

#[test]
fn presets_parse_without_remarks() {
    for name in preset_names() {
        assert_eq!(preset(name).warnings, Vec::<String>::new(), "{name}");
    }
}

#[test]
fn the_119b_preset_has_the_published_sizes() {
    let config = preset("mistral-small-4-119b").config;
    let total: usize = names::tensors(&config).iter().map(|spec| spec.elements()).sum();
    assert_eq!((total as f64 / 1e9).round(), 119.0, "{total} parameters");
    assert!((config.softmax_scale.value - 0.0883883).abs() < 1e-7);
    let mscale = ConfigOptions { softmax_scale: Some(SoftmaxScalePolicy::YarnMscale) };
    let config = ConfigFile::preset("mistral-small-4-119b", &mscale).unwrap().config;
    assert!((config.softmax_scale.value - 0.1949695).abs() < 1e-7);
}

#[test]
fn an_empty_text_config_has_the_defaults_of_transformers() {
    let raw = json!({"model_type": "mistral4"});
    let file = ConfigFile::from_value(raw, Path::new("c.json"), &ConfigOptions::default()).unwrap();
    assert_eq!(file.config.text, preset("mistral-small-4-119b").config.text);
}

#[test]
fn written_configurations_read_back_the_same() {
    for name in preset_names() {
        let file = preset(name);
        for written in [file.to_hf_json(), file.config.to_hf_json()] {
            let again =
                ConfigFile::from_value(written, Path::new("c.json"), &ConfigOptions::default()).unwrap();
            assert_eq!(again.config, file.config, "{name}");
        }
    }
}

#[test]
fn only_a_wrapper_around_mistral4_is_supported() {
    assert!(supports_config(&preset("tiny").raw));
    assert!(!supports_config(&json!({"text_config": {"model_type": "mistral"}})));
    assert!(!supports_config(&json!({"model_type": "mistral4"})));
}
