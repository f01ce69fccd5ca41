//! What users are told about files that are wrong. Each text is in the snapshot.

use std::fmt::Write as _;
use std::path::Path;

use mistral4_checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4_checkpoint::weights::{Checkpoint, DType, HostTensor, SaveDType, SaveOptions, save};
use mistral4_checkpoint::{Error, initial_tensor};
use serde_json::{Value, json};

fn options() -> ConfigOptions {
    ConfigOptions::default()
}

fn error_of(raw: &Value, name: &str) -> String {
    match ConfigFile::from_value(raw.clone(), Path::new(name), &options()) {
        Ok(_) => panic!("accepted: {raw}"),
        Err(error) => error.to_string(),
    }
}

/// A text configuration with some keys changed; null removes a key.
fn text(changes: &Value) -> Value {
    let mut raw = ConfigFile::preset("small", &options()).unwrap().raw;
    change(&mut raw, changes);
    raw
}

fn wrapper(changes: &Value) -> Value {
    let mut raw = ConfigFile::preset("tiny", &options()).unwrap().raw;
    change(&mut raw, changes);
    raw
}

fn native(changes: &Value) -> Value {
    let mut raw = ConfigFile::preset("tiny", &options()).unwrap().config.to_params_json().unwrap();
    change(&mut raw, changes);
    raw
}

fn change(raw: &mut Value, changes: &Value) {
    for (key, value) in changes.as_object().unwrap() {
        match (raw.get_mut(key), value) {
            (Some(Value::Object(_)), Value::Object(inner)) if !inner.is_empty() => {
                change(&mut raw[key], value)
            }
            (_, Value::String(text)) if text == "<remove>" => {
                raw.as_object_mut().unwrap().shift_remove(key);
            }
            _ => raw[key] = value.clone(),
        }
    }
}

#[test]
fn configurations() {
    let text_cases = [
        json!({"model_type": "llama"}),
        json!({"model_type": "<remove>"}),
        json!({"hidden_size": 0}),
        json!({"hidden_size": -1}),
        json!({"hidden_size": 4096.5}),
        json!({"hidden_size": "4096"}),
        json!({"hidden_size": null}),
        json!({"hidden_size": 1u64 << 60}),
        json!({"vocab_size": 1u64 << 31, "hidden_size": 1u64 << 31}),
        json!({"num_hidden_layers": 1_000_000}),
        json!({"tie_word_embeddings": true}),
        json!({"attention_dropout": 0.1}),
        json!({"num_key_value_heads": 2}),
        json!({"num_local_experts": 3}),
        json!({"hidden_act": "quick_gelu"}),
        json!({"qk_rope_head_dim": 31}),
        json!({"qk_head_dim": 100}),
        json!({"head_dim": 100}),
        json!({"n_group": 3}),
        json!({"n_group": 32}),
        json!({"topk_group": 2}),
        json!({"num_experts_per_tok": 33}),
        json!({"rms_norm_eps": 0.0}),
        json!({"eos_token_id": [2, 99_999_999]}),
        json!({"sliding_window": 4096}),
        json!({"layer_types": ["sliding_attention"]}),
        json!({"is_encoder_decoder": true}),
        json!({"per_layer_config": {"0": {"hidden_size": 1}}}),
        json!({"architectures": ["Mistral4ForSequenceClassification"]}),
        json!({"scoring_func": "sigmoid"}),
        json!({"rope_parameters": []}),
        json!({"rope_parameters": {"rope_type": "llama3"}}),
        json!({"rope_parameters": {"factor": "<remove>"}}),
        json!({"rope_parameters": {"factor": 0}}),
        json!({"rope_parameters": {"rope_theta": 1}}),
        json!({"rope_parameters": {"attention_factor": -1.0}}),
        json!({"rope_parameters": {"llama_4_scaling_beta": -1.0}}),
        json!({"rope_parameters": {"apply_yarn_scaling": "yes"}}),
        json!({"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": "<remove>"}}),
        json!({"quantization_config": {"quant_method": "compressed-tensors"}}),
        json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}),
        json!({"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}),
        json!({"quantization_config": {"quant_method": "fp8", "activation_scheme": "sometimes"}}),
    ];
    let wrapper_cases = [
        json!({"text_config": "<remove>"}),
        json!({"text_config": {"model_type": "mistral"}}),
        json!({"tie_word_embeddings": true}),
        json!({"vision_feature_layer": [-2, -1]}),
        json!({"vision_feature_layer": 3}),
        json!({"image_token_index": 1024}),
        json!({"spatial_merge_size": 1000}),
        json!({"vision_config": {"model_type": "siglip"}}),
        json!({"vision_config": {"num_attention_heads": 3}}),
        json!({"vision_config": {"num_attention_heads": 16}}),
        json!({"vision_config": {"head_dim": 12}}),
        json!({"vision_config": {"patch_size": [14, 16]}}),
        json!({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}),
    ];
    let native_cases = [
        json!({"moe": "<remove>"}),
        json!({"vocab_size": "<remove>"}),
        json!({"n_kv_heads": 1}),
        json!({"head_dim": 7}),
        json!({"tied_embeddings": true}),
        json!({"moe": {"route_every_n": 2}}),
        json!({"moe": {"num_expert_groups": 3}}),
        json!({"yarn": {"beta": "<remove>"}}),
        json!({"llama_4_scaling": {"original_max_position_embeddings": 7}}),
        json!({"quantization": {"qformat_weight": "nvfp4"}}),
        json!({"vision_encoder": {"mm_projector_id": "mlp"}}),
    ];
    let mut report = String::new();
    for changes in text_cases {
        writeln!(report, "{}", error_of(&text(&changes), "config.json")).unwrap();
    }
    for changes in wrapper_cases {
        writeln!(report, "{}", error_of(&wrapper(&changes), "config.json")).unwrap();
    }
    for changes in native_cases {
        writeln!(report, "{}", error_of(&native(&changes), "params.json")).unwrap();
    }
    insta::assert_snapshot!(report);
}

