//! `mistral4 bench`: speed and memory with random weights.

mod work;

use std::path::PathBuf;
use std::time::Instant;

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use mistral4::Mistral4;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{InitialSource, ParameterSource, QuantizedSource};
use mistral4_checkpoint::config::ConfigOptions;
use mistral4_checkpoint::weights::Bits;
use mistral4_train::recipe::StateDtype;
use serde::Serialize;

use self::work::Work;
use super::init::read_config;
use crate::arguments::{ComputeArguments, FloatDType};
use crate::error::{Error, Result};
use crate::quantize::{GroupArguments, QuantizedFormat};
use crate::{format, stdout};

/// Arguments of `mistral4 bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Random weights, random tokens, text only. One pass to warm up, then the median of --repetitions.
  prefill  a pass over B rows of N tokens into an empty cache, logits of the last position
  decode   --new-tokens steps of one token a row after a prompt of N; the prompt is not timed
  train    forward, backward and AdamW over B rows of N tokens

Model FLOPs of a token: 2 for each weight that it is multiplied with (of the routed experts, those
it is sent to; of the head, where there are logits), and in each layer 2 x heads x (query-key width
+ value width) for each position it sees. Training counts three times that.
Weight bytes of a decode step: every weight once, of the routed experts those that B tokens reach
when routing is even.")]
pub struct BenchArguments {
    /// Configuration of the model: a config.json or params.json
    #[arg(long, value_name = "FILE", conflicts_with = "preset")]
    pub config: Option<PathBuf>,
    /// A configuration that comes with the program: tiny, small, medium
    #[arg(long, value_name = "NAME", default_value = "small")]
    pub preset: String,
    /// What to measure
    #[arg(long, value_enum, default_value = "prefill")]
    pub mode: Mode,
    /// Tokens of a row (in decode: of the prompt)
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// Rows
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Number format: f32 or bf16, or int8, int4 or fp8 for weights beside bf16 activations
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: BenchDType,
    /// How integers are grouped.
    #[command(flatten)]
    pub groups: GroupArguments,
    /// Number format of AdamW's moments in train
    #[arg(long, value_enum, default_value = "f32")]
    pub state_dtype: StateFormat,
    /// Train bf16 parameters without a copy in f32, their steps rounded at random
    #[arg(long)]
    pub no_master_weights: bool,
    /// Move each layer's parameters as soon as its gradient is final in train
    #[arg(long)]
    pub optimizer_in_bwd: bool,
    /// Steps of decode
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: u32,
    /// Measured repetitions
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// Seed of weights and tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArguments,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Number formats to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchDType {
    /// Weights and activations in one format.
    Float(FloatDType),
    /// Quantised weights, activations in bf16.
    Quantized(QuantizedFormat),
}

impl BenchDType {
    fn name(self) -> &'static str {
        match self {
            BenchDType::Float(dtype) => dtype.name(),
            BenchDType::Quantized(format) => format.name(),
        }
    }

    /// Format of activations and dense weights.
    fn float(self) -> FloatDType {
        match self {
            BenchDType::Float(dtype) => dtype,
            BenchDType::Quantized(_) => FloatDType::Bf16,
        }
    }

    fn quantized(self) -> Option<QuantizedFormat> {
        match self {
            BenchDType::Float(_) => None,
            BenchDType::Quantized(format) => Some(format),
        }
    }
}

impl ValueEnum for BenchDType {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            BenchDType::Float(FloatDType::F32),
            BenchDType::Float(FloatDType::Bf16),
            BenchDType::Quantized(QuantizedFormat::Int8),
            BenchDType::Quantized(QuantizedFormat::Int4),
            BenchDType::Quantized(QuantizedFormat::Fp8),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// Formats of AdamW's moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum StateFormat {
    /// 32-bit floats.
    F32,
    /// Brain floats, rounded at random.
    Bf16,
    /// 8 bits, scaled by blocks.
    #[serde(rename = "8bit")]
    #[value(name = "8bit")]
    EightBit,
}

