//! Quantised weights: converted, and quantised while they are loaded.

use crate::support::{Outcome, Place, read_f32, read_i64};

fn ok(outcome: Outcome) -> String {
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    outcome.stdout
}

/// Logits of a fixed input.
fn logits(place: &Place, model: &str, more: &[&str]) -> Vec<f32> {
    let mut arguments =
        vec!["forward", "--model", model, "--inputs", "in.safetensors", "--outputs", "out.safetensors"];
    arguments.extend(more);
    ok(place.run(&arguments));
    read_f32(&place.path("out.safetensors"), "logits").1
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>();
    let error = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (error / square(&mut b.iter().copied())).sqrt()
}

fn with_inputs() -> Place {
    let place = Place::with_model();
    let ids: Vec<i64> = (0..24).map(|i| 20 + i * 7 % 300).collect();
    place.write_i64("in.safetensors", &[("input_ids", &[2, 12], &ids)]);
    place
}

#[test]
fn weights_are_quantised_while_they_are_loaded() {
    let place = with_inputs();
    let dense = logits(&place, "model", &[]);
    let quantised = |more: &[&str]| {
        let mut arguments = vec!["--quantize"];
        arguments.extend(more);
        distance(&logits(&place, "model", &arguments), &dense)
    };
    let int8 = quantised(&["int8", "--quantize-lm-head", "none"]);
    let (int4, fp8) = (quantised(&["int4", "--quantize-lm-head", "none"]), quantised(&["fp8"]));
    assert!(0.0 < int8 && int8 < fp8 && fp8 < int4 && int4 < 0.1, "{int8} {fp8} {int4}");
    let with_head = quantised(&["int4", "--quantize-lm-head", "int4"]);
    assert!(int4 < with_head && with_head < 0.2, "{with_head}");
    let zero_points = quantised(&["int4", "--asymmetric", "--group-size", "64"]);
    assert!(zero_points > 0.0 && zero_points < 0.3, "{zero_points}");

    ok(place.run(&[
        "forward",
        "--model",
        "model",
        "--inputs",
        "in.safetensors",
        "--outputs",
        "out.safetensors",
        "--quantize",
        "int4",
        "--greedy",
        "5",
    ]));
    assert_eq!(read_i64(&place.path("out.safetensors"), "greedy").0, [2, 5]);
    let answer = ["generate", "--model", "model", "--prompt", "the fox", "--raw", "--max-new-tokens", "4"];
    for format in ["int8", "int4", "fp8"] {
        ok(place.run(&[&answer[..], &["--quantize", format]].concat()));
    }
}

#[test]
fn converted_weights_are_used_as_they_are_stored() {
    let place = with_inputs();
    for (format, more) in [("int4", &["--asymmetric"][..]), ("int8", &["--quantize-lm-head", "int8"])] {
        let convert = ["convert", "--model", "model", "--out", format, "--dtype", format];
        ok(place.run(&[&convert[..], more].concat()));
        let report: serde_json::Value =
            serde_json::from_str(&ok(place.run(&["inspect", format, "--json"]))).unwrap();
        assert!(report["dtypes"]["I32"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(report["warnings"], serde_json::json!([]));
        assert!(ok(place.run(&["inspect", format])).contains(&format!("{format}, groups of 32")));

        // Quantised in memory, and made dense again: the same up to rounding.
        ok(place.run(&["convert", "--model", format, "--out", "dense", "--dtype", "f32"]));
        let (stored, dense) = (logits(&place, format, &[]), logits(&place, "dense", &[]));
        assert!(distance(&stored, &dense) < 2e-3, "{}", distance(&stored, &dense));
        assert!(distance(&stored, &logits(&place, "model", &[])) > 1e-4);
    }
}

#[test]
fn impossible_choices_exit_2() {
    let place = with_inputs();
    place.write_i64(
        "labels.safetensors",
        &[("input_ids", &[1, 3], &[20, 21, 22]), ("labels", &[1, 3], &[20, 21, 22])],
    );
    let forward = ["forward", "--model", "model", "--inputs", "labels.safetensors", "--outputs", "o"];
    let convert = ["convert", "--model", "model", "--out", "o"];
    for (arguments, message) in [
        ([&forward[..], &["--quantize", "int3"]].concat(), "int3"),
        ([&forward[..], &["--quantize", "int4", "--group-size", "48"]].concat(), "--group-size 48"),
        ([&forward[..], &["--quantize", "fp8", "--asymmetric"]].concat(), "--asymmetric"),
        ([&forward[..], &["--group-size", "32"]].concat(), "--group-size"),
        ([&forward[..], &["--quantize", "int8", "--grads"]].concat(), "--grads"),
        ([&convert[..], &["--dtype", "fp8", "--group-size", "32"]].concat(), "--group-size"),
        ([&convert[..], &["--dtype", "int4", "--group-size", "256"]].concat(), "group size"),
        ([&convert[..], &["--dtype", "int4", "--format", "native"]].concat(), "native"),
        (vec!["bench", "--preset", "tiny", "--mode", "train", "--dtype", "int4"], "--mode train"),
    ] {
        let outcome = place.run(&arguments);
        assert_eq!(outcome.code, 2, "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("hint:"), "{}", outcome.stderr);
        assert!(!place.path("o/config.json").exists());
    }
}

#[test]
fn bench_takes_quantised_weights() {
    let place = Place::new();
    for (mode, dtype) in [("decode", "int4"), ("prefill", "int8"), ("decode", "fp8")] {
        let report = ok(place.run(&[
            "bench",
            "--preset",
            "tiny",
            "--mode",
            mode,
            "--dtype",
            dtype,
            "--tokens",
            "8",
            "--new-tokens",
            "2",
            "--repetitions",
            "1",
            "--json",
        ]));
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["dtype"], dtype);
        assert!(report["tokens_per_s"].as_f64().unwrap() > 0.0);
    }
}
