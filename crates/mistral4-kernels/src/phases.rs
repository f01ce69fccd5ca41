//! Work in phases: each begins when every task of the one before is done, without leaving the team.
//!
//! A decoded token passes a layer in some ten short steps; starting a job of the team for each costs as much as the
//! step. A thread that comes late finds the early phases done and helps with the rest, so none is waited for that has
//! not taken a task.
use crate::team;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// What the threads do together between two meetings.
#[derive(Clone, Copy)]
pub(crate) struct Phase<'a> {
    /// Number of tasks.
    pub(crate) tasks: usize,
    /// Does the tasks it is handed, which are some of `0..tasks`; every thread calls it once.
    pub(crate) work: &'a (dyn Fn(&mut Tasks<'_>) + Sync),
}

/// How far a phase has come; on cache lines of its own.
#[repr(align(128))]
struct Progress {
    taken: AtomicUsize,
    done: AtomicUsize,
}

/// Hands out the tasks of a phase to one thread. A task is done when the next one is asked for.
pub(crate) struct Tasks<'a> {
    progress: &'a Progress,
    count: usize,
    held: bool,
}

impl Tasks<'_> {
    fn end_held(&mut self) {
        if std::mem::take(&mut self.held) {
            self.progress.done.fetch_add(1, Ordering::Release);
        }
    }
}

impl Iterator for Tasks<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.end_held();
        // Looking first keeps the counter from running on while threads pass by.
        if self.progress.taken.load(Ordering::Relaxed) >= self.count {
            return None;
        }
        let task = self.progress.taken.fetch_add(1, Ordering::Relaxed);
        self.held = task < self.count;
        self.held.then_some(task)
    }
}

impl Drop for Tasks<'_> {
    fn drop(&mut self) {
        // A task that panicked is not done: nobody may go on as if it were.
        if !thread::panicking() {
            self.end_held();
        }
    }
}

/// Runs phases in order, on several threads if there are any to spare.
pub(crate) fn run<const N: usize>(phases: [Phase<'_>; N]) {
    let progress: [Progress; N] =
        std::array::from_fn(|_| Progress { taken: AtomicUsize::new(0), done: AtomicUsize::new(0) });
    let pass = |_: usize| {
        let on_panic = OnPanic { progress: &progress };
        for (phase, progress) in phases.iter().zip(&progress) {
            let mut tasks = Tasks { progress, count: phase.tasks, held: false };
            (phase.work)(&mut tasks);
            // What the phase left over is a mistake of its own; nobody would end it.
            debug_assert!(tasks.next().is_none(), "a phase takes tasks until there is none");
            drop(tasks);
            wait_for(progress, phase.tasks);
        }
        std::mem::forget(on_panic);
    };
    let threads = rayon::current_num_threads();
    if threads <= 1 || !team::run(threads, threads, &pass) {
        pass(0);
    }
}

fn wait_for(progress: &Progress, tasks: usize) {
    let mut looks = 0usize;
    while progress.done.load(Ordering::Acquire) < tasks {
        looks += 1;
        if looks.is_multiple_of(1 << 14) { thread::yield_now() } else { spin_loop() }
    }
}

/// Lets the other threads through when a task of this one panics.
struct OnPanic<'a> {
    progress: &'a [Progress],
}

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        // First nothing is left to take, then everything counts as done.
        self.progress.iter().for_each(|progress| progress.taken.store(usize::MAX / 2, Ordering::Relaxed));
        self.progress.iter().for_each(|progress| progress.done.store(usize::MAX / 2, Ordering::Release));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn on_two_threads<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool").install(test)
    }

    #[test]
    fn a_phase_sees_all_of_the_one_before() {
        on_two_threads(|| {
            for round in 0..500 {
                let count = round % 9;
                let hits = [const { AtomicUsize::new(0) }; 3];
                let work = |phase: usize| {
                    let hits = &hits;
                    move |tasks: &mut Tasks<'_>| {
                        for task in tasks {
                            assert!(task < count);
                            let before = hits[..phase].iter().map(|hits| hits.load(Ordering::Relaxed));
                            assert!(before.into_iter().all(|hits| hits == count), "round {round}");
                            hits[phase].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                };
                let works = [work(0), work(1), work(2)];
                run(std::array::from_fn::<_, 3, _>(|i| Phase { tasks: count, work: &works[i] }));
                assert!(hits.iter().all(|hits| hits.load(Ordering::Relaxed) == count));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_ends_every_phase() {
        on_two_threads(|| {
            let after = AtomicUsize::new(0);
            let bad = |tasks: &mut Tasks<'_>| {
                for task in tasks {
                    assert_ne!(task, 3, "task {task}");
                }
            };
            let next = |tasks: &mut Tasks<'_>| tasks.for_each(|_| _ = after.fetch_add(1, Ordering::Relaxed));
            let phases = [Phase { tasks: 8, work: &bad }, Phase { tasks: 8, work: &next }];
            assert!(catch_unwind(AssertUnwindSafe(|| run(phases))).is_err());
            assert_eq!(after.load(Ordering::Relaxed), 0, "nothing runs after a failure");
        });
    }
}
