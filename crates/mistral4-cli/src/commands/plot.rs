//! `mistral4 plot`: pictures of a run.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mistral4_train::plot::{Curve, plot_run};

use crate::error::Result;
use crate::stdout;

/// Arguments of `mistral4 plot`.
#[derive(Debug, Args)]
#[command(after_help = "\
  mistral4 plot checkpoints --output run.png
  mistral4 plot checkpoints --what load --output experts.svg")]
pub struct PlotArguments {
    /// Folder of the run: the recipe's checkpoint.checkpoint_dir
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// File to write, SVG or PNG by its ending; by default run.svg in the folder of the run
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// What to draw, from top to bottom: loss, lr, throughput, load; by default all
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',')]
    pub what: Vec<What>,
}

/// A part of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct What(pub Curve);

impl ValueEnum for What {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [What; 4] =
            [What(Curve::ALL[0].1), What(Curve::ALL[1].1), What(Curve::ALL[2].1), What(Curve::ALL[3].1)];
        &ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        let (name, _) = Curve::ALL.into_iter().find(|(_, curve)| *curve == self.0)?;
        Some(name.into())
    }
}

/// Runs the command.
///
/// # Errors
/// A folder without a run, and a file that cannot be written.
pub fn run(arguments: &PlotArguments) -> Result<()> {
    let output = arguments.output.clone().unwrap_or_else(|| arguments.run.join("run.svg"));
    let curves: Vec<Curve> = match arguments.what.as_slice() {
        [] => Curve::ALL.map(|(_, curve)| curve).to_vec(),
        what => what.iter().map(|what| what.0).collect(),
    };
    plot_run(&arguments.run, &curves, &output)?;
    stdout::print(&format!("{}\n", output.display()))
}
