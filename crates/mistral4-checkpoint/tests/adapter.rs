//! Adapters: which modules they are for, their files, and merging.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mistral4_checkpoint::adapter::{self, Adapter, LoraInit, LoraSettings, LoraTensors, Target};
use mistral4_checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4_checkpoint::weights::{Checkpoint, DType, HostTensor, SaveDType, SaveOptions, save};
use mistral4_checkpoint::{Error, initial_tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/adapter").join(name)
}

fn tiny() -> ConfigFile {
    ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap()
}

fn settings(targets: &[&str]) -> LoraSettings {
    LoraSettings { target_modules: targets.iter().map(|t| (*t).to_owned()).collect(), ..Default::default() }
}

fn names(settings: &LoraSettings) -> Vec<String> {
    settings.plan(&tiny().config).unwrap().into_iter().map(|(target, _)| target.name).collect()
}

/// An adapter that changes something.
fn trained(settings: &LoraSettings, config: &ConfigFile) -> Adapter {
    let weight = |target: &Target| -> Result<_, Error> {
        let values = (0..target.shape.iter().product()).map(|i| (i % 13) as f32 - 6.0).collect();
        Ok(HostTensor::f32(target.shape.clone(), values))
    };
    let mut adapter = settings.adapter(&config.config, 7, DType::F32, weight).unwrap();
    for lora in adapter.modules.values_mut() {
        let values = (0..lora.b.len()).map(|i| (i % 7) as f32 / 7.0 - 0.4).collect();
        lora.b = HostTensor::f32(lora.b.shape.clone(), values);
    }
    adapter.base_model = Some("base".to_owned());
    adapter
}

#[test]
fn patterns_choose_linear_maps_and_stacks_as_in_automodel() {
    let all = names(&settings(&["*"]));
    let count = |part: &str, names: &[String]| names.iter().filter(|name| name.contains(part)).count();
    assert!(count("mlp.experts.", &all) > 0 && count("gate.weight", &all) == 0);
    assert!(all.contains(&"language_model.lm_head".to_owned()));
    assert!(count("vision_tower", &all) > 0 && count("multi_modal_projector", &all) == 3);
    // The default leaves out experts and whatever does not end in `_proj`.
    let default = names(&LoraSettings::default());
    assert_eq!(count("mlp.experts.", &default) + count("lm_head", &default), 0);
    assert_eq!(count("kv_a_proj_with_mqa", &default), 0);
    assert!(count("q_a_proj", &default) > 0);
    let linear = names(&LoraSettings { match_all_linear: true, ..Default::default() });
    assert_eq!(count("mlp.experts.", &linear), 0);
    assert_eq!(linear.len() + count("mlp.experts.", &all), all.len());
    let others = LoraSettings { exclude_modules: vec!["*vision_tower*".into()], ..Default::default() };
    assert_eq!(names(&others).len(), linear.len() - count("vision_tower", &linear));
    // Names as in the checkpoint, in transformers and in NeMo AutoModel mean the same.
    let one = |pattern: &str| names(&settings(&[pattern]));
    let wanted = vec!["language_model.model.layers.0.self_attn.o_proj".to_owned()];
    assert_eq!(one("language_model.model.layers.0.self_attn.o_proj"), wanted);
    assert_eq!(one("model.language_model.layers.0.self_attn.o_proj"), wanted);
    assert_eq!(one("model.language_model.model.layers.0.self_attn.o_proj"), wanted);
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let config = tiny().config;
    let refused = |settings: LoraSettings| settings.plan(&config).unwrap_err().to_string();
    let message = refused(settings(&["*_porj"]));
    assert!(message.contains("target_modules") && message.contains("*_porj"), "{message}");
    let exclude_modules = vec!["lm_head".to_owned()];
    assert!(refused(LoraSettings { exclude_modules, ..settings(&["*"]) }).contains("exclude"));
    assert!(refused(LoraSettings { match_all_linear: true, ..settings(&["*"]) }).contains("every linear"));
    assert!(refused(LoraSettings { use_dora: true, ..settings(&["*"]) }).contains("DoRA"));
    let low = LoraSettings { dim: 1, moe_rank_scaling: true, ..settings(&["*experts"]) };
    assert!(refused(low).contains("below 1"));
}

