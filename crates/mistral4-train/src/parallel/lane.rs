//! Communication beside computing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::Communicator;
use super::communicator::WaitClock;

type Job = Box<dyn FnOnce(&Communicator) + Send>;

/// A thread that communicates, one job after the other, while its rank computes.
///
/// Every rank of the group starts the same jobs in the same order.
pub struct Lane {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Jobs that are not done.
    under_way: Arc<AtomicUsize>,
    clock: WaitClock,
}

/// The result of a job that is under way.
pub struct Pending<T> {
    result: Receiver<T>,
    clock: WaitClock,
}

impl Lane {
    /// A lane over a group; collective.
    pub fn new(group: &Communicator) -> Self {
        let clock = group.clock().clone();
        let group = group.duplicate();
        let (jobs, queue) = channel::<Job>();
        let thread = std::thread::spawn(move || queue.into_iter().for_each(|job| job(&group)));
        Self { jobs: Some(jobs), thread: Some(thread), under_way: Arc::default(), clock }
    }

    /// Begins a job after those before it.
    pub fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Communicator) -> T + Send + 'static,
    ) -> Pending<T> {
        let (result, pending) = channel();
        let under_way = Arc::clone(&self.under_way);
        under_way.fetch_add(1, Ordering::Relaxed);
        let job: Job = Box::new(move |group| {
            let value = job(group);
            under_way.fetch_sub(1, Ordering::Relaxed);
            // Nobody may be waiting any more, when the rank fails.
            let _ = result.send(value);
        });
        let jobs = self.jobs.as_ref().expect("a lane takes jobs until it is dropped");
        jobs.send(job).expect("the lane's thread runs until the lane is dropped");
        Pending { result: pending, clock: self.clock.clone() }
    }

    /// Whether all jobs are done.
    pub fn is_idle(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) == 0
    }
}

impl<T> Pending<T> {
    /// Waits for the result.
    ///
    /// # Panics
    /// When the job panicked, because another rank was lost.
    pub fn wait(self) -> T {
        let result = self.clock.time(|| self.result.recv());
        result.expect("a rank that this one communicates with was lost")
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.jobs = None;
        // A job that nobody waited for is that of a rank that failed, and may wait for others in vain.
        let is_idle = self.is_idle();
        if let Some(thread) = self.thread.take().filter(|_| is_idle) {
            // A lane that failed has said so to those who waited for it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::communicator::threads;

    #[test]
    fn jobs_run_in_order_beside_the_rank() {
        threads::run(3, |group| {
            let lane = Lane::new(&group);
            let sums: Vec<Pending<Vec<f32>>> = (0..4)
                .map(|job| {
                    let mut values = vec![(group.rank() + job) as f32; 5000];
                    lane.start(move |lane| {
                        lane.all_reduce_sum(&mut values);
                        values
                    })
                })
                .collect();
            assert_eq!(group.all_gather(&[group.rank() as u64]), [0, 1, 2]);
            for (job, sum) in sums.into_iter().enumerate() {
                assert_eq!(sum.wait(), vec![(3 + 3 * job) as f32; 5000]);
            }
        });
    }
}
