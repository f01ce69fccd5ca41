//! `mistral4 inspect`: what a checkpoint or a configuration is, from headers alone.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use mistral4_checkpoint::config::{
    Config, ConfigFile, ConfigForm, ConfigOptions, PackedGroup, Quantization, SoftmaxScalePolicy,
};
use mistral4_checkpoint::inspect::{self, Inspection, TensorRow};

use crate::arguments::parse_policy;
use crate::error::{Error, Result};
use crate::{format, stdout};

/// Arguments of `mistral4 inspect`.
#[derive(Debug, Args)]
pub struct InspectArguments {
    /// Checkpoint folder, config.json or params.json
    #[arg(required_unless_present = "preset", conflicts_with = "preset")]
    pub path: Option<PathBuf>,
    /// A configuration that comes with the program: tiny, small, medium, mistral-small-4-119b
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Softmax scale, whatever the configuration says: standard or yarn-mscale
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    pub softmax_scale: Option<SoftmaxScalePolicy>,
    /// List every tensor, not one line for those that differ in a number only
    #[arg(long)]
    pub all: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A configuration that cannot be used, or a malformed header.
pub fn run(arguments: &InspectArguments) -> Result<()> {
    let options = ConfigOptions { softmax_scale: arguments.softmax_scale };
    let (config, inspection) = match (&arguments.preset, &arguments.path) {
        (Some(name), _) => {
            let config = ConfigFile::preset(name, &options)?;
            let inspection = inspect::of_config(&config);
            (config, inspection)
        }
        (None, Some(path)) => {
            if !path.exists() {
                return Err(Error::input(
                    format!("{}: there is no such file or folder", path.display()),
                    "give a checkpoint folder, a config.json or a params.json, or --preset NAME",
                ));
            }
            (ConfigFile::read(path, &options)?, inspect::inspect(path, &options)?)
        }
        (None, None) => unreachable!("clap requires one of the two"),
    };
    if arguments.json {
        return stdout::print_json(&inspection);
    }
    stdout::print(&describe(&config, &inspection, arguments.all))
}

/// The report for people.
fn describe(file: &ConfigFile, inspection: &Inspection, all: bool) -> String {
    let mut text = String::new();
    section(&mut text, &file.path.display().to_string(), &overview(file, inspection));
    section(&mut text, "decoder", &decoder(&file.config));
    section(&mut text, "rotary embedding", &rope(&file.config));
    if let Some(rows) = vision(&file.config) {
        section(&mut text, "vision", &rows);
    }
    section(&mut text, "memory (activations come on top)", &memory(inspection));
    if !inspection.dtypes.is_empty() {
        let total: u64 = inspection.dtypes.values().sum();
        let row = |(name, &bytes): (&&str, &u64)| {
            let share = 100.0 * bytes as f64 / total.max(1) as f64;
            ((*name).to_owned(), format!("{:>9}  {share:5.1} %", format::bytes(bytes)))
        };
        section(&mut text, "stored formats", &inspection.dtypes.iter().map(row).collect::<Vec<_>>());
    }
    tensor_table(&mut text, &inspection.table, all);
    for warning in &inspection.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}

type Rows = Vec<(String, String)>;

fn section(text: &mut String, title: &str, rows: &[(String, String)]) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let _ = writeln!(text, "{title}");
    for (name, value) in rows {
        let _ = writeln!(text, "  {name:width$}  {value}");
    }
    text.push('\n');
}

fn row(name: &str, value: impl ToString) -> (String, String) {
    (name.to_owned(), value.to_string())
}

fn overview(file: &ConfigFile, inspection: &Inspection) -> Rows {
    let kind = match inspection.model_type {
        "mistral3" => "mistral3 (a mistral4 decoder behind a Pixtral tower)",
        other => other,
    };
    let counted = |n: u64| format!("{} ({})", format::grouped(n), format::count(n));
    let scale = &inspection.softmax_scale;
    let mut rows = vec![
        row("model type", kind),
        row(
            "form",
            match file.form {
                ConfigForm::Hf => "Hugging Face",
                ConfigForm::Native => "Mistral's own",
            },
        ),
        row("parameters", counted(inspection.total_parameters)),
        row(
            "active a token",
            format!(
                "{}: all but the embedding table and the experts a token is not sent to",
                counted(inspection.active_parameters)
            ),
        ),
        row("softmax scale", format!("{:.7} ({}): {}", scale.value, scale.policy, scale.reason)),
    ];
    if let Some(quantization) = &file.quantization {
        rows.push(row("quantization", quantized(quantization)));
    }
    rows
}

fn quantized(quantization: &Quantization) -> String {
    let group = |group: &PackedGroup| {
        let size = match group.group_size {
            Some(size) => format!("groups of {size}"),
            None => "one scale a row".to_owned(),
        };
        format!("int{}, {size}{}", group.bits, if group.symmetric { "" } else { ", asymmetric" })
    };
    match quantization {
        Quantization::Fp8(fp8) => match fp8.weight_block_size {
            Some((rows, columns)) => format!("FP8 (e4m3), blocks of {rows}x{columns}"),
            None => "FP8 (e4m3), one scale a weight or expert".to_owned(),
        },
        Quantization::Packed(groups) => groups.iter().map(group).collect::<Vec<_>>().join("; "),
    }
}