#[test]
fn bytes_that_are_no_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    let cases: [&[u8]; 8] = [
        b"",
        b"{\"model_type\": \"mistral4\"",
        b"\xff\xfe{\x00}",
        b"[1, 2]",
        b"{\"model_type\": \"mistral4\", \"rms_norm_eps\": NaN}",
        b"{\"model_type\": \"mistral4\", \"rms_norm_eps\": 1e999}",
        b"{\"model_type\": \"mistral4\", \"model_type\": \"mistral3\"}",
        &b"[".repeat(200),
    ];
    let mut report = String::new();
    for bytes in cases {
        std::fs::write(&file, bytes).unwrap();
        let error = ConfigFile::read(&file, &options()).unwrap_err();
        writeln!(report, "{}", plain(&error, folder.path())).unwrap();
    }
    let error = ConfigFile::read(&folder.path().join("none.json"), &options()).unwrap_err();
    writeln!(report, "{}", plain(&error, folder.path())).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let error = ConfigFile::read(empty.path(), &options()).unwrap_err();
    writeln!(report, "{}", plain(&error, empty.path())).unwrap();
    writeln!(report, "{}", ConfigFile::preset("huge", &options()).unwrap_err()).unwrap();
    insta::assert_snapshot!(report);
}

/// The text without the temporary folder's name.
fn plain(error: &Error, folder: &Path) -> String {
    error.to_string().replace(&folder.display().to_string(), "FOLDER")
}

