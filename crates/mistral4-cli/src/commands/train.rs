//! `mistral4 train`: runs a recipe.

use std::ffi::OsString;
use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mistral4_train::checkpoint::Disk;
use mistral4_train::dashboard::Dashboard;
use mistral4_train::parallel::{Communicator, MeshShape, stop};
use mistral4_train::plan::Plan;
use mistral4_train::recipe::{Recipe, parse_overrides};
use mistral4_train::trainer::{self, Event, Host, Run};

use crate::arguments::ComputeArguments;
use crate::error::{Error, Result};
use crate::{curve, format, launch, stdout};

/// Arguments of `mistral4 train`.
#[derive(Debug, Args)]
#[command(
    override_usage = "mistral4 train [OPTIONS] RECIPE.yaml [--a.b.c value]...",
    after_help = "Other options after the recipe override its keys:
  mistral4 train recipe.yaml --step_scheduler.max_steps 100 --optimizer.lr=1e-4"
)]
pub struct TrainArguments {
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArguments,
    /// Show what each key of the recipe does here, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Serve a live page of the run to this machine, on port 6480 or the one given
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true, default_missing_value = "6480")]
    pub dashboard: Option<u16>,
    /// Train on N ranks of this machine, started with mpirun
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub nproc: Option<u16>,
    /// Recipe in NeMo AutoModel's section names
    #[arg(value_name = "RECIPE.yaml")]
    pub recipe: PathBuf,
    /// Overrides: `--a.b.c value`, `--a.b.c=value`, or `--a.b.c` for true
    #[arg(value_name = "OVERRIDES", trailing_var_arg = true, allow_hyphen_values = true)]
    pub overrides: Vec<String>,
}

/// Runs the command. Ctrl-C finishes the step under way, saves and leaves; a second one leaves at once.
///
/// # Errors
/// A recipe, model or data set that cannot be used; a loss that is no number; a disk that fails.
pub fn run(arguments: &TrainArguments, threads: Option<u16>) -> Result<()> {
    if let Some(ranks) = arguments.nproc.filter(|&ranks| ranks > 1 && !arguments.dry_run) {
        return launch::start(ranks, arguments.to_line(), threads);
    }
    let world = launch::join()?;
    launch::together(&world, || run_rank(arguments, &world))
}

fn run_rank(arguments: &TrainArguments, world: &Communicator) -> Result<()> {
    let recipe = Recipe::load(&arguments.recipe, &parse_overrides(&arguments.overrides)?)?;
    if arguments.dry_run && !world.is_first() {
        return Ok(());
    }
    if arguments.dry_run {
        let started = arguments.nproc.map(usize::from).or((world.size() > 1).then_some(world.size()));
        return dry_run(&recipe, started);
    }
    let device = arguments.compute.device.of_rank(launch::local_rank()).open()?;
    let follows = "finishing this step and saving; once more to leave at once";
    let interrupted = on_interrupt(if world.is_first() { follows } else { "" })?;
    if world.size() > 1 {
        stop::on_user_signal(Arc::clone(&interrupted)).map_err(|error| {
            Error::failed(format!("cannot watch for SIGUSR1: {error}"), "this is a defect; please report it")
        })?;
    }
    let folder = &recipe.checkpoint.checkpoint_dir;
    let dashboard = arguments.dashboard.filter(|_| world.is_first());
    let dashboard = dashboard.map(|port| Dashboard::start(folder, port)).transpose()?;
    if let Some(dashboard) = &dashboard {
        eprintln!("live page: {}", dashboard.url());
    }
    let mut watcher = Watcher::new(1);
    let host = Host { device, disk: Disk::default(), world: world.clone() };
    let run = trainer::run_on(host, &recipe, &interrupted, &mut |event| watcher.see(event))?;
    drop(watcher);
    if world.is_first() { summarise(&run) } else { Ok(()) }
}