impl StateFormat {
    fn moments(self) -> StateDtype {
        match self {
            StateFormat::F32 => StateDtype::F32,
            StateFormat::Bf16 => StateDtype::Bf16,
            StateFormat::EightBit => StateDtype::Int8,
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Reading a prompt.
    Prefill,
    /// Writing an answer.
    Decode,
    /// Optimizer steps.
    Train,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Prefill => "prefill",
            Mode::Decode => "decode",
            Mode::Train => "train",
        }
    }
}

impl ValueEnum for Mode {
    fn value_variants<'a>() -> &'a [Self] {
        &[Mode::Prefill, Mode::Decode, Mode::Train]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// The result, with the keys of `--json`.
#[derive(Debug, Serialize)]
pub struct Measurement {
    /// Name of the preset, or the configuration's file.
    pub preset: String,
    /// What was measured.
    pub mode: Mode,
    /// Number format.
    pub dtype: &'static str,
    /// Backend.
    pub device: String,
    /// Threads.
    pub threads: usize,
    /// Tokens of a row.
    pub tokens: u32,
    /// Rows.
    pub batch: u32,
    /// Tokens read, written or learned a second, over all rows.
    pub tokens_per_s: f64,
    /// Useful floating-point operations a second.
    pub model_flops_per_s: f64,
    /// Bytes of weights that decoding has to read, a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_bytes_per_s: Option<f64>,
    /// Most memory the process has held; absent where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
    /// Measured repetitions.
    pub repetitions: u32,
    /// Median duration of one.
    pub median_s: f64,
    /// Shortest and longest duration.
    pub range_s: [f64; 2],
    /// Number format of AdamW's moments in train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dtype: Option<StateFormat>,
    /// Whether bf16 parameters have a copy in f32 in train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub master_weights: Option<bool>,
    /// Whether each layer's parameters move as soon as their gradient is final in train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer_in_bwd: Option<bool>,
    /// Tokens written a row in decode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_tokens: Option<u32>,
    /// What this machine's CPU can do; absent on other devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuPeaks>,
}

/// What a CPU can do, measured beside the model.
#[derive(Debug, Clone, Serialize)]
pub struct CpuPeaks {
    /// Instruction set of the kernels.
    pub isa: String,
    /// Floating-point operations a second of matrix products in the number format, operands in the nearest cache.
    pub flops_per_s: f64,
    /// Bytes a second that all threads read from memory.
    pub read_bytes_per_s: f64,
}

impl CpuPeaks {
    fn measure(dtype: FloatDType) -> Self {
        let gflops = match dtype {
            FloatDType::F32 => mistral4_kernels::peak_f32_gflops(),
            FloatDType::Bf16 => mistral4_kernels::peak_bf16_gflops(),
        };
        CpuPeaks {
            isa: format!("{:?}", mistral4_kernels::Isa::active()),
            flops_per_s: gflops * 1e9,
            read_bytes_per_s: mistral4_kernels::read_bandwidth() * 1e9,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// A configuration that cannot be used.
pub fn run(arguments: &BenchArguments) -> Result<()> {
    let result = measure(arguments)?;
    if arguments.json { stdout::print_json(&result) } else { stdout::print(&describe(&result)) }
}

/// Measures.
///
/// # Errors
/// A configuration that cannot be used.
pub fn measure(arguments: &BenchArguments) -> Result<Measurement> {
    let quantization = arguments.groups.resolve(arguments.dtype.quantized(), "--dtype", Some(Bits::Eight))?;
    if quantization.is_some() && arguments.mode == Mode::Train {
        return Err(Error::input(
            format!(
                "--mode train with --dtype {}: quantised weights are not trained",
                arguments.dtype.name()
            ),
            "use f32 or bf16, or another mode",
        ));
    }
    let preset = arguments.config.is_none().then_some(arguments.preset.as_str());
    let file = read_config(arguments.config.as_ref(), preset, &ConfigOptions::default())?.text_only();
    let device = arguments.compute.device.open()?;
    let dtype = arguments.dtype.float().dtype();
    eprintln!("drawing random weights");
    let source = InitialSource::new(&file.config, arguments.seed, dtype);
    let quantized = quantization.map(|how| QuantizedSource::new(&source, &file.config, how));
    let source: &dyn ParameterSource = quantized.as_ref().map_or(&source, |quantized| quantized);
    let model = Mistral4::new(&file.config, MoeOptions::default(), source, &device)?;
    let model = if arguments.mode == Mode::Train { model } else { model.pack() };
    let work = Work::new(arguments, &file.config, quantization);
    let mut runner = work.runner(model, device);
    let mut durations = Vec::new();
    for repetition in 0..=arguments.repetitions {
        runner.prepare()?;
        let begin = Instant::now();
        runner.run()?;
        let seconds = begin.elapsed().as_secs_f64();
        let label = match repetition {
            0 => "warm-up".to_owned(),
            n => format!("{n} of {}", arguments.repetitions),
        };
        eprintln!("{label}: {}", format::seconds(seconds));
        if repetition > 0 {
            durations.push(seconds);
        }
    }
    durations.sort_by(f64::total_cmp);
    let median = median(&durations);
    let is_decode = arguments.mode == Mode::Decode;
    Ok(Measurement {
        preset: match &arguments.config {
            Some(path) => path.display().to_string(),
            None => arguments.preset.clone(),
        },
        mode: arguments.mode,
        dtype: arguments.dtype.name(),
        device: arguments.compute.device.to_string(),
        threads: rayon::current_num_threads(),
        tokens: arguments.tokens,
        batch: arguments.batch,
        tokens_per_s: work.tokens() as f64 / median,
        model_flops_per_s: work.flops() / median,
        weight_bytes_per_s: is_decode.then(|| work.weight_bytes() / median),
        peak_rss_bytes: peak_rss(),
        repetitions: arguments.repetitions,
        median_s: median,
        range_s: [durations[0], durations[durations.len() - 1]],
        state_dtype: (arguments.mode == Mode::Train).then_some(arguments.state_dtype),
        master_weights: (arguments.mode == Mode::Train).then_some(!arguments.no_master_weights),
        optimizer_in_bwd: (arguments.mode == Mode::Train).then_some(arguments.optimizer_in_bwd),
        new_tokens: is_decode.then_some(arguments.new_tokens),
        // After the memory was read off, since measuring takes some.
        cpu: arguments.compute.device.is_cpu().then(|| CpuPeaks::measure(arguments.dtype.float())),
    })
}

/// Of sorted values.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

/// The process's largest resident memory, as Linux counts it.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn describe(result: &Measurement) -> String {
    let Measurement { preset, mode, dtype, device, threads, tokens, batch, .. } = result;
    let mode = mode.name();
    let threads = if *threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
    let mut text = format!("{preset}, {mode}, {dtype} on {device} ({threads}), {batch} x {tokens} tokens\n");
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:14}  {value}\n"));
    line(
        "time",
        format!(
            "{} (median of {}, {} to {})",
            format::seconds(result.median_s),
            result.repetitions,
            format::seconds(result.range_s[0]),
            format::seconds(result.range_s[1])
        ),
    );
    line("speed", format!("{:.1} tokens/s", result.tokens_per_s));
    let share = |value: f64, peak: Option<f64>| match peak {
        Some(peak) => {
            format!(" ({:.0} % of this CPU's measured {})", 100.0 * value / peak, format::rate(peak))
        }
        None => String::new(),
    };
    let flops = result.model_flops_per_s;
    let most = result.cpu.as_ref().map(|cpu| cpu.flops_per_s);
    line("model FLOPs", format!("{}FLOP/s{}", format::rate(flops), share(flops, most)));
    if let Some(bytes) = result.weight_bytes_per_s {
        let most = result.cpu.as_ref().map(|cpu| cpu.read_bytes_per_s);
        line("weights read", format!("{}B/s{}", format::rate(bytes), share(bytes, most)));
    }
    if let Some(cpu) = &result.cpu {
        line("instructions", cpu.isa.clone());
    }
    if let Some(bytes) = result.peak_rss_bytes {
        line("peak memory", format::bytes(bytes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_lies_between() {
        assert_eq!(median(&[1.0, 2.0, 4.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), 3.0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peak_memory_is_read() {
        assert!(peak_rss().unwrap() > 1 << 20);
    }
}