fn decoder(config: &Config) -> Rows {
    let text = &config.text;
    let dense = match text.first_k_dense_replace {
        0 => String::new(),
        n => format!(", the first {n} dense (width {})", text.intermediate_size),
    };
    let groups = match text.n_group {
        1 => String::new(),
        n => format!(", chosen from {} of {n} groups", text.topk_group),
    };
    vec![
        row("layers", format!("{}{dense}", text.num_hidden_layers)),
        row("hidden size", text.hidden_size),
        row("vocabulary", text.vocab_size),
        row(
            "attention",
            format!(
                "{} heads of {} (nope) + {} (rope), values of {}",
                text.num_attention_heads, text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim
            ),
        ),
        row(
            "latent ranks",
            format!(
                "query {}, key and value {}",
                text.q_lora_rank.map_or_else(|| "none".to_owned(), |rank| rank.to_string()),
                text.kv_lora_rank
            ),
        ),
        row(
            "experts",
            format!(
                "{} routed of width {}, {} a token{groups}; {} shared",
                text.n_routed_experts,
                text.moe_intermediate_size,
                text.num_experts_per_tok,
                text.n_shared_experts
            ),
        ),
        row("activation", text.hidden_act.name()),
    ]
}

fn rope(config: &Config) -> Rows {
    let text = &config.text;
    let mut rows =
        vec![row("theta", text.rope.rope_theta), row("longest position", text.max_position_embeddings)];
    rows.push(match &text.rope.yarn {
        None => row("extension", "none"),
        Some(yarn) => row(
            "extension",
            format!(
                "YaRN, factor {} over {}, cos and sin times {:.6}",
                yarn.factor, yarn.original_max_position_embeddings, yarn.attention_factor
            ),
        ),
    });
    rows.push(match text.rope.llama_4_scaling {
        None => row("query scaling", "none"),
        Some((beta, original)) => {
            row("query scaling", format!("1 + {beta} ln(1 + floor(position / {original}))"))
        }
    });
    rows
}

fn vision(config: &Config) -> Option<Rows> {
    let vision = config.vision.as_ref()?;
    let tower = &vision.vision_config;
    Some(vec![
        row("tower", format!("{} layers of width {}", tower.num_hidden_layers, tower.hidden_size)),
        row(
            "images",
            format!(
                "patches of {} pixels, {}x{} to a token, sides up to {}",
                tower.patch_size, vision.spatial_merge_size, vision.spatial_merge_size, tower.image_size
            ),
        ),
        row("image token", vision.image_token_index),
        row("feature layer", format!("{} of {}", vision.vision_feature_layer, tower.num_hidden_layers)),
    ])
}

fn memory(inspection: &Inspection) -> Rows {
    let memory = &inspection.memory;
    let mut rows = Vec::new();
    if !inspection.dtypes.is_empty() {
        rows.push(row("inference, as stored", format::bytes(memory.inference_as_stored)));
    }
    rows.extend([
        row("inference, bf16", format::bytes(memory.inference_bf16)),
        row(
            "latent cache, bf16",
            format!(
                "{} a token, {} for 32 768",
                format::bytes(memory.cache_per_token),
                format::bytes(memory.cache_per_token * 32_768)
            ),
        ),
        row("LoRA (rank 16, bf16 weights)", format::bytes(memory.lora)),
        row("full training (f32 state)", format::bytes(memory.full_training)),
    ]);
    rows
}

/// Tensors whose keys differ in numbers only, and that agree in shape and format.
struct Group {
    pattern: String,
    shape: String,
    dtype: String,
    count: usize,
}

fn tensor_table(text: &mut String, table: &[TensorRow], all: bool) {
    let mut groups: Vec<Group> = Vec::new();
    let mut known = std::collections::HashMap::new();
    for tensor in table {
        let pattern = if all { tensor.key.clone() } else { pattern(&tensor.key) };
        let shape = format!("{:?}", tensor.shape);
        let dtype = tensor.dtype.map_or("", |dtype| dtype.name()).to_owned();
        let place = *known.entry((pattern.clone(), shape.clone(), dtype.clone())).or_insert_with(|| {
            groups.push(Group { pattern, shape, dtype, count: 0 });
            groups.len() - 1
        });
        groups[place].count += 1;
    }
    let width = groups.iter().map(|group| group.pattern.len()).max().unwrap_or(0);
    let shapes = groups.iter().map(|group| group.shape.len()).max().unwrap_or(0);
    let note =
        if all || groups.len() == table.len() { "" } else { ", * stands for a number; --all lists each" };
    let _ = writeln!(text, "tensors ({}{note})", table.len());
    for Group { pattern, shape, dtype, count } in &groups {
        let times = if *count > 1 { format!("x {count}") } else { String::new() };
        let line = format!("  {pattern:width$}  {shape:shapes$}  {dtype:7} {times}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text.push('\n');
}

/// A key with its numbers replaced by `*`.
fn pattern(key: &str) -> String {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    key.split('.').map(|part| if number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_preset_is_described() {
        let file = ConfigFile::preset("mistral-small-4-119b", &ConfigOptions::default()).unwrap();
        let text = describe(&file, &inspect::of_config(&file), false);
        assert!(text.contains("0.0883883 (standard)"), "{text}");
        assert!(text.contains("model.layers.*.mlp.experts.gate_up_proj"), "{text}");
        assert!(text.lines().count() < 90, "{text}");
    }
}
