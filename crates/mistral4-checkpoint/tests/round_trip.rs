//! Checkpoints written and read back, in every form and format.

use std::path::Path;

use mistral4_checkpoint::config::{ConfigFile, ConfigForm, ConfigOptions};
use mistral4_checkpoint::weights::names::{self, TensorKind, TensorSpec};
use mistral4_checkpoint::weights::{
    Bits, Checkpoint, DType, HostTensor, SaveDType, SaveOptions, SaveReport, StoredDType, WeightFormat,
    WeightQuantization, convert, fp8, quantize, save, stack_dims,
};
use mistral4_checkpoint::{Error, initial_tensor};

const F32: SaveDType = SaveDType::Float(DType::F32);
const BF16: SaveDType = SaveDType::Float(DType::BF16);

fn tiny() -> ConfigFile {
    ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap()
}

fn write(folder: &Path, config: &ConfigFile, options: &SaveOptions<'_>) -> SaveReport {
    save(folder, config, options, |spec| -> Result<_, Error> {
        Ok(HostTensor::f32(spec.shape.clone(), initial_tensor(spec, &config.config, 5)))
    })
    .unwrap()
}

fn open(folder: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(folder, &ConfigOptions::default()).unwrap();
    checkpoint.check(&checkpoint.tensors()).unwrap();
    checkpoint
}

fn values(checkpoint: &Checkpoint, spec: &TensorSpec) -> Vec<f32> {
    let host = checkpoint.read(&spec.key, DType::F32).unwrap();
    assert_eq!(host.shape, spec.shape, "{}", spec.key);
    host.into_f32()
}

#[test]
fn f32_is_bit_equal_in_one_file_and_in_many() {
    let config = tiny();
    for (max_shard_size, files) in [(u64::MAX, 1), (100_000, 10)] {
        let folder = tempfile::tempdir().unwrap();
        let report = write(
            folder.path(),
            &config,
            &SaveOptions { dtype: F32, max_shard_size, ..SaveOptions::default() },
        );
        assert!(report.files.len() >= files, "{:?}", report.files);
        let checkpoint = open(folder.path());
        assert_eq!(checkpoint.config(), &config.config);
        for spec in checkpoint.tensors() {
            assert_eq!(values(&checkpoint, &spec), initial_tensor(&spec, &config.config, 5), "{}", spec.key);
        }
    }
}

#[test]
fn the_reference_reader_reads_what_we_write() {
    let folder = tempfile::tempdir().unwrap();
    let config = tiny();
    let report =
        write(folder.path(), &config, &SaveOptions { dtype: SaveDType::Fp8, ..SaveOptions::default() });
    let bytes = std::fs::read(&report.files[0]).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let scale = tensors.tensor("language_model.model.layers.1.mlp.experts.gate_up_proj_scale_inv").unwrap();
    assert_eq!(scale.shape(), [8, 1, 1]);
    let checkpoint = open(folder.path());
    for (_, key, dtype, shape, bytes) in checkpoint.stored() {
        let theirs = tensors.tensor(key).unwrap();
        assert_eq!(format!("{:?}", theirs.dtype()), dtype.name());
        assert_eq!((theirs.shape(), theirs.data().len()), (shape, bytes));
    }
}

#[test]
fn bf16_is_bit_equal_through_the_native_form() {
    let config = tiny();
    let [hf, native, again] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    write(hf.path(), &config, &SaveOptions::default());
    let first = open(hf.path());
    let options = SaveOptions { form: ConfigForm::Native, max_shard_size: 300_000, ..SaveOptions::default() };
    convert(&first, native.path(), &options).unwrap();
    let second = open(native.path());
    assert!(second.is_native());
    convert(&second, again.path(), &SaveOptions::default()).unwrap();
    let third = open(again.path());
    for spec in first.tensors() {
        let expected = first.read(&spec.key, DType::BF16).unwrap();
        assert_eq!(second.read(&spec.key, DType::BF16).unwrap(), expected, "{}", spec.key);
        assert_eq!(third.read(&spec.key, DType::BF16).unwrap(), expected, "{}", spec.key);
    }
    let file = |folder: &tempfile::TempDir| std::fs::read(folder.path().join("model.safetensors")).unwrap();
    assert_eq!(file(&hf), file(&again), "the files themselves are the same");
}

