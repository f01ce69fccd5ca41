//! `mistral4 merge`: an adapter folded into the weights of its base.

use std::path::PathBuf;

use clap::Args;
use mistral4_checkpoint::adapter::{self, Adapter};
use mistral4_checkpoint::config::ConfigOptions;
use mistral4_checkpoint::weights::{DType, SaveDType, SaveOptions};

use super::convert::{is_same_folder, parse_save_dtype, report_save, stored};
use crate::error::{Error, Result};
use crate::load::{model_folder, open_checkpoint};

/// Arguments of `mistral4 merge`.
#[derive(Debug, Args)]
pub struct MergeArguments {
    /// Base model: a checkpoint folder, or an id of the Hugging Face hub
    #[arg(value_name = "BASE")]
    pub base: String,
    /// Folder of the adapter (adapter_config.json and adapter_model.safetensors)
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,
    /// Folder to write
    #[arg(long, alias = "out", value_name = "DIR")]
    pub output: PathBuf,
    /// Number format: f32, bf16 or fp8; by default the base's own, for a quantised base bf16
    #[arg(long, value_name = "DTYPE", value_parser = parse_save_dtype)]
    pub dtype: Option<SaveDType>,
}

/// Runs the command.
///
/// # Errors
/// A base or an adapter that cannot be used, adapters of another model, or a disk that fails.
pub fn run(arguments: &MergeArguments) -> Result<()> {
    let base = model_folder(&arguments.base)?;
    if is_same_folder(&base, &arguments.output) || is_same_folder(&arguments.adapter, &arguments.output) {
        return Err(Error::input(
            format!("{}: source and destination are the same folder", arguments.output.display()),
            "write to another folder with --output",
        ));
    }
    let checkpoint = open_checkpoint(&base, &ConfigOptions::default())?;
    let adapter = Adapter::open(&arguments.adapter, checkpoint.config())?;
    let dtype = match arguments.dtype {
        Some(dtype) => dtype,
        None => match stored(&checkpoint)? {
            SaveDType::Float(dtype) => SaveDType::Float(dtype),
            SaveDType::Fp8 | SaveDType::Packed(_) => SaveDType::Float(DType::BF16),
        },
    };
    let options = SaveOptions { dtype, ..SaveOptions::default() };
    let report = adapter::merge(&checkpoint, &adapter, &arguments.output, &options)?;
    report_save(&report, &arguments.output)
}