#[test]
fn ranks_of_experts_are_divided_by_their_number_a_token() {
    let config = tiny().config;
    let scaled = LoraSettings { dim: 9, moe_rank_scaling: true, ..settings(&["*"]) };
    for (target, rank) in scaled.plan(&config).unwrap() {
        let want = if target.is_stack() { 9 / config.text.num_experts_per_tok } else { 9 };
        assert_eq!(rank, want, "{}", target.name);
    }
    let adapter = trained(&scaled, &tiny());
    let down = &adapter.modules["language_model.model.layers.1.mlp.experts.down_proj"];
    assert_eq!(down.scale, 32.0 / down.rank() as f64);
}

#[test]
fn new_adapters_change_nothing_and_are_drawn_as_torch_draws() {
    let config = tiny();
    for (init, deviation) in [(LoraInit::Xavier, (2.0f64 / (64.0 + 8.0)).sqrt()), (LoraInit::Uniform, 0.0722)]
    {
        let settings = LoraSettings { lora_a_init: init, ..settings(&["lm_head"]) };
        let fresh = settings
            .adapter(&config.config, 7, DType::F32, |_| -> Result<_, Error> { unreachable!("no DoRA") })
            .unwrap();
        let LoraTensors { a, b, .. } = &fresh.modules["language_model.lm_head"];
        assert!(b.clone().into_f32().iter().all(|&v| v == 0.0));
        let a = a.clone().into_f32();
        let square = a.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / a.len() as f64;
        assert!((square.sqrt() / deviation - 1.0).abs() < 0.1, "{init:?} {}", square.sqrt());
    }
}

#[test]
fn files_come_back_as_they_were() {
    let config = tiny();
    let folder = tempfile::tempdir().unwrap();
    for adapter in [
        trained(&LoraSettings { moe_rank_scaling: true, ..settings(&["*"]) }, &config),
        trained(&settings(&["*experts", "*o_proj"]), &config),
        trained(&LoraSettings { use_dora: true, ..settings(&["*self_attn*", "lm_head"]) }, &config),
    ] {
        adapter.save(folder.path(), true).unwrap();
        assert_eq!(Adapter::open(folder.path(), &config.config).unwrap(), adapter);
    }
}