#[test]
fn native_rows_of_the_tower_are_in_mistrals_order() {
    let config = tiny();
    let [hf, native] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    write(hf.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
    let source = open(hf.path());
    convert(
        &source,
        native.path(),
        &SaveOptions { dtype: F32, form: ConfigForm::Native, ..SaveOptions::default() },
    )
    .unwrap();
    let bytes = std::fs::read(native.path().join("consolidated.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = tensors.tensor("vision_encoder.transformer.layers.0.attention.wk.weight").unwrap();
    let key = "vision_tower.transformer.layers.0.attention.k_proj.weight";
    let canonical = source.read(key, DType::F32).unwrap().into_f32();
    // Heads of 16: native rows 0, 1, 2 are canonical rows 0, 8, 1.
    for (native, row) in [(0, 0), (1, 8), (2, 1), (17, 24)] {
        let value = f32::from_le_bytes(stored.data()[native * 32 * 4..][..4].try_into().unwrap());
        assert_eq!(value, canonical[row * 32]);
    }
}

#[test]
fn fp8_is_within_one_step_and_stays_as_it_is() {
    let config = tiny();
    let [eight, native, again] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    write(eight.path(), &config, &SaveOptions { dtype: SaveDType::Fp8, ..SaveOptions::default() });
    let checkpoint = open(eight.path());
    let mut quantised = 0;
    for spec in checkpoint.tensors() {
        let expected = initial_tensor(&spec, &config.config, 5);
        let read = values(&checkpoint, &spec);
        if !spec.is_quantisable() {
            assert_ne!(checkpoint.stored_dtype(&spec.key), Some(StoredDType::F8E4M3));
            continue;
        }
        quantised += 1;
        assert_eq!(checkpoint.stored_dtype(&spec.key), Some(StoredDType::F8E4M3), "{}", spec.key);
        let raw = checkpoint.view(&spec.key).unwrap().unwrap();
        let scales = raw.scale.unwrap().values;
        let run = expected.len() / scales.len();
        for (index, (&expected, &read)) in expected.iter().zip(&read).enumerate() {
            let scale = scales[index / run];
            // Three bits of mantissa: a step is an eighth of the power of two below, or the smallest number.
            let step = (expected / scale).abs().log2().floor().exp2() / 8.0;
            assert!(
                (expected - read).abs() <= step.max(1.0 / 512.0) * scale * 0.5001,
                "{} {index}",
                spec.key
            );
        }
        for values in expected.chunks(run) {
            let largest = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            assert!(
                scales.iter().any(|&scale| (scale * fp8::MAX - largest).abs() < 1e-6 * largest),
                "{}",
                spec.key
            );
        }
    }
    assert!(quantised > 20);
    convert(&checkpoint, again.path(), &SaveOptions { dtype: SaveDType::Fp8, ..SaveOptions::default() })
        .unwrap();
    let file = |folder: &tempfile::TempDir| std::fs::read(folder.path().join("model.safetensors")).unwrap();
    assert!(file(&eight) == file(&again), "codes and scales are copied");
    let options = SaveOptions { dtype: SaveDType::Fp8, form: ConfigForm::Native, ..SaveOptions::default() };
    convert(&checkpoint, native.path(), &options).unwrap();
    let native = open(native.path());
    for spec in checkpoint.tensors() {
        assert_eq!(values(&native, &spec), values(&checkpoint, &spec), "{}", spec.key);
    }
}

#[test]
fn the_text_of_a_multimodal_checkpoint_loads_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = tiny();
    write(folder.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
    let text = open(folder.path()).text_only();
    text.check(&text.tensors()).unwrap();
    let spec =
        text.tensors().into_iter().find(|spec| spec.key == "model.layers.2.self_attn.o_proj.weight").unwrap();
    let full = TensorSpec { key: format!("language_model.{}", spec.key), ..spec.clone() };
    assert_eq!(values(&text, &spec), initial_tensor(&full, &config.config, 5));
    assert!(text.require_vision().is_err());
    let alone = tempfile::tempdir().unwrap();
    convert(&text, alone.path(), &SaveOptions { dtype: F32, ..SaveOptions::default() }).unwrap();
    let alone = open(alone.path());
    assert_eq!(values(&alone, &spec), values(&text, &spec));
    assert_eq!(alone.config().vision, None);
}

#[test]
fn a_bias_that_is_not_zero_is_kept_in_f32_with_a_warning() {
    let config = tiny();
    for (bias, warnings) in [(0.0, 0), (0.375_000_03_f32, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let report = save(folder.path(), &config, &SaveOptions::default(), |spec| -> Result<_, Error> {
            let mut values = initial_tensor(spec, &config.config, 5);
            if spec.kind == TensorKind::GateBias {
                values[3] = -bias;
            }
            Ok(HostTensor::f32(spec.shape.clone(), values))
        })
        .unwrap();
        assert_eq!(report.warnings.len(), warnings, "{:?}", report.warnings);
        let checkpoint = open(folder.path());
        let spec = checkpoint.tensors().into_iter().find(|spec| spec.kind == TensorKind::GateBias).unwrap();
        assert_eq!(checkpoint.contains(&spec.key), bias != 0.0);
        assert_eq!(values(&checkpoint, &spec)[3], -bias);
    }
}

#[test]
fn a_smaller_save_replaces_a_larger_one() {
    let folder = tempfile::tempdir().unwrap();
    let config = tiny();
    write(
        folder.path(),
        &config,
        &SaveOptions { dtype: F32, max_shard_size: 100_000, ..SaveOptions::default() },
    );
    let text = config.text_only();
    write(folder.path(), &text, &SaveOptions { dtype: BF16, ..SaveOptions::default() });
    let mut names: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors"]);
    assert_eq!(open(folder.path()).config(), &text.config);
}

#[test]
fn a_save_that_fails_leaves_the_old_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let config = tiny();
    write(folder.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
    let last = names::tensors(&config.config).pop().unwrap().key;
    let error = save(folder.path(), &config, &SaveOptions::default(), |spec| {
        if spec.key == last {
            return Err(Error::UnknownPreset { name: "disk full".into(), known: String::new() });
        }
        Ok(HostTensor::f32(spec.shape.clone(), vec![0.0; spec.elements()]))
    });
    assert!(error.is_err());
    let checkpoint = open(folder.path());
    let spec = &checkpoint.tensors()[0];
    assert_eq!(values(&checkpoint, spec), initial_tensor(spec, &config.config, 5));
    let partial = std::fs::read_dir(folder.path()).unwrap().flatten();
    assert!(partial.into_iter().all(|item| !item.file_name().to_string_lossy().ends_with(".partial")));
}

#[test]
fn side_files_and_unknown_keys_are_carried_along() {
    let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let mut config = tiny();
    config.raw["house_key"] = serde_json::json!({"kept": [1, 2]});
    write(from.path(), &config, &SaveOptions::default());
    for name in ["tekken.json", "tokenizer.json", "processor_config.json", "generation_config.json"] {
        std::fs::write(from.path().join(name), format!("\"{name}\"")).unwrap();
    }
    convert(&open(from.path()), to.path(), &SaveOptions { dtype: F32, ..SaveOptions::default() }).unwrap();
    for name in ["tekken.json", "tokenizer.json", "processor_config.json", "generation_config.json"] {
        assert_eq!(std::fs::read_to_string(to.path().join(name)).unwrap(), format!("\"{name}\""));
    }
    let written = open(to.path());
    assert_eq!(written.config_file().raw["house_key"], config.raw["house_key"]);
    assert_eq!(written.config_file().raw["dtype"], "float32");
    assert!(written.config_file().warnings.iter().any(|warning| warning.contains("house_key")));
}

/// Set in the process that is to be killed: the folder it saves into.
const VICTIM: &str = "MISTRAL4_TEST_SAVE_INTO";

#[test]
fn a_save_that_is_killed_leaves_the_old_checkpoint() {
    let config = tiny();
    if let Ok(folder) = std::env::var(VICTIM) {
        let mut left = 40;
        let _ = save(Path::new(&folder), &config, &SaveOptions::default(), |spec| -> Result<_, Error> {
            left -= 1;
            if left == 0 {
                std::process::abort();
            }
            Ok(HostTensor::f32(spec.shape.clone(), vec![0.0; spec.elements()]))
        });
        unreachable!("the process has been aborted");
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_save_that_is_killed_leaves_the_old_checkpoint"])
        .env(VICTIM, folder.path())
        .output()
        .unwrap()
        .status;
    assert!(!status.success());
    let partial = || {
        let items = std::fs::read_dir(folder.path()).unwrap().flatten();
        items.filter(|item| item.file_name().to_string_lossy().ends_with(".partial")).count()
    };
    assert_eq!(partial(), 1, "the process was killed while it wrote");
    let checkpoint = open(folder.path());
    for spec in checkpoint.tensors() {
        assert_eq!(values(&checkpoint, &spec), initial_tensor(&spec, &config.config, 5), "{}", spec.key);
    }
    write(folder.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
    assert_eq!(partial(), 0, "the next save cleans up");
}

#[test]
fn experts_that_are_stored_one_by_one_are_stacked() {
    let [whole, single] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let config = tiny();
    write(whole.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
    let source = open(whole.path());
    let mut stored = Vec::new();
    for spec in source.tensors().iter().filter(|spec| !spec.is_optional()) {
        let parts: &[&str] = match spec.kind {
            TensorKind::ExpertsGateUp => &["gate_proj", "up_proj"],
            TensorKind::ExpertsDown => &["down_proj"],
            _ => &[],
        };
        let values = values(&source, spec);
        if parts.is_empty() {
            stored.push((spec.key.clone(), spec.shape.clone(), values));
            continue;
        }
        let (stack, _) = spec.key.rsplit_once('.').unwrap();
        let shape = vec![spec.shape[1] / parts.len(), spec.shape[2]];
        for (index, values) in values.chunks(shape.iter().product()).enumerate() {
            let (expert, part) = (index / parts.len(), parts[index % parts.len()]);
            stored.push((format!("{stack}.{expert}.{part}.weight"), shape.clone(), values.to_vec()));
        }
    }
    std::fs::copy(whole.path().join("config.json"), single.path().join("config.json")).unwrap();
    let store = |stored: &[(String, Vec<usize>, Vec<f32>)]| {
        let bytes: Vec<Vec<u8>> = stored
            .iter()
            .map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let views = stored.iter().zip(&bytes).map(|((key, shape, _), bytes)| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
            (key.as_str(), view)
        });
        safetensors::serialize_to_file(views, None, &single.path().join("model.safetensors")).unwrap();
    };
    store(&stored);
    let checkpoint = open(single.path());
    for spec in source.tensors() {
        assert_eq!(values(&checkpoint, &spec), values(&source, &spec), "{}", spec.key);
        assert_eq!(checkpoint.stored_shape(&spec.key), source.stored_shape(&spec.key));
    }
    stored.retain(|(key, ..)| !key.ends_with("layers.1.mlp.experts.3.up_proj.weight"));
    store(&stored);
    let checkpoint = Checkpoint::open(single.path(), &ConfigOptions::default()).unwrap();
    let error = checkpoint.check(&checkpoint.tensors()).unwrap_err().to_string();
    assert!(error.contains("1 unusable") && error.contains("some of which are missing"), "{error}");
    let key = "language_model.model.layers.1.mlp.experts.gate_up_proj";
    assert!(checkpoint.read(key, DType::F32).is_err());
}

/// Integer weights are written packed and read back as the codes that quantising gives, by every way of reading.
#[test]
fn packed_integers_are_read_back() {
    for bits in [Bits::Four, Bits::Eight] {
        for symmetric in [true, false] {
            let format = WeightFormat::Int { bits, group_size: 32, symmetric };
            let eight = WeightFormat::Int { bits: Bits::Eight, group_size: 32, symmetric: true };
            for lm_head in [None, Some(eight)] {
                let quantization = WeightQuantization { weights: format, lm_head };
                let [source, packed, again, dense] = [(); 4].map(|()| tempfile::tempdir().unwrap());
                let config = tiny();
                write(source.path(), &config, &SaveOptions { dtype: F32, ..SaveOptions::default() });
                let source = open(source.path());
                let to = |dtype| SaveOptions { dtype, ..SaveOptions::default() };
                let dtype = SaveDType::Packed(quantization);
                convert(&source, packed.path(), &to(dtype)).unwrap();
                let checkpoint = open(packed.path());
                for spec in checkpoint.tensors() {
                    let original = source.read(&spec.key, DType::F32).unwrap();
                    let stored = checkpoint.stored_quantized(&spec).unwrap();
                    // Groups of 32 do not divide its 48 columns.
                    let is_ragged = spec.key.ends_with("q_b_proj.weight");
                    match quantization.of(&spec).filter(|_| !is_ragged) {
                        None => {
                            assert_eq!(stored, None, "{}", spec.key);
                            assert_ne!(checkpoint.stored_dtype(&spec.key), Some(StoredDType::I32));
                        }
                        Some(format) => {
                            let want = quantize(&spec, format, &original.data).unwrap();
                            assert_eq!(stored.as_ref(), Some(&want), "{}", spec.key);
                            let mut restored = Vec::new();
                            let dims = stack_dims(&spec);
                            for matrix in 0..dims.matrices {
                                let mut values = vec![0.0f32; dims.rows * dims.columns];
                                want.dequantize(matrix, &mut values);
                                restored.extend(values);
                            }
                            assert_eq!(values(&checkpoint, &spec), restored, "{}", spec.key);
                        }
                    }
                }
                // The same codes again, and dense values.
                convert(&checkpoint, again.path(), &to(dtype)).unwrap();
                let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
                assert!(bytes(packed.path()) == bytes(again.path()));
                assert_eq!(
                    checkpoint.config_file().quantization,
                    open(again.path()).config_file().quantization
                );
                convert(&checkpoint, dense.path(), &to(F32)).unwrap();
                let dense = open(dense.path());
                assert_eq!(dense.config_file().quantization, None);
                for spec in dense.tensors() {
                    assert_eq!(values(&dense, &spec), values(&checkpoint, &spec), "{}", spec.key);
                }
            }
        }
    }
}

/// FP8 weights are taken as they are stored, in both forms of a checkpoint.
#[test]
fn fp8_stays_fp8() {
    for form in [ConfigForm::Hf, ConfigForm::Native] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &tiny(), &SaveOptions { dtype: SaveDType::Fp8, form, ..SaveOptions::default() });
        let checkpoint = open(folder.path());
        let mut found = 0;
        for spec in checkpoint.tensors() {
            let stored = checkpoint.stored_quantized(&spec).unwrap();
            assert_eq!(stored.is_some(), spec.is_quantisable(), "{}", spec.key);
            let Some(stored) = stored else { continue };
            found += 1;
            let dims = stored.dims();
            let mut restored = vec![0.0f32; dims.elements()];
            for (matrix, values) in restored.chunks_mut(dims.rows * dims.columns).enumerate() {
                stored.dequantize(matrix, values);
            }
            assert_eq!(values(&checkpoint, &spec), restored, "{}", spec.key);
        }
        assert!(found > 10);
    }
}

#[test]
fn impossible_packings_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = tiny();
    let format = |group_size| WeightFormat::Int { bits: Bits::Four, group_size, symmetric: true };
    let attempt = |group_size, form| {
        let dtype = SaveDType::Packed(WeightQuantization { weights: format(group_size), lm_head: None });
        let options = SaveOptions { dtype, form, ..SaveOptions::default() };
        let error = save(folder.path(), &config, &options, |spec| -> Result<_, Error> {
            Ok(HostTensor::f32(spec.shape.clone(), initial_tensor(spec, &config.config, 5)))
        });
        error.unwrap_err().to_string()
    };
    let error = attempt(256, ConfigForm::Hf);
    assert!(error.contains("the groups divide the columns of no weight"), "{error}");
    let error = attempt(32, ConfigForm::Native);
    assert!(error.contains("no packed integers"), "{error}");
}

#[test]
fn a_part_is_read_alone_in_every_form() {
    let config = tiny();
    for (dtype, form) in [
        (F32, ConfigForm::Hf),
        (BF16, ConfigForm::Native),
        (SaveDType::Fp8, ConfigForm::Hf),
        (SaveDType::Fp8, ConfigForm::Native),
    ] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config, &SaveOptions { dtype, form, ..SaveOptions::default() });
        let whole = open(folder.path());
        let stored: usize = whole.stored().map(|(.., bytes)| bytes).sum();
        let mut sum = 0;
        for rank in 0..3 {
            let checkpoint = open(folder.path());
            for spec in checkpoint.tensors() {
                let elements = spec.shape.iter().product::<usize>();
                let range = elements * rank / 3..elements * (rank + 1) / 3;
                let part = checkpoint.read_part(&spec.key, range.clone(), DType::F32).unwrap().into_f32();
                assert_eq!(part, values(&whole, &spec)[range], "{} in {dtype:?}, {form:?}", spec.key);
            }
            assert!(
                checkpoint.bytes_read() < stored as u64 * 2 / 5,
                "{} of {stored}",
                checkpoint.bytes_read()
            );
            sum += checkpoint.bytes_read();
        }
        // Scales count as stored, not as read; the tower's rows of the native form are read by every rank.
        let stored = stored as f64;
        assert!((0.9 * stored..1.05 * stored).contains(&(sum as f64)), "{sum} of {stored}");
    }
}
