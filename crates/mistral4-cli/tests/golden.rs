//! `forward` against what transformers (and peft, for adapters) computed, for every fixture under `tests/golden/model`
//! and `tests/golden/adapter`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;
use mistral4_cli::{Arguments, Command, NamedArray, Values, commands};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// A gradient that is zero in theory (the router's with one expert a token) is rounding noise, 4e-9 in the reference;
/// below this norm only its size counts.
const SMALLEST_NORM: f64 = 1e-4;

#[derive(Deserialize)]
struct Case {
    format_version: u32,
    flags: Vec<String>,
    dtype: String,
    /// How far transformers' own low-precision result is from its f32 one.
    deviation_from_f32: BTreeMap<String, f64>,
}

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let entries = ["model", "adapter"].map(|kind| std::fs::read_dir(root.join(kind)).unwrap());
    let mut folders: Vec<PathBuf> =
        entries.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.join("case.json").is_file());
    folders.sort();
    folders
}

struct Expected {
    shape: Vec<usize>,
    values: Vec<f64>,
}

fn read_expected(path: &Path) -> BTreeMap<String, Expected> {
    let bytes = std::fs::read(path).unwrap();
    let read = |(key, view): (String, safetensors::tensor::TensorView)| {
        let data = view.data();
        let values: Vec<f64> = match view.dtype() {
            Dtype::F32 => data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
            Dtype::BF16 => {
                data.chunks(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).into()).collect()
            }
            Dtype::I64 => data.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
            Dtype::BOOL | Dtype::U8 => data.iter().map(|&b| f64::from(b)).collect(),
            other => panic!("{key} is stored as {other:?}"),
        };
        (key, Expected { shape: view.shape().to_vec(), values })
    };
    SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(read).collect()
}

fn values(array: &NamedArray) -> Vec<f64> {
    match &array.values {
        Values::F32(values) => values.iter().map(|&value| f64::from(value)).collect(),
        Values::I64(values) => values.iter().map(|&value| value as f64).collect(),
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// `norm(ours - expected) / norm(expected)` over the rows that `mask` keeps.
fn relative_error(ours: &[f64], expected: &[f64], mask: Option<&[f64]>) -> f64 {
    let kept = |i: usize| match mask {
        Some(mask) => mask[i * mask.len() / expected.len()] != 0.0,
        None => true,
    };
    let kept: Vec<usize> = (0..expected.len()).filter(|&i| kept(i)).collect();
    let difference = norm(kept.iter().map(|&i| ours[i] - expected[i]));
    difference / norm(kept.iter().map(|&i| expected[i])).max(SMALLEST_NORM)
}

/// What is wrong with one fixture.
fn problems(fixture: &Path) -> Vec<String> {
    let case: Case =
        serde_json::from_str(&std::fs::read_to_string(fixture.join("case.json")).unwrap()).unwrap();
    assert_eq!(case.format_version, 1);
    let path = |name: &str| fixture.join(name).into_os_string();
    let start: [OsString; 8] = [
        "mistral4".into(),
        "forward".into(),
        "--model".into(),
        path("model"),
        "--inputs".into(),
        path("inputs.safetensors"),
        "--outputs".into(),
        "not-written".into(),
    ];
    let adapter: Vec<OsString> = match fixture.join("adapter").is_dir() {
        true => vec!["--adapter".into(), path("adapter")],
        false => Vec::new(),
    };
    let arguments = start.into_iter().chain(adapter).chain(case.flags.iter().map(OsString::from));
    let arguments = Arguments::try_parse_from(arguments).unwrap();
    let Command::Forward(arguments) = arguments.command else { panic!("the command is forward") };
    let (arrays, _) = match commands::forward::compute(&arguments) {
        Ok(computed) => computed,
        Err(error) => return vec![error.to_string()],
    };
    let mut expected = read_expected(&fixture.join("expected.safetensors"));
    let mask = expected.remove("compare_mask");
    let mut problems = Vec::new();
    for array in &arrays {
        let Some(expected) = expected.remove(&array.name) else {
            problems.push(format!("{} is not expected", array.name));
            continue;
        };
        if array.shape != expected.shape {
            problems
                .push(format!("{} has shape {:?}, expected {:?}", array.name, array.shape, expected.shape));
            continue;
        }
        let ours = values(array);
        if array.name == "greedy" {
            if ours != expected.values {
                problems.push(format!("greedy is {ours:?}, expected {:?}", expected.values));
            }
            continue;
        }
        let is_masked = array.name == "logits" || array.name.starts_with("hidden_states.");
        let mask = mask.as_ref().filter(|_| is_masked).map(|mask| mask.values.as_slice());
        let error = relative_error(&ours, &expected.values, mask);
        let tolerance: f64 = if case.dtype == "f32" { 1e-4 } else { 2e-2 };
        let own = case.deviation_from_f32.get(&array.name).copied().unwrap_or(0.0);
        if error.is_nan() || error > tolerance.max(2.0 * own) {
            problems.push(format!("{} is off by {error:.2e}", array.name));
        }
    }
    problems.extend(expected.keys().map(|key| format!("{key} is missing")));
    problems
}

#[test]
fn every_fixture_agrees_with_transformers() {
    let fixtures = fixtures();
    assert!(fixtures.len() >= 40, "only {} fixtures", fixtures.len());
    let mut report = String::new();
    for fixture in &fixtures {
        let name = fixture.file_name().unwrap().to_string_lossy();
        for problem in problems(fixture) {
            report.push_str(&format!("{name}: {problem}\n"));
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn the_comparison_sees_differences() {
    assert!(relative_error(&[1.0, 2.1], &[1.0, 2.0], None) > 1e-2);
    assert!(relative_error(&[1.0, 9.0], &[1.0, 2.0], Some(&[1.0, 0.0])) < 1e-12);
    assert!(relative_error(&[f64::NAN], &[1.0], None).is_nan());
}
