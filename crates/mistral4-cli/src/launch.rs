//! Many ranks: starting them with `mpirun`, and being one of them.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mistral4_train::parallel::Communicator;

use crate::error::{Error, Result, catch_panics};

/// Variables with the number of ranks, of all and on this machine, that Open MPI, MPICH and Slurm set.
const RANKS: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];
const LOCAL_RANKS: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"];
const LOCAL_RANK: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];

/// A rank that fails leaves the first one this long to say the same of itself.
const FIRST_SPEAKS: Duration = Duration::from_secs(5);

/// Runs this program with `arguments` on `ranks` ranks, each with its share of the cores, and waits for them.
///
/// # Errors
/// A program without MPI, a missing `mpirun`, and ranks that failed: what they say has been shown then.
pub(crate) fn start(ranks: u16, arguments: Vec<OsString>, threads: Option<u16>) -> Result<()> {
    if cfg!(not(feature = "mpi")) {
        return Err(without_mpi(format!("--nproc {ranks} needs MPI, which this program was built without")));
    }
    let program = std::env::current_exe().map_err(|error| {
        Error::failed(format!("cannot find this program: {error}"), "start it by its path")
    })?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.map_or((cores / usize::from(ranks)).max(1), usize::from);
    let mut command = Command::new("mpirun");
    command
        .args(["-n", &ranks.to_string(), "--oversubscribe", "--bind-to", "none"])
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .arg(program)
        .args(arguments)
        .args(["--threads", &threads.to_string()])
        .stdin(Stdio::null())
        // Ctrl-C reaches this process alone, which passes it on once.
        .process_group(0);
    let mut child = command.spawn().map_err(|error| {
        Error::input(
            format!("--nproc {ranks} needs mpirun, which cannot be started: {error}"),
            "install Open MPI (Debian: openmpi-bin), or leave --nproc out",
        )
    })?;
    let launcher = child.id();
    let asked = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        // USR1 is handed to the ranks, which save; TERM ends them at once.
        let signal = if asked.swap(true, Ordering::Relaxed) { "-TERM" } else { "-USR1" };
        // Should it fail, the launcher has ended by itself.
        let _ = Command::new("kill").args([signal, &launcher.to_string()]).status();
    })
    .map_err(|error| {
        Error::failed(format!("cannot watch for Ctrl-C: {error}"), "this is a defect; please report it")
    })?;
    let status = child.wait().map_err(|error| {
        Error::failed(format!("cannot wait for mpirun: {error}"), "this is a defect; please report it")
    })?;
    outcome(status)
}

/// What the end of `mpirun` says of the run.
fn outcome(status: ExitStatus) -> Result<()> {
    let hint = "the lines above say which rank failed and why";
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(2), _) => Err(Error::input("the ranks refused their input", hint)),
        (Some(code), _) if code > 128 => Err(Error::failed(
            format!("a rank was ended by signal {}, and the others with it", code - 128),
            "start the run again to go on from its last checkpoint; signal 9 often means that memory ran out",
        )),
        (Some(code), _) => Err(Error::failed(format!("the ranks ended with code {code}"), hint)),
        (None, signal) => {
            Err(Error::failed(format!("mpirun was ended by signal {}", signal.unwrap_or_default()), hint))
        }
    }
}

/// The ranks that this process is one of; one alone if nobody started it as a rank.
///
/// # Errors
/// Ranks without an MPI that can be used.
pub(crate) fn join() -> Result<Communicator> {
    match number(&RANKS) {
        Some(ranks) if ranks > 1 => world(ranks),
        _ => Ok(Communicator::single()),
    }
}

#[cfg(feature = "mpi")]
fn world(_: usize) -> Result<Communicator> {
    mistral4_train::parallel::communicator::mpi::world().ok_or_else(|| {
        Error::input(
            "this MPI does not serve several threads of a rank (MPI_THREAD_MULTIPLE)",
            "use an MPI that was built with thread support, such as Debian's Open MPI",
        )
    })
}

#[cfg(not(feature = "mpi"))]
fn world(ranks: usize) -> Result<Communicator> {
    Err(without_mpi(format!("this is one of {ranks} ranks, and the program was built without MPI")))
}

fn without_mpi(message: String) -> Error {
    Error::input(message, "build it with `cargo build --release -p mistral4-cli --features mpi`")
}

/// Threads for a rank that was not told how many: its share of the cores. `None` for a process that is no rank, or that
/// the environment tells.
pub(crate) fn threads_of_a_rank() -> Option<usize> {
    let local = number(&LOCAL_RANKS).filter(|&local| local > 1)?;
    if std::env::var_os("RAYON_NUM_THREADS").is_some() {
        return None;
    }
    // A rank may be bound to some of the cores already.
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = cores().unwrap_or(allowed);
    Some(allowed.min(cores / local).max(1))
}

/// This rank's number among those of its machine.
pub(crate) fn local_rank() -> usize {
    number(&LOCAL_RANK).unwrap_or(0)
}

/// Cores of the machine, where Linux tells.
fn cores() -> Option<usize> {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.trim().parse::<usize>().ok()? + 1 - first.trim().parse::<usize>().ok()?)
    };
    online.split(',').map(count).sum()
}

fn number(variables: &[&str]) -> Option<usize> {
    variables.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// Runs a rank's work. A rank that fails says so and ends all ranks, since the others would wait for it.
///
/// # Errors
/// The work's own, for a single rank.
pub(crate) fn together<T>(world: &Communicator, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut done = None;
    let result = catch_panics(|| {
        done = Some(work()?);
        Ok(())
    });
    match (result, done) {
        (Ok(()), Some(done)) => Ok(done),
        (Ok(()), None) => unreachable!("the work is done"),
        (Err(error), _) if world.size() == 1 => Err(error),
        (Err(error), _) => {
            let error = if world.is_first() {
                error
            } else {
                std::thread::sleep(FIRST_SPEAKS);
                error.context(format!("rank {}", world.rank()))
            };
            eprintln!("{error}");
            world.abort(i32::from(error.kind().exit_code()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_keep_their_meaning() {
        let code = |code: i32| outcome(ExitStatus::from_raw(code << 8)).err().map(|e| e.kind().exit_code());
        assert_eq!([code(0), code(1), code(2), code(137)], [None, Some(1), Some(2), Some(1)]);
        assert!(outcome(ExitStatus::from_raw(137 << 8)).unwrap_err().to_string().contains("signal 9"));
    }
}
