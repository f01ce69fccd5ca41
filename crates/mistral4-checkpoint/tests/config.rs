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

#[test]
fn every_key_that_transformers_writes_is_known() {
    // The presets `small` and `medium` are what transformers 5.24 writes for Mistral4Config, with every inert key.
    let mut raw = preset("small").raw;
    raw["a_new_key"] = json!(1);
    raw["rope_parameters"]["another"] = json!(2);
    let file = ConfigFile::from_value(raw.clone(), Path::new("c.json"), &ConfigOptions::default()).unwrap();
    assert_eq!(
        file.warnings,
        [
            "c.json: unknown key `rope_parameters.another` is ignored",
            "c.json: unknown key `a_new_key` is ignored"
        ]
    );
    let written = file.to_hf_json();
    assert_eq!((&written["a_new_key"], &written["rope_parameters"]["another"]), (&json!(1), &json!(2)));
    let order = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(order(&written)[..order(&raw).len()], order(&raw)[..], "the order of the source is kept");
}

#[test]
fn the_softmax_scale_follows_option_then_file_then_default() {
    let parse = |apply: Option<bool>, option| {
        let mut raw = preset("small").raw;
        if let Some(apply) = apply {
            raw["rope_parameters"]["apply_yarn_scaling"] = json!(apply);
        }
        let options = ConfigOptions { softmax_scale: option };
        let file = ConfigFile::from_value(raw, Path::new("c.json"), &options).unwrap();
        let again = ConfigFile::from_value(file.to_hf_json(), Path::new("c.json"), &ConfigOptions::default())
            .unwrap();
        assert_eq!(again.config.softmax_scale.value, file.config.softmax_scale.value, "kept when written");
        file.config.softmax_scale
    };
    use SoftmaxScalePolicy::{Standard, YarnMscale};
    let plain = 64f64.powf(-0.5);
    let scaled = plain * (0.1 * 8f64.ln() + 1.0).powi(2);
    for (apply, option, policy) in [
        (None, None, Standard),
        (Some(true), None, YarnMscale),
        (Some(false), None, Standard),
        (Some(true), Some(Standard), Standard),
        (Some(false), Some(YarnMscale), YarnMscale),
        (None, Some(YarnMscale), YarnMscale),
    ] {
        let scale = parse(apply, option);
        assert_eq!(scale.policy, policy, "{apply:?} {option:?}");
        let expected = if policy == YarnMscale { scaled } else { plain };
        assert!((scale.value - expected).abs() < 1e-12);
    }
}

#[test]
fn the_native_apply_scale_decides_and_turns_the_rotary_factor_off() {
    for (apply, policy) in
        [(json!(true), SoftmaxScalePolicy::YarnMscale), (json!(false), SoftmaxScalePolicy::Standard)]
    {
        let mut raw = preset("mistral-small-4-119b").config.to_params_json().unwrap();
        raw["yarn"]["apply_scale"] = apply;
        let file = ConfigFile::from_value(raw, Path::new("params.json"), &ConfigOptions::default()).unwrap();
        assert_eq!(file.config.softmax_scale.policy, policy);
        assert_eq!(file.config.text.rope.yarn.as_ref().unwrap().attention_factor, 1.0);
        let written = file.to_hf_json();
        let again =
            ConfigFile::from_value(written.clone(), Path::new("c.json"), &ConfigOptions::default()).unwrap();
        assert_eq!(again.config.softmax_scale.policy, policy);
        let factor = written.pointer("/text_config/rope_parameters/mscale_all_dim");
        assert_eq!(
            factor.is_some(),
            policy == SoftmaxScalePolicy::YarnMscale,
            "transformers multiplies by it"
        );
    }
}

mod generated {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// Values that a wrong tool might write.
    fn odd_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (0u64..200).prop_map(Value::from),
            "[a-z]{0,8}".prop_map(Value::from),
            Just(json!([])),
            Just(json!([1, -1, null])),
            Just(json!({})),
            Just(json!({"rope_type": "default", "factor": 2})),
        ]
    }

    fn paths(value: &Value, prefix: &str, found: &mut Vec<String>) {
        for (key, inner) in value.as_object().into_iter().flatten() {
            let path = format!("{prefix}/{key}");
            paths(inner, &path, found);
            found.push(path);
        }
    }

    fn sources() -> Vec<Value> {
        let mut sources: Vec<Value> = preset_names().map(|name| preset(name).raw).collect();
        sources.push(preset("tiny").config.to_params_json().unwrap());
        sources
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn changed_configurations_are_refused_or_survive_a_round_trip(
            source in 0usize..5, choices in proptest::collection::vec((any::<prop::sample::Index>(), odd_value()), 1..4),
        ) {
            let mut raw = sources().swap_remove(source);
            let mut keys = Vec::new();
            paths(&raw, "", &mut keys);
            for (index, value) in choices {
                if let Some(slot) = raw.pointer_mut(index.get(keys.as_slice()).as_str()) {
                    *slot = value;
                }
            }
            if let Ok(file) = ConfigFile::from_value(raw, Path::new("c.json"), &ConfigOptions::default()) {
                let total: u128 = names::tensors(&file.config)
                    .iter()
                    .map(|spec| spec.shape.iter().map(|&size| size as u128).product::<u128>())
                    .sum();
                prop_assert!(total <= 1 << 44);
                let again = ConfigFile::from_value(file.to_hf_json(), Path::new("c.json"), &ConfigOptions::default());
                let again = again.unwrap();
                prop_assert_eq!(&again.config.vision, &file.config.vision);
                prop_assert_eq!(again.config.softmax_scale.value, file.config.softmax_scale.value);
                let mut text = again.config.text.clone();
                if let (Some(new), Some(old)) = (&mut text.rope.yarn, &file.config.text.rope.yarn) {
                    // Left out on purpose where they are not to be applied.
                    (new.mscale, new.mscale_all_dim) = (old.mscale, old.mscale_all_dim);
                }
                prop_assert_eq!(&text, &file.config.text);
            }
        }

        #[test]
        fn random_text_is_never_more_than_an_error(text in "\\PC{0,60}") {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("config.json");
            std::fs::write(&file, text).unwrap();
            prop_assert!(ConfigFile::read(&file, &ConfigOptions::default()).is_err());
        }
    }
}