#[test]
fn what_peft_wrote_is_read_and_written_alike() {
    for (name, multimodal) in [("text", false), ("multimodal", true), ("dora", true)] {
        let folder = fixture(name);
        let config = ConfigFile::read(&folder.join("model"), &ConfigOptions::default()).unwrap();
        let adapter = Adapter::open(&folder.join("adapter"), &config.config).unwrap();
        assert_eq!(adapter.rank, 6);
        let stacks: Vec<_> = adapter.modules.iter().filter(|(_, lora)| lora.a.shape.len() == 3).collect();
        assert_eq!(stacks.is_empty(), name == "dora");
        assert!(stacks.iter().all(|(_, lora)| lora.rank() == 3 && lora.scale == 5.0));
        let again = tempfile::tempdir().unwrap();
        adapter.save(again.path(), multimodal).unwrap();
        assert_eq!(Adapter::open(again.path(), &config.config).unwrap(), adapter);
        // Tensor for tensor the same file.
        let read = |folder: &Path| {
            let bytes = std::fs::read(folder.join(adapter::ADAPTER_MODEL)).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let tensors = file.tensors().into_iter();
            tensors.map(|(key, t)| (key, (t.shape().to_vec(), t.data().to_vec()))).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(read(&folder.join("adapter")), read(again.path()), "{name}");
    }
}

/// Tensors of a file by their keys.
type Tensors = BTreeMap<String, HostTensor>;

/// One of the matrices of a stack, `[m, n]`, and the same with its axes exchanged.
fn matrix(stack: &HostTensor, index: usize) -> (HostTensor, HostTensor) {
    let [_, m, n] = stack.shape[..] else { unreachable!("a stack has three axes") };
    let values = stack.clone().part(index * m * n..(index + 1) * m * n).into_f32();
    let exchanged = (0..m * n).map(|i| values[i % m * n + i / m]).collect();
    (HostTensor::f32([m, n], values), HostTensor::f32([n, m], exchanged))
}

/// The stacks as NeMo AutoModel holds them: inputs first.
fn stacks_in_nemo(experts: &str, stack: &str, lora: &LoraTensors) -> Tensors {
    let name = if stack == "gate_up_proj" { "gate_and_up" } else { "down" };
    let exchanged = |tensor: &HostTensor| {
        let [count, m, n] = tensor.shape[..] else { unreachable!("a stack has three axes") };
        HostTensor::f32([count, n, m], (0..count).flat_map(|i| matrix(tensor, i).1.into_f32()).collect())
    };
    [("A", &lora.a), ("B", &lora.b)]
        .map(|(part, tensor)| (format!("{experts}.lora_{name}_{part}"), exchanged(tensor)))
        .into()
}

/// A LoRA for each linear map of each expert, gate and up projections with the same A.
fn experts_one_by_one(experts: &str, stack: &str, lora: &LoraTensors) -> Tensors {
    let mut tensors = Tensors::new();
    for index in 0..lora.a.shape[0] {
        let (a, b) = (matrix(&lora.a, index).0, matrix(&lora.b, index).0);
        let linears: &[&str] =
            if stack == "gate_up_proj" { &["gate_proj", "up_proj"] } else { &["down_proj"] };
        let [rows, rank] = [b.shape[0] / linears.len(), b.shape[1]];
        for (i, linear) in linears.iter().enumerate() {
            let b = b.clone().part(i * rows * rank..(i + 1) * rows * rank).into_f32();
            let lora = format!("{experts}.{index}.{linear}");
            tensors.insert(format!("{lora}.lora_A.weight"), a.clone());
            tensors.insert(format!("{lora}.lora_B.weight"), HostTensor::f32([rows, rank], b));
        }
    }
    tensors
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let bytes: BTreeMap<&String, (Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(key, t)| {
            let values = t.clone().into_f32();
            (key, (t.shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        })
        .collect();
    let views = bytes.iter().map(|(key, (shape, bytes))| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (key.as_str(), view.unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn experts_are_read_in_both_forms_of_nemo_automodel() {
    let config = tiny();
    let settings = LoraSettings { moe_rank_scaling: true, dim: 9, ..settings(&["*experts", "*o_proj"]) };
    let adapter = trained(&settings, &config);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(adapter::ADAPTER_MODEL);
    adapter.save(folder.path(), true).unwrap();
    for form in [stacks_in_nemo, experts_one_by_one] {
        let mut tensors = Tensors::new();
        for (name, lora) in &adapter.modules {
            let (module, last) = name.rsplit_once('.').unwrap();
            // Its modules nest the text model once more.
            let prefix = "base_model.model.model.";
            if lora.a.shape.len() == 3 {
                tensors.extend(form(&format!("{prefix}{module}"), last, lora));
            } else {
                tensors.insert(format!("{prefix}{name}.lora_A.weight"), lora.a.clone());
                tensors.insert(format!("{prefix}{name}.lora_B.weight"), lora.b.clone());
            }
        }
        write_tensors(&path, &tensors);
        assert_eq!(Adapter::open(folder.path(), &config.config).unwrap(), adapter);
    }
    let gate_up = &adapter.modules["language_model.model.layers.1.mlp.experts.gate_up_proj"];
    let experts = "base_model.model.model.language_model.model.layers.1.mlp.experts";
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = experts_one_by_one(experts, "gate_up_proj", gate_up);
        change(&mut tensors);
        write_tensors(&path, &tensors);
        Adapter::open(folder.path(), &config.config).unwrap_err().to_string()
    };
    let a_of_up = format!("{experts}.1.up_proj.lora_A.weight");
    let message = refused(&|tensors| {
        tensors.remove(&a_of_up);
    });
    assert!(message.contains("experts.1.up_proj") && message.contains("every expert"), "{message}");
    let message = refused(&|tensors| {
        let other = tensors[&format!("{experts}.0.up_proj.lora_A.weight")].clone();
        tensors.insert(a_of_up.clone(), other);
    });
    assert!(message.contains("the same lora_A"), "{message}");
}

#[test]
fn adapters_of_another_model_or_kind_are_refused() {
    let config = tiny();
    let folder = tempfile::tempdir().unwrap();
    let text = fixture("text");
    let error = Adapter::open(&text.join("adapter"), &config.config).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors"), "{error}");
    let other = ConfigFile::read(&text.join("model"), &ConfigOptions::default()).unwrap();
    let settings = std::fs::read_to_string(text.join("adapter/adapter_config.json")).unwrap();
    std::fs::copy(
        text.join("adapter/adapter_model.safetensors"),
        folder.path().join("adapter_model.safetensors"),
    )
    .unwrap();
    for (from, to, want) in [
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        ("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "modules_to_save"),
        ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"", "init_lora_weights"),
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"r\": 6", "\"r\": 0", "`r`"),
    ] {
        assert!(settings.contains(from), "{from}");
        std::fs::write(folder.path().join("adapter_config.json"), settings.replace(from, to)).unwrap();
        let error = Adapter::open(folder.path(), &other.config).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    std::fs::write(
        folder.path().join("adapter_config.json"),
        settings.replace("\"lora_alpha\": 12", "\"lora_alpha\": 6"),
    )
    .unwrap();
    let halved = Adapter::open(folder.path(), &other.config).unwrap();
    assert_eq!(halved.modules["lm_head"].scale, 1.0);
}

#[test]
fn merging_adds_the_product_and_leaves_the_rest() {
    let config = tiny();
    let base = tempfile::tempdir().unwrap();
    let f32 = SaveOptions { dtype: SaveDType::Float(DType::F32), ..SaveOptions::default() };
    save(base.path(), &config, &f32, |spec| -> Result<_, Error> {
        Ok(HostTensor::f32(spec.shape.clone(), initial_tensor(spec, &config.config, 5)))
    })
    .unwrap();
    let base = Checkpoint::open(base.path(), &ConfigOptions::default()).unwrap();
    let adapter = trained(&settings(&["*experts", "*o_proj"]), &config);
    let out = tempfile::tempdir().unwrap();
    adapter::merge(&base, &adapter, out.path(), &f32).unwrap();
    let merged = Checkpoint::open(out.path(), &ConfigOptions::default()).unwrap();
    let mut changed = 0;
    for spec in merged.tensors() {
        let [was, is] = [&base, &merged].map(|c| c.read(&spec.key, DType::F32).unwrap().into_f32());
        let Some(lora) = adapter.modules.get(spec.key.strip_suffix(".weight").unwrap_or(&spec.key)) else {
            assert_eq!(was, is, "{}", spec.key);
            continue;
        };
        changed += 1;
        let [outputs, inputs] = spec.shape[spec.shape.len() - 2..] else { unreachable!() };
        let (a, b) = (lora.a.clone().into_f32(), lora.b.clone().into_f32());
        for (index, (was, is)) in was.iter().zip(&is).enumerate() {
            let (row, column) = (index / inputs, index % inputs);
            let product =
                |r| b[row * lora.rank() + r] * a[(row / outputs * lora.rank() + r) * inputs + column];
            let change = (0..lora.rank()).map(product).sum::<f32>() * lora.scale as f32;
            assert!((is - was - change).abs() < 1e-5, "{} {index}", spec.key);
        }
    }
    assert_eq!(changed, adapter.modules.len());
}
