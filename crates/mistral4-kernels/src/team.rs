//! Threads that stand by between kernels.
//!
//! One decoded token runs a few hundred kernels of 5 to 100 microseconds. Waking a sleeping thread for each takes as
//! long as the kernel, so the team's threads watch for the next job for a while before they sleep. The number of
//! threads is that of rayon's global pool, so one setting serves both.
use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a thread watches for the next job before it sleeps.
const WATCH: Duration = Duration::from_micros(200);
/// Looks at the state between two looks at the clock.
const LOOKS: usize = 128;

/// Bits of [`Team::state`]: the job's number, whether it can be joined, how many may, how many did.
const EPOCH: u32 = 32;
const OPEN: u64 = 1 << 31;
const LIMIT: u32 = 16;
const JOINED: u64 = (1 << LIMIT) - 1;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Numbered tasks and the function that does them.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    count: usize,
}

struct Team {
    /// Held while a job runs.
    turn: Mutex<()>,
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// The next task to take.
    next: AtomicUsize,
    /// Threads that joined the job and are done.
    finished: AtomicUsize,
    asleep: AtomicUsize,
    threads: OnceLock<Vec<Thread>>,
    /// What a task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only under `turn` while nobody can join, and read only by threads that joined (see `run`).
unsafe impl Sync for Team {}

static TEAM: Team = Team {
    turn: Mutex::new(()),
    state: AtomicU64::new(0),
    job: UnsafeCell::new(None),
    next: AtomicUsize::new(0),
    finished: AtomicUsize::new(0),
    asleep: AtomicUsize::new(0),
    threads: OnceLock::new(),
    panic: Mutex::new(None),
};

/// Runs `task(0) .. task(count - 1)` on up to `threads` threads, this one included; returns whether it did.
///
/// The team serves one caller at a time. A second one, or a task that calls again, gets `false` and does the work
/// itself: the machine is busy then.
pub(crate) fn run(threads: usize, count: usize, task: &Task<'_>) -> bool {
    let turn = match TEAM.turn.try_lock() {
        Ok(turn) => turn,
        // A task of an earlier caller panicked; the team itself is in order.
        Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
        Err(TryLockError::WouldBlock) => return false,
    };
    let team = TEAM.threads.get_or_init(Team::start);
    let helpers = (threads - 1).min(team.len());
    // SAFETY: only the lifetime changes; `Closing` waits for every thread that joined before this function returns.
    let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
    let job = Job { task, count };
    // SAFETY: the last job is closed and nobody works on it, so this thread, which holds `turn`, is alone.
    unsafe { *TEAM.job.get() = Some(job) };
    TEAM.next.store(0, Ordering::Relaxed);
    TEAM.finished.store(0, Ordering::Relaxed);
    let epoch = (TEAM.state.load(Ordering::Relaxed) >> EPOCH).wrapping_add(1);
    TEAM.state.store(epoch << EPOCH | OPEN | (helpers as u64) << LIMIT, Ordering::SeqCst);
    if TEAM.asleep.load(Ordering::SeqCst) > 0 {
        team.iter().for_each(Thread::unpark);
    }
    let closing = Closing;
    TEAM.work(job);
    drop(closing);
    let panic = TEAM.panic.lock().unwrap_or_else(|panic| panic.into_inner()).take();
    drop(turn);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
    true
}

/// Ends a job when dropped, after all who joined are done.
struct Closing;

impl Drop for Closing {
    fn drop(&mut self) {
        // If this thread panicked, nobody needs the other tasks.
        if thread::panicking() {
            TEAM.next.store(usize::MAX / 2, Ordering::Relaxed);
        }
        let joined = (TEAM.state.fetch_and(!OPEN, Ordering::AcqRel) & JOINED) as usize;
        let mut looks = 0usize;
        while TEAM.finished.load(Ordering::Acquire) < joined {
            looks += 1;
            if looks.is_multiple_of(1 << 14) { thread::yield_now() } else { spin_loop() }
        }
    }
}

impl Team {
    /// Starts as many threads as rayon has, less the one that calls.
    fn start() -> Vec<Thread> {
        let others = rayon::current_num_threads().saturating_sub(1).min(JOINED as usize >> 1);
        let spawn = |index: usize| {
            let builder = thread::Builder::new().name(format!("kernels {index}"));
            builder.spawn(|| TEAM.serve()).ok().map(|handle| handle.thread().clone())
        };
        (0..others).map_while(spawn).collect()
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            let Some(job) = self.join(seen) else { continue };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(job))) {
                self.next.store(usize::MAX / 2, Ordering::Relaxed);
                *self.panic.lock().unwrap_or_else(|panic| panic.into_inner()) = Some(panic);
            }
            self.finished.fetch_add(1, Ordering::Release);
        }
    }

    /// The number of a job that is not `seen`.
    fn wait(&self, seen: u64) -> u64 {
        let begin = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let epoch = self.state.load(Ordering::Acquire) >> EPOCH;
                if epoch != seen {
                    return epoch;
                }
                spin_loop();
            }
            if begin.elapsed() > WATCH {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                while self.state.load(Ordering::SeqCst) >> EPOCH == seen {
                    thread::park();
                }
                self.asleep.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Joins job `epoch`, unless it is over or has enough threads.
    fn join(&self, epoch: u64) -> Option<Job> {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let (joined, limit) = (state & JOINED, (state & !OPEN) >> LIMIT & (JOINED >> 1));
            if state >> EPOCH != epoch || state & OPEN == 0 || joined >= limit {
                return None;
            }
            match self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: the caller wrote the job before it opened it, and leaves it until all who joined are done.
                Ok(_) => return unsafe { *self.job.get() },
                Err(now) => state = now,
            }
        }
    }

    /// Does tasks until none is left.
    fn work(&self, job: Job) {
        // SAFETY: the function lives until the job is closed, which waits for this thread.
        let task = unsafe { &*job.task };
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.count {
                return;
            }
            task(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn on_two_threads<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool").install(test)
    }

    /// As [`run`], waiting for the team while another test has it.
    fn run_in_turn(threads: usize, count: usize, task: &Task<'_>) {
        while !run(threads, count, task) {
            thread::yield_now();
        }
    }

    #[test]
    fn every_task_runs_once() {
        on_two_threads(|| {
            for round in 0..2000 {
                let hits: Vec<AtomicU32> = (0..round % 17 + 1).map(|_| AtomicU32::new(0)).collect();
                run_in_turn(2, hits.len(), &|i| _ = hits[i].fetch_add(1, Ordering::Relaxed));
                assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
                if round % 500 == 0 {
                    // Long enough for the team to fall asleep.
                    thread::sleep(2 * WATCH);
                }
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        on_two_threads(|| {
            for bad in [0, 7] {
                let task = |i: usize| assert_ne!(i, bad, "task {bad}");
                let panic = catch_unwind(AssertUnwindSafe(|| run_in_turn(2, 8, &task))).unwrap_err();
                let text = panic.downcast_ref::<String>().expect("the message of an assertion");
                assert!(text.contains(&format!("task {bad}")), "{text}");
            }
            let sum = AtomicUsize::new(0);
            run_in_turn(2, 10, &|i| _ = sum.fetch_add(i, Ordering::Relaxed));
            assert_eq!(sum.into_inner(), 45);
        });
    }

    #[test]
    fn a_task_that_calls_again_does_its_work_itself() {
        let inner = AtomicUsize::new(0);
        run_in_turn(2, 3, &|_| {
            crate::parallel::for_each(5, |_| _ = inner.fetch_add(1, Ordering::Relaxed));
        });
        assert_eq!(inner.into_inner(), 15);
    }
}
