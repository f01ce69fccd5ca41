//! `mistral4 init`: a checkpoint with random weights.

use std::path::PathBuf;

use clap::Args;
use mistral4_checkpoint::config::{ConfigFile, ConfigForm, ConfigOptions};
use mistral4_checkpoint::initial_tensor;
use mistral4_checkpoint::weights::{self, HostTensor, SaveDType, SaveOptions};

use crate::commands::convert::{parse_save_dtype, report_save};
use crate::error::Result;
use crate::progress::Progress;

/// Arguments of `mistral4 init`.
#[derive(Debug, Args)]
pub struct InitArguments {
    /// Configuration of the model: a config.json or params.json
    #[arg(long, value_name = "CONFIG.json", required_unless_present = "preset", conflicts_with = "preset")]
    pub config: Option<PathBuf>,
    /// A configuration that comes with the program: tiny, small, medium, mistral-small-4-119b
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the values; the same seed gives the same values on any machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Number format of the weights: f32, bf16 or fp8
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = parse_save_dtype)]
    pub dtype: SaveDType,
}

/// A configuration by file or by the name of a preset.
pub(super) fn read_config(
    config: Option<&PathBuf>,
    preset: Option<&str>,
    options: &ConfigOptions,
) -> Result<ConfigFile> {
    match (preset, config) {
        (Some(name), _) => Ok(ConfigFile::preset(name, options)?),
        (None, Some(path)) => Ok(ConfigFile::read(path, options)?),
        (None, None) => unreachable!("clap requires one of the two"),
    }
}

/// Runs the command.
///
/// # Errors
/// A configuration that cannot be used, or a folder that cannot be written.
pub fn run(arguments: &InitArguments) -> Result<()> {
    let options = ConfigOptions::default();
    let file = read_config(arguments.config.as_ref(), arguments.preset.as_deref(), &options)?;
    for warning in &file.warnings {
        eprintln!("warning: {warning}");
    }
    let tensors = weights::names::tensors(&file.config).len();
    let progress = Progress::new("writing", tensors as u64);
    let carry_from = arguments.config.as_ref().and_then(|path| path.parent());
    let save = SaveOptions { dtype: arguments.dtype, form: ConfigForm::Hf, carry_from, ..Default::default() };
    let report = weights::save(&arguments.out, &file, &save, |spec| {
        let values = initial_tensor(spec, &file.config, arguments.seed);
        progress.advance(1);
        Ok::<_, mistral4_checkpoint::Error>(HostTensor::f32(spec.shape.clone(), values))
    })?;
    drop(progress);
    report_save(&report, &arguments.out)
}