/// A whole checkpoint, one change to it, and what opening and checking it says.
fn broken(name: &str, dtype: SaveDType, max_shard_size: u64, spoil: impl Fn(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let config = ConfigFile::preset("tiny", &options()).unwrap();
    let options = SaveOptions { dtype, max_shard_size, ..SaveOptions::default() };
    save(folder.path(), &config, &options, |spec| -> Result<_, Error> {
        Ok(HostTensor::f32(spec.shape.clone(), initial_tensor(spec, &config.config, 1)))
    })
    .unwrap();
    spoil(folder.path());
    let opened = Checkpoint::open(folder.path(), &ConfigOptions::default());
    match opened.and_then(|checkpoint| checkpoint.check(&checkpoint.tensors())) {
        Ok(()) => panic!("{name}: accepted"),
        Err(error) => format!("{name}: {}\n", plain(&error, folder.path())),
    }
}

/// Replaces the header of the only weight file, keeping its data.
fn edit_header(folder: &Path, edit: impl Fn(&mut Value)) {
    let file = folder.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    write_file(&file, header.to_string().as_bytes(), &bytes[8 + length..]);
}

fn write_file(file: &Path, header: &[u8], data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    std::fs::write(file, bytes).unwrap();
}

fn rename(header: &mut Value, from: &str, to: &str) {
    let entry = header.as_object_mut().unwrap().shift_remove(from).unwrap();
    header[to] = entry;
}

const NORM: &str = "language_model.model.norm.weight";
const LAYER: &str = "language_model.model.layers.1.";

#[test]
fn checkpoints() {
    let bf16 = SaveDType::Float(DType::BF16);
    let one = |name: &str, spoil: &dyn Fn(&Path)| broken(name, bf16, u64::MAX, spoil);
    let edit = |name: &str, change: &dyn Fn(&mut Value)| {
        broken(name, bf16, u64::MAX, |folder| edit_header(folder, change))
    };
    let eight = |name: &str, change: &dyn Fn(&mut Value)| {
        broken(name, SaveDType::Fp8, u64::MAX, |folder| edit_header(folder, change))
    };
    let many = |name: &str, spoil: &dyn Fn(&Path)| broken(name, bf16, 100_000, spoil);
    let weights = |folder: &Path| folder.join("model.safetensors");
    let report = [
        one("no weights", &|folder| std::fs::remove_file(weights(folder)).unwrap()),
        one("empty file", &|folder| std::fs::write(weights(folder), b"").unwrap()),
        one("seven bytes", &|folder| std::fs::write(weights(folder), b"1234567").unwrap()),
        one("cut in the header", &|folder| cut(&weights(folder), 1000)),
        one("cut in the data", &|folder| cut(&weights(folder), 100_000)),
        one("a huge header", &|folder| std::fs::write(weights(folder), u64::MAX.to_le_bytes()).unwrap()),
        one("no JSON", &|folder| write_file(&weights(folder), b"{{{{", b"")),
        one("no UTF-8", &|folder| write_file(&weights(folder), b"{\"\xff\": 1}", b"")),
        one("no object", &|folder| write_file(&weights(folder), b"[]", b"")),
        one("twice the same key", &|folder| {
            let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
            write_file(&weights(folder), format!(r#"{{"a":{entry},"a":{entry}}}"#).as_bytes(), b"x");
        }),
        edit("an unknown format", &|header| header[NORM]["dtype"] = json!("F4")),
        edit("a wrong size", &|header| header[NORM]["shape"] = json!([63])),
        edit("a negative size", &|header| header[NORM]["shape"] = json!([-64])),
        edit("an overflowing shape", &|header| header[NORM]["shape"] = json!([1u64 << 40, 1u64 << 40])),
        edit("overlapping tensors", &|header| {
            let first = format!("{LAYER}input_layernorm.weight");
            header[NORM]["data_offsets"] = header[&first]["data_offsets"].clone();
        }),
        edit("an end before the start", &|header| header[NORM]["data_offsets"] = json!([128, 0])),
        edit("a missing tensor", &|header| rename(header, NORM, "language_model.model.norm.bias")),
        edit("another format of the right size", &|header| header[NORM]["dtype"] = json!("I16")),
        edit("another shape of the right size", &|header| {
            header[&format!("{LAYER}self_attn.o_proj.weight")]["shape"] = json!([128, 64]);
        }),
        edit("the same parameter twice", &|header| {
            rename(header, "vision_tower.ln_pre.weight", "model.language_model.norm.weight");
        }),
        eight("fp8 without a scale", &|header| {
            rename(header, &format!("{LAYER}self_attn.o_proj.weight_scale_inv"), "x.activation_scale");
        }),
        eight("a scale of another shape", &|header| {
            header[&format!("{LAYER}mlp.experts.down_proj_scale_inv")]["shape"] = json!([2, 4]);
        }),
        eight("a scale that is no float", &|header| {
            header[&format!("{LAYER}self_attn.o_proj.weight_scale_inv")]["dtype"] = json!("I32");
        }),
        many("a missing shard", &|folder| {
            let shards: Vec<_> =
                std::fs::read_dir(folder).unwrap().flatten().map(|item| item.path()).collect();
            let third = |path: &&std::path::PathBuf| path.to_string_lossy().contains("model-00003-of");
            std::fs::remove_file(shards.iter().find(third).unwrap()).unwrap();
        }),
        many("an index that leads out of the folder", &|folder| {
            edit_index(folder, |map| map["lm_head.weight"] = json!("../model.safetensors"));
        }),
        many("an index that names no file", &|folder| {
            edit_index(folder, |map| map["lm_head.weight"] = json!(1))
        }),
        many("an index with a key that is not there", &|folder| {
            edit_index(folder, |map| map["lm_head.weight"] = map[NORM].clone());
        }),
        many("an index without a map", &|folder| {
            std::fs::write(folder.join("model.safetensors.index.json"), "{}").unwrap();
        }),
        one("a text model under a multimodal configuration", &|folder| {
            let config = ConfigFile::preset("tiny", &options()).unwrap();
            let text = config.text_only();
            save(folder, &text, &SaveOptions::default(), |spec| -> Result<_, Error> {
                Ok(HostTensor::f32(spec.shape.clone(), vec![0.0; spec.elements()]))
            })
            .unwrap();
            std::fs::write(folder.join("config.json"), config.raw.to_string()).unwrap();
        }),
        one("another model's configuration", &|folder| {
            let raw = wrapper(&json!({"text_config": {"n_routed_experts": 16, "hidden_size": 32}}));
            std::fs::write(folder.join("config.json"), raw.to_string()).unwrap();
        }),
    ];
    insta::assert_snapshot!(report.concat());
}

fn cut(file: &Path, length: usize) {
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(file, &bytes[..length]).unwrap();
}

fn edit_index(folder: &Path, edit: impl Fn(&mut Value)) {
    let file = folder.join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    edit(&mut index["weight_map"]);
    std::fs::write(file, index.to_string()).unwrap();
}

#[test]
fn models_that_a_form_cannot_hold() {
    let cases = [
        json!({"text_config": {"attention_bias": true}}),
        json!({"text_config": {"rope_interleave": false}}),
        json!({"text_config": {"norm_topk_prob": false}}),
        json!({"text_config": {"rope_parameters": {"attention_factor": 1.5}}}),
        json!({"vision_config": {"hidden_act": "gelu"}}),
        json!({"projector_hidden_act": "relu"}),
        json!({"vision_feature_layer": -2}),
    ];
    let mut report = String::new();
    for changes in cases {
        let file = ConfigFile::from_value(wrapper(&changes), Path::new("config.json"), &options()).unwrap();
        writeln!(report, "{}", file.config.to_params_json().unwrap_err()).unwrap();
    }
    insta::assert_snapshot!(report);
}
