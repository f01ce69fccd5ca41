//! Ranks as threads of one process: for tests, and for finding defects without a launcher.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Communicator, Transport};

/// What all ranks share.
struct Exchange {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Messages under way, by sender, receiver and channel.
    queues: HashMap<(usize, usize, u32), VecDeque<Vec<u8>>>,
    /// Ranks that will send nothing more.
    ended: Vec<bool>,
}

impl Exchange {
    fn new(size: usize) -> Arc<Self> {
        let state = State { ended: vec![false; size], ..State::default() };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn communicator(self: &Arc<Self>, rank: usize, size: usize) -> Communicator {
        Communicator::new(Arc::new(ThreadTransport { exchange: Arc::clone(self), rank, size }))
    }

    /// The state, also after a rank panicked while it held it: every change of it is a single operation.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct ThreadTransport {
    exchange: Arc<Exchange>,
    rank: usize,
    size: usize,
}

impl Transport for ThreadTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, channel: u32, sends: &[(usize, &[u8])], receives: &mut [(usize, &mut [u8])]) {
        for &(to, bytes) in sends {
            let bytes = bytes.to_vec();
            self.exchange.lock().queues.entry((self.rank, to, channel)).or_default().push_back(bytes);
        }
        self.exchange.changed.notify_all();
        for (from, into) in receives {
            let mut state = self.exchange.lock();
            let message = loop {
                if let Some(message) =
                    state.queues.get_mut(&(*from, self.rank, channel)).and_then(VecDeque::pop_front)
                {
                    break message;
                }
                if state.ended[*from] {
                    drop(state);
                    panic!("rank {from} has ended, and rank {} waits for it", self.rank);
                }
                state = self.exchange.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            assert_eq!(message.len(), into.len(), "rank {from} sent another number of bytes than expected");
            into.copy_from_slice(&message);
        }
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

/// The communicators of `size` ranks in one process, in the order of ranks.
pub fn group(size: usize) -> Vec<Communicator> {
    let exchange = Exchange::new(size);
    (0..size).map(|rank| exchange.communicator(rank, size)).collect()
}

/// Runs `work` on `size` ranks, each a thread, and returns what they return, in the order of ranks.
///
/// # Panics
/// When a rank panics, with the message of the first one that did.
pub fn run<T: Send>(size: usize, work: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let exchange = Exchange::new(size);
    let first_panic = Mutex::new(None);
    let results: Vec<Option<T>> = std::thread::scope(|scope| {
        let rank_thread = |rank| {
            let (exchange, work, first_panic) = (&exchange, &work, &first_panic);
            scope.spawn(move || {
                let result = catch_unwind(AssertUnwindSafe(|| work(exchange.communicator(rank, size))));
                let result = result.map_err(|panic| {
                    let mut first = first_panic.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(panic);
                });
                exchange.lock().ended[rank] = true;
                exchange.changed.notify_all();
                result.ok()
            })
        };
        let threads: Vec<_> = (0..size).map(rank_thread).collect();
        threads.into_iter().map(|thread| thread.join().expect("panics were caught")).collect()
    });
    if let Some(panic) = first_panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
    results.into_iter().map(|result| result.expect("no rank panicked")).collect()
}