/// Shows what a recipe does and takes, on the ranks that were asked for, or else on the fewest that it can run on.
///
/// What this machine lacks (ranks, data, a model) is told and is no error; settings that no machine could honour are.
fn dry_run(recipe: &Recipe, ranks: Option<usize>) -> Result<()> {
    stdout::print(&recipe.report.to_string())?;
    stdout::print(&recipe.describe_missing())?;
    let fewest = MeshShape::fewest_ranks(&recipe.distributed);
    let plan = Plan::new(recipe, ranks.unwrap_or(fewest));
    if let Ok(plan) = &plan {
        if ranks.is_none() && fewest > 1 {
            stdout::print(&format!(
                "ranks: {fewest}, the fewest that this recipe can run on; start them with --nproc {fewest} or mpirun\n"
            ))?;
        }
        stdout::print(&plan.to_string())?;
    }
    recipe.check_runnable()?;
    plan?;
    Ok(())
}

impl TrainArguments {
    /// The command line of one of the ranks.
    fn to_line(&self) -> Vec<OsString> {
        let device = self.compute.device.to_string();
        let mut line: Vec<OsString> = ["train", "--device", &device].map(OsString::from).to_vec();
        line.push(self.recipe.clone().into());
        line.extend(self.overrides.iter().map(OsString::from));
        line
    }
}

/// A flag that Ctrl-C and the termination signal set, saying `what` follows, if anything; a second one ends the process.
pub(super) fn on_interrupt(what: &'static str) -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::Relaxed) {
            std::process::exit(1);
        }
        if !what.is_empty() {
            eprintln!("\n{what}");
        }
    })
    .map_err(|error| {
        Error::failed(format!("cannot watch for Ctrl-C: {error}"), "this is a defect; please report it")
    })?;
    Ok(flag)
}

/// The loss curve, and where everything is.
pub(super) fn summarise(run: &Run) -> Result<()> {
    let losses: Vec<f64> = run.steps.iter().map(|step| step.loss).collect();
    let mut text = curve::draw("training loss over steps", &losses);
    text.push_str(&format!("picture of the loss: {}\n", run.picture.display()));
    match &run.checkpoint {
        Some(path) => text.push_str(&format!("checkpoint: {}\n", path.display())),
        None => text.push_str("no checkpoint was written (checkpoint.enabled is false)\n"),
    }
    if run.interrupted {
        text.push_str("the run was stopped early\n");
    }
    stdout::print(&text)
}

/// Shows a run: a bar on a terminal, with a line for what matters; else a line for every `every` steps.
pub(super) struct Watcher {
    every: usize,
    bar: Option<ProgressBar>,
    last_step: usize,
}

impl Watcher {
    pub(super) fn new(every: usize) -> Self {
        Watcher { every, bar: None, last_step: 0 }
    }

    pub(super) fn see(&mut self, event: Event<'_>) {
        match event {
            Event::Started { total_steps, parameters: (trained, all) } => {
                self.last_step = total_steps.saturating_sub(1);
                self.line(&format!(
                    "{total_steps} steps; training {} of {} parameters",
                    format::count(trained as u64),
                    format::count(all as u64)
                ));
                if stderr().is_terminal() {
                    let bar = ProgressBar::new(total_steps as u64);
                    let template = "[{bar:30}] {pos}/{len} {elapsed} (left {eta}) {msg}";
                    let style = ProgressStyle::with_template(template).expect("the template is valid");
                    bar.set_style(style.progress_chars("=> "));
                    self.bar = Some(bar);
                }
            }
            Event::Step(metrics) => match &self.bar {
                Some(bar) => {
                    bar.set_position(metrics.step as u64 + 1);
                    bar.set_message(format!("loss {:.4}, {:.0} tokens/s", metrics.loss, metrics.tps));
                }
                None if metrics.step.is_multiple_of(self.every) || metrics.step == self.last_step => {
                    eprintln!("{metrics}");
                }
                None => {}
            },
            Event::Validation { name, metrics } => self.line(&format!(
                "step {} | validation ({name}): loss {:.4} over {} tokens",
                metrics.step, metrics.val_loss, metrics.num_label_tokens
            )),
            Event::Saved(path) => self.line(&format!("saved {}", path.display())),
            Event::Note(text) => self.line(&format!("note: {text}")),
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
