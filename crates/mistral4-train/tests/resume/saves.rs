//! Saves that fail: what is there before them stays.

use std::io::{Error as IoError, ErrorKind};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use mistral4_train::Error;
use mistral4_train::checkpoint::{Disk, Operation};
use mistral4_train::trainer::{self, Host};

use crate::place::{Place, assert_same, copy, files, train_until};

/// How a disk fails at one operation.
#[derive(Debug, Clone, Copy)]
enum Failure {
    /// That one operation fails, as on a full disk.
    Once,
    /// So does all that follows, as in a process that was killed.
    FromThenOn,
}

/// One rank that saves to `disk`.
fn on(disk: Disk) -> Host {
    Host { disk, ..Host::single(&Device::flex()) }
}

/// A disk that fails at the operation `at`, and the operations that it was asked for.
fn failing(at: usize, failure: Failure) -> (Disk, Arc<Mutex<Vec<Operation>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let disk = Disk::gated(move |operation, _| {
        let mut log = log.lock().unwrap();
        log.push(operation);
        let number = log.len() - 1;
        match failure {
            Failure::Once if number == at => Err(ErrorKind::StorageFull.into()),
            Failure::FromThenOn if number >= at => Err(IoError::other("killed")),
            _ => Ok(()),
        }
    });
    (disk, asked)
}

#[test]
fn a_save_that_fails_at_any_operation_leaves_the_checkpoint_before_it() {
    let place = Place::new();
    let more = [("step_scheduler.max_steps", "6"), ("checkpoint.max_recent_checkpoints", "1")];
    place.train("whole", &more).unwrap();
    train_until(&place.recipe("before", &more), 3).unwrap();
    let before = std::fs::read_link(place.path("before/LATEST")).unwrap();
    let stop = AtomicBool::new(false);
    let recipe = place.recipe("cut", &more);
    let attempt = |disk| trainer::run_on(on(disk), &recipe, &stop, &mut |_| {}).map_err(Box::new);
    let again = || {
        let _ = std::fs::remove_dir_all(place.path("cut"));
        copy(&place.path("before"), &place.path("cut"));
    };
    again();
    let (disk, asked) = failing(usize::MAX, Failure::Once);
    attempt(disk).unwrap();
    let operations = asked.lock().unwrap().clone();
    assert!(operations.len() > 60, "{operations:?}");

    for (at, failure) in (0..operations.len()).flat_map(|at| [(at, Failure::Once), (at, Failure::FromThenOn)])
    {
        // Most operations are writes of one tensor after another: some of them stand for all where more is tried.
        let is_one_of_many = operations[at] == Operation::Write && !at.is_multiple_of(16);
        if is_one_of_many && matches!(failure, Failure::FromThenOn) {
            continue;
        }
        again();
        let error = attempt(failing(at, failure).0).err().unwrap_or_else(|| panic!("{failure:?} at {at}"));
        let Error::Write { path, .. } = &*error else { panic!("{failure:?} at {at}: {error}") };
        assert!(path.starts_with(place.path("cut")));
        let latest = place.path("cut").join(std::fs::read_link(place.path("cut/LATEST")).unwrap());
        assert!(latest.join("step_scheduler.json").is_file(), "{failure:?} at {at}: LATEST leads nowhere");
        if place.path("cut").join(&before).exists() {
            assert_eq!(files(&place.path("cut").join(&before)), files(&place.path("before").join(&before)));
        } else {
            assert_ne!(latest, place.path("cut").join(&before), "{failure:?} at {at}");
        }
        if matches!(failure, Failure::Once) {
            let left = std::fs::read_dir(place.path("cut")).unwrap();
            let partial = left
                .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".partial"));
            assert_eq!(partial.count(), 0, "{failure:?} at {at}: room is still taken");
        }
        if is_one_of_many {
            continue;
        }
        let resumed =
            place.train("cut", &more).unwrap_or_else(|error| panic!("{failure:?} at {at}: {error}"));
        assert_eq!(resumed.steps.len(), 6);
        assert_same(&place.path("cut"), &place.path("whole"));
        let names = std::fs::read_dir(place.path("cut")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let hidden: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        assert!(hidden.is_empty(), "{failure:?} at {at}: {hidden:?}");
    }
}

#[test]
fn a_full_disk_is_named_with_the_file() {
    let place = Place::new();
    let disk = Disk::gated(|operation, path| {
        let is_optimizer = path.ends_with("optim/exp_avg_sq.safetensors");
        if operation == Operation::Write && is_optimizer {
            Err(ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    });
    let recipe = place.recipe("run", &[]);
    let run = trainer::run_on(on(disk), &recipe, &AtomicBool::new(false), &mut |_| {});
    let error = run.err().unwrap();
    assert!(error.to_string().ends_with("exp_avg_sq.safetensors"), "{error}");
    let source = std::error::Error::source(&error).unwrap().downcast_ref::<IoError>().unwrap();
    assert_eq!(source.kind(), ErrorKind::StorageFull);
    let names = std::fs::read_dir(place.path("run")).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["expert_load.jsonl", "status.json", "training.jsonl", "validation.jsonl"]);
}
