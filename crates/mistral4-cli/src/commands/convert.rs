//! `mistral4 convert`: a checkpoint in another form or number format.

use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use mistral4_checkpoint::config::{ConfigForm, ConfigOptions, PackedGroup, Quantization};
use mistral4_checkpoint::weights::{
    self, Bits, Checkpoint, DType, SaveDType, SaveOptions, SaveReport, StoredDType, WeightFormat,
    WeightQuantization,
};

use crate::error::{Error, Result};
use crate::load::{model_folder, open_checkpoint};
use crate::quantize::{GroupArguments, QuantizedFormat};
use crate::{format, stdout};

/// Arguments of `mistral4 convert`.
#[derive(Debug, Args)]
pub struct ConvertArguments {
    /// Checkpoint folder, or an id of the Hugging Face hub
    #[arg(long, value_name = "SRC")]
    pub model: String,
    /// Folder to write
    #[arg(long, value_name = "DST")]
    pub out: PathBuf,
    /// Number format: f32, bf16, fp8, int8 or int4; by default the one in which the weights are stored
    #[arg(long, value_name = "DTYPE", value_parser = parse_convert_dtype)]
    pub dtype: Option<ConvertDType>,
    /// How integers are grouped; the output projection is not quantised unless asked for.
    #[command(flatten)]
    pub groups: GroupArguments,
    /// Form of the files: Hugging Face's (config.json) or Mistral's own (params.json)
    #[arg(long, value_enum, default_value = "hf")]
    pub format: Form,
    /// Most bytes of one weight file, as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    pub max_shard_size: u64,
}

/// Forms of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Hugging Face's: config.json and model*.safetensors
    Hf,
    /// Mistral's own: params.json and consolidated*.safetensors
    Native,
}

impl ValueEnum for Form {
    fn value_variants<'a>() -> &'a [Self] {
        &[Form::Hf, Form::Native]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Form::Hf => "hf",
            Form::Native => "native",
        }))
    }
}

pub(super) fn parse_save_dtype(text: &str) -> Result<SaveDType, String> {
    SaveDType::from_name(text).ok_or_else(|| "use f32, bf16 or fp8".to_owned())
}

/// Number formats to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvertDType {
    /// A format without groups.
    Save(SaveDType),
    /// Packed integers.
    Packed(QuantizedFormat),
}

fn parse_convert_dtype(text: &str) -> Result<ConvertDType, String> {
    match text {
        "int8" => Ok(ConvertDType::Packed(QuantizedFormat::Int8)),
        "int4" => Ok(ConvertDType::Packed(QuantizedFormat::Int4)),
        _ => SaveDType::from_name(text)
            .map(ConvertDType::Save)
            .ok_or_else(|| "use f32, bf16, fp8, int8 or int4".to_owned()),
    }
}

/// Reads `5GB`, `500 MB`, `1.5GiB` or a number of bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 7] = [
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("KiB", 1024.0),
        ("GB", 1e9),
        ("MB", 1e6),
        ("KB", 1e3),
        ("B", 1.0),
    ];
    let lower = text.to_ascii_lowercase();
    let (number, factor) = UNITS
        .iter()
        .find_map(|(unit, factor)| Some((lower.strip_suffix(&unit.to_ascii_lowercase())?, *factor)))
        .unwrap_or((&lower, 1.0));
    match number.trim().parse::<f64>() {
        Ok(value) if value * factor >= 1.0 && value * factor < u64::MAX as f64 => Ok((value * factor) as u64),
        _ => Err("use a size such as 5GB or 500MB".to_owned()),
    }
}

/// Runs the command.
///
/// # Errors
/// A checkpoint that cannot be used or written in this form, or a disk that fails.
pub fn run(arguments: &ConvertArguments) -> Result<()> {
    let source = model_folder(&arguments.model)?;
    if is_same_folder(&source, &arguments.out) {
        return Err(Error::input(
            format!("{}: source and destination are the same folder", source.display()),
            "write to another folder with --out",
        ));
    }
    let format = match arguments.dtype {
        Some(ConvertDType::Packed(format)) => Some(format),
        _ => None,
    };
    let quantization = arguments.groups.resolve(format, "--dtype", None)?;
    let checkpoint = open_checkpoint(&source, &ConfigOptions::default())?;
    let options = SaveOptions {
        dtype: match (quantization, arguments.dtype) {
            (Some(quantization), _) => SaveDType::Packed(quantization),
            (None, Some(ConvertDType::Save(dtype))) => dtype,
            (None, _) => stored(&checkpoint)?,
        },
        form: match arguments.format {
            Form::Hf => ConfigForm::Hf,
            Form::Native => ConfigForm::Native,
        },
        max_shard_size: arguments.max_shard_size,
        carry_from: None,
    };
    let report = weights::convert(&checkpoint, &arguments.out, &options)?;
    report_save(&report, &arguments.out)
}

/// The format in which most bytes are stored.
pub(super) fn stored(checkpoint: &Checkpoint) -> Result<SaveDType> {
    if let Some(Quantization::Packed(groups)) = &checkpoint.config_file().quantization {
        return stored_groups(groups);
    }
    let mut bytes = std::collections::BTreeMap::new();
    for (_, _, dtype, _, size) in checkpoint.stored() {
        *bytes.entry(dtype).or_insert(0usize) += size;
    }
    Ok(match bytes.into_iter().max_by_key(|&(_, size)| size).map(|(dtype, _)| dtype) {
        Some(StoredDType::F8E4M3) => SaveDType::Fp8,
        Some(StoredDType::F32 | StoredDType::F64) => SaveDType::Float(DType::F32),
        Some(StoredDType::F16) => SaveDType::Float(DType::F16),
        _ => SaveDType::Float(DType::BF16),
    })
}

/// The format of packed integers, if all are of one kind.
fn stored_groups(groups: &[PackedGroup]) -> Result<SaveDType> {
    match *groups {
        [PackedGroup { bits, group_size: Some(group_size), symmetric }] => {
            let bits = if bits == 4 { Bits::Four } else { Bits::Eight };
            let weights = WeightFormat::Int { bits, group_size, symmetric };
            Ok(SaveDType::Packed(WeightQuantization { weights, lm_head: None }))
        }
        _ => Err(Error::input(
            "the weights are integers of several kinds",
            "say with --dtype, --group-size and --quantize-lm-head what to write",
        )),
    }
}

pub(super) fn is_same_folder(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Says what was written.
pub(super) fn report_save(report: &SaveReport, folder: &Path) -> Result<()> {
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    let files = match report.files.len() {
        1 => "1 weight file".to_owned(),
        n => format!("{n} weight files"),
    };
    let size = format::bytes(report.total_size);
    stdout::print(&format!("wrote {files}, {size}, to {}\n", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("1.5 gib"), Ok(1_610_612_736));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "GB", "-1GB", "0", "5XB", "nan"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
