//! Makes batches ahead of the step, in threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::loader::{DataRank, LoaderState, MadeStep, Skipped};
use super::step::{Made, MicroBatch, PlannedStep, Planner, SharedMaker};
use crate::error::Result;

/// One thread plans steps; workers make their batches. What is made waits in the order of the plan.
pub(super) struct Prefetcher {
    steps: Option<Receiver<Result<PendingStep>>>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

/// A step whose batches are made by the workers.
struct PendingStep {
    batches: Vec<Receiver<Result<Made>>>,
    rounds: usize,
    ends_epoch: bool,
    next: LoaderState,
    skipped: Skipped,
}

/// A micro-batch for the next free worker, and where the batch goes.
type Job = (MicroBatch, SyncSender<Result<Made>>);

impl Prefetcher {
    /// Starts the threads.
    ///
    /// # Panics
    /// When the system gives no thread.
    pub(super) fn start(maker: SharedMaker, planner: Box<dyn Planner>, rank: DataRank) -> Self {
        let options = &maker.options;
        let workers = options.num_workers;
        let ahead = workers * options.prefetch_factor.max(1);
        let of_a_step = (options.global_batch_size / (options.local_batch_size * rank.world)).max(1);
        let (to_workers, jobs) = sync_channel::<Job>(ahead);
        let (to_trainer, steps) = sync_channel(ahead.div_ceil(of_a_step));
        let (jobs, stop) = (Arc::new(Mutex::new(jobs)), Arc::new(AtomicBool::new(false)));
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            Builder::new().name(name.to_owned()).spawn(work).expect("the system gives a thread")
        };
        let mut threads = Vec::with_capacity(workers + 1);
        for _ in 0..workers {
            let (maker, jobs, stop) = (maker.clone(), jobs.clone(), stop.clone());
            threads.push(spawn("data-worker", Box::new(move || work(&maker, &jobs, &stop))));
        }
        let planning = stop.clone();
        threads.push(spawn(
            "data-planner",
            Box::new(move || plan(planner, &to_workers, &to_trainer, &planning)),
        ));
        Self { steps: Some(steps), threads, stop }
    }

    /// The next step, when all of its batches are made.
    ///
    /// # Errors
    /// What went wrong with it.
    ///
    /// # Panics
    /// When a thread panicked, and after an error of the plan, behind which there is nothing.
    pub(super) fn next_step(&mut self) -> Result<MadeStep> {
        const GONE: &str = "a thread that makes batches is gone";
        let steps = self.steps.as_ref().expect("it is taken when this is dropped");
        let PendingStep { batches, rounds, ends_epoch, next, skipped } = steps.recv().expect(GONE)?;
        let made = batches.into_iter().map(|batch| batch.recv().expect(GONE)).collect::<Result<Vec<_>>>()?;
        Ok(MadeStep { made, rounds, ends_epoch, next, skipped })
    }
}

impl Drop for Prefetcher {
    /// Ends the threads, each after the batch under way.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.steps = None;
        for thread in self.threads.drain(..) {
            // Its panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Hands out the plan until the trainer goes or an error ends it.
fn plan(
    mut planner: Box<dyn Planner>,
    to_workers: &SyncSender<Job>,
    to_trainer: &SyncSender<Result<PendingStep>>,
    stop: &AtomicBool,
) {
    loop {
        let step = planner.next_step();
        let failed = step.is_err();
        let pending = step.map(|step| {
            let PlannedStep { micro_batches, rounds, ends_epoch, next, skipped } = step;
            let batches = micro_batches.into_iter().map(|items| {
                let (made, batch) = sync_channel(1);
                // Workers end after this thread only, or when one panicked: the trainer then finds the batch missing.
                let _ = to_workers.send((items, made));
                batch
            });
            PendingStep { batches: batches.collect(), rounds, ends_epoch, next, skipped }
        });
        if to_trainer.send(pending).is_err() || failed || stop.load(Ordering::Relaxed) {
            return;
        }
    }
}

/// Makes batches until the plan ends.
fn work(maker: &SharedMaker, jobs: &Mutex<Receiver<Job>>, stop: &AtomicBool) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((items, made)) = job else { return };
        if !stop.load(Ordering::Relaxed) {
            // The trainer may be gone.
            let _ = made.send(maker.batch(items));
        }
    }
}
