//! Collective operations over a group of ranks.
//!
//! A [`Transport`] moves bytes between pairs of ranks: MPI between processes ([`mpi`]), or queues between the threads of
//! one process ([`threads`]). Everything else is written once, here, on that single operation. Sums are taken in the
//! order of ranks, so a result depends on the number of ranks alone, never on which message came first.

#[cfg(feature = "mpi")]
pub mod mpi;
pub mod threads;

use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytemuck::{Pod, cast_slice, cast_slice_mut};

/// Up to this many values, a sum is taken by everybody from everybody's values: one round instead of two.
const SMALL: usize = 4096;

/// Values of a part that are exchanged at a time when larger ones are summed: few enough to be added while they are in
/// the caches.
const PIECE: usize = 1 << 18;

/// Moves bytes between ranks.
pub trait Transport: Send + Sync {
    /// This rank, counted from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Sends and receives any number of messages at once, and returns when all of them are through.
    ///
    /// Messages between the same two ranks on the same channel arrive in the order in which they were sent, and the
    /// length of what is received is known beforehand. Several threads of a rank may exchange at the same time on
    /// channels of their own.
    fn exchange(&self, channel: u32, sends: &[(usize, &[u8])], receives: &mut [(usize, &mut [u8])]);

    /// Ends every rank at once with an exit code.
    fn abort(&self, code: i32) -> !;
}

/// A number that can be summed over ranks.
pub trait Number: Pod + AddAssign {}
impl Number for f32 {}
impl Number for f64 {}
impl Number for u64 {}

/// A group of ranks. Its operations are collective: every rank of the group calls the same ones in the same order.
///
/// A rank that is lost ends the others: with MPI the launcher stops them, with threads they panic.
#[derive(Clone)]
pub struct Communicator {
    transport: Arc<dyn Transport>,
    /// The group's members, as ranks of the transport.
    members: Arc<[usize]>,
    rank: usize,
    channel: u32,
    /// The next channel that no group of this rank has; shared by all groups of the rank.
    next_channel: Arc<AtomicU32>,
    clock: WaitClock,
}

/// How long a thread has waited for other ranks.
#[derive(Debug, Clone, Default)]
pub(super) struct WaitClock(Arc<AtomicU64>);

impl WaitClock {
    /// Counts the time that `wait` takes.
    pub(super) fn time<T>(&self, wait: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = wait();
        self.0.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {:?} on channel {}", self.rank, self.members, self.channel)
    }
}

impl Communicator {
    /// The group of all ranks.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        let (rank, size) = (transport.rank(), transport.size());
        Self {
            transport,
            members: (0..size).collect(),
            rank,
            channel: 0,
            next_channel: Arc::new(AtomicU32::new(1)),
            clock: WaitClock::default(),
        }
    }

    /// A group of one.
    pub fn single() -> Self {
        threads::group(1).pop().expect("a group of one has a member")
    }

    /// This rank in the group, counted from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks of the group.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Whether this rank speaks for the group: prints, and writes what is written once.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Ends every rank of the run, those outside the group included, with an exit code.
    pub fn abort(&self, code: i32) -> ! {
        self.transport.abort(code)
    }

    /// Sums over ranks, in place; every rank gets the same bits.
    pub fn all_reduce_sum<T: Number>(&self, values: &mut [T]) {
        if self.size() == 1 || values.is_empty() {
            return;
        }
        if values.len() <= SMALL {
            let all = self.all_gather(values);
            let (first, others) = all.split_at(values.len());
            values.copy_from_slice(first);
            others.chunks_exact(values.len()).for_each(|others| add(values, others));
            return;
        }
        let counts = even_counts(values.len(), self.size());
        self.reduce_scatter_sum(values, &counts);
        self.all_gather_parts(vec![split_mut(values, &counts)]);
    }

    /// Sums over ranks each rank's part of `values`, parts of `counts` values in the order of ranks: this rank's part
    /// becomes the sum, and the others stay.
    pub fn reduce_scatter_sum<T: Number>(&self, values: &mut [T], counts: &[usize]) {
        let mut parts = split_mut(values, counts);
        let mut received = vec![T::zeroed(); counts[self.rank].min(PIECE) * (self.size() - 1)];
        let longest = counts.iter().max().copied().unwrap_or(0);
        for start in (0..longest).step_by(PIECE) {
            let piece = |rank: usize| start.min(counts[rank])..(start + PIECE).min(counts[rank]);
            let mine = piece(self.rank);
            let lengths = vec![mine.len(); self.size() - 1];
            let received = &mut received[..mine.len() * (self.size() - 1)];
            let sends: Vec<(usize, &[T])> =
                self.others().map(|rank| (rank, &parts[rank][piece(rank)])).collect();
            let mut receives: Vec<(usize, &mut [T])> =
                self.others().zip(split_mut(received, &lengths)).collect();
            self.exchange(&sends, &mut receives);
            let sum = &mut parts[self.rank][mine];
            let (before, after) = receives.split_at_mut(self.rank);
            if let Some(((_, first), before)) = before.split_first_mut() {
                before.iter().for_each(|(_, values)| add(first, values));
                add(sum, first);
            }
            after.iter().for_each(|(_, values)| add(sum, values));
        }
    }

    /// Everybody's values, of the same number on every rank, in the order of ranks.
    pub fn all_gather<T: Pod>(&self, mine: &[T]) -> Vec<T> {
        let mut all = vec![T::zeroed(); mine.len() * self.size()];
        self.all_gather_into(mine, &vec![mine.len(); self.size()], &mut all);
        all
    }

    /// As [`Communicator::all_gather`], rank `r` giving `counts[r]` values.
    pub fn all_gather_into<T: Pod>(&self, mine: &[T], counts: &[usize], all: &mut [T]) {
        assert_eq!(mine.len(), counts[self.rank], "what this rank gives");
        let mut parts = split_mut(all, counts);
        parts[self.rank].copy_from_slice(mine);
        self.all_gather_parts(vec![parts]);
    }

    /// Fills arrays of which each rank has its part, given as their parts in the order of ranks, all at once.
    pub fn all_gather_parts<T: Pod>(&self, arrays: Vec<Vec<&mut [T]>>) {
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        for mut parts in arrays {
            let mine: &[T] = parts.remove(self.rank);
            sends.extend(self.others().map(|rank| (rank, mine)));
            receives.extend(self.others().zip(parts));
        }
        self.exchange(&sends, &mut receives);
    }

    /// Everybody's values, of any number, by rank.
    pub fn all_gather_varied<T: Pod>(&self, mine: &[T]) -> Vec<Vec<T>> {
        let counts: Vec<usize> =
            self.all_gather(&[mine.len() as u64]).into_iter().map(|count| count as usize).collect();
        let mut all = vec![T::zeroed(); counts.iter().sum()];
        self.all_gather_into(mine, &counts, &mut all);
        split_mut(&mut all, &counts).into_iter().map(|part| part.to_vec()).collect()
    }

    /// Gives `root`'s values to everybody.
    pub fn broadcast<T: Pod>(&self, values: &mut [T], root: usize) {
        // A binomial tree: in each round, everybody who has the values gives them to one more.
        let size = self.size();
        let place = (self.rank + size - root) % size;
        let rank_at = |place: usize| (place + root) % size;
        let mut distance = 1;
        while distance < size {
            if place < distance && place + distance < size {
                self.exchange(&[(rank_at(place + distance), &*values)], &mut []);
            } else if (distance..2 * distance).contains(&place) {
                self.exchange(&[], &mut [(rank_at(place - distance), &mut *values)]);
            }
            distance *= 2;
        }
    }

    /// Sends `send_counts[r]` values to each rank `r` and receives `receive_counts[r]` from it, both in the order of
    /// ranks.
    pub fn all_to_all<T: Pod>(
        &self,
        values: &[T],
        send_counts: &[usize],
        receive_counts: &[usize],
    ) -> Vec<T> {
        assert_eq!(send_counts[self.rank], receive_counts[self.rank], "what this rank gives itself");
        let mut received = vec![T::zeroed(); receive_counts.iter().sum()];
        let sends = split(values, send_counts);
        let mut receives = split_mut(&mut received, receive_counts);
        receives[self.rank].copy_from_slice(sends[self.rank]);
        let not_me = |&(rank, _): &(usize, &[T])| rank != self.rank;
        let sends: Vec<(usize, &[T])> = sends.into_iter().enumerate().filter(not_me).collect();
        let mut receives: Vec<(usize, &mut [T])> = receives.into_iter().enumerate().collect();
        receives.remove(self.rank);
        self.exchange(&sends, &mut receives);
        received
    }

    /// Sends values to another rank of the group, which calls [`Communicator::receive`].
    pub fn send<T: Pod>(&self, values: &[T], to: usize) {
        self.exchange(&[(to, values)], &mut []);
    }

    /// Receives values from another rank of the group.
    pub fn receive<T: Pod>(&self, values: &mut [T], from: usize) {
        self.exchange::<T>(&[], &mut [(from, values)]);
    }

    /// Waits until every rank of the group is here.
    pub fn barrier(&self) {
        self.all_gather(&[0u8]);
    }

    /// Divides the group: ranks of one `color` form a group, in the order of `key`, then of rank.
    pub fn split(&self, color: usize, key: usize) -> Self {
        let next = self.next_channel.load(Ordering::Relaxed);
        let all = self.all_gather(&[color as u64, key as u64, u64::from(next)]);
        let all: Vec<[u64; 3]> = all.as_chunks().0.to_vec();
        let mut group: Vec<(u64, usize)> = (0..self.size())
            .filter(|&rank| all[rank][0] == color as u64)
            .map(|rank| (all[rank][1], rank))
            .collect();
        group.sort_unstable();
        let rank = group.iter().position(|&(_, rank)| rank == self.rank).expect("a rank is in its own group");
        // No member has used this channel yet, for any of its groups.
        let channel = all.iter().map(|&[.., next]| next as u32).max().expect("a group has members");
        self.next_channel.store(channel + 1, Ordering::Relaxed);
        Self {
            transport: Arc::clone(&self.transport),
            members: group.into_iter().map(|(_, rank)| self.members[rank]).collect(),
            rank,
            channel,
            next_channel: Arc::clone(&self.next_channel),
            clock: self.clock.clone(),
        }
    }

    /// The same group with messages of its own, for another thread, whose waiting is not counted.
    pub fn duplicate(&self) -> Self {
        Self { clock: WaitClock::default(), ..self.split(0, self.rank) }
    }

    /// How long this rank has waited in this group and those that it was divided from and into.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.clock.0.load(Ordering::Relaxed))
    }

    pub(super) fn clock(&self) -> &WaitClock {
        &self.clock
    }

    /// The other ranks of the group.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size()).filter(move |&other| other != rank)
    }

    fn exchange<T: Pod>(&self, sends: &[(usize, &[T])], receives: &mut [(usize, &mut [T])]) {
        let sends: Vec<(usize, &[u8])> = sends
            .iter()
            .filter(|(_, values)| !values.is_empty())
            .map(|&(to, values)| (self.members[to], cast_slice(values)))
            .collect();
        let mut receives: Vec<(usize, &mut [u8])> = receives
            .iter_mut()
            .filter(|(_, values)| !values.is_empty())
            .map(|(from, values)| (self.members[*from], cast_slice_mut(values)))
            .collect();
        if !sends.is_empty() || !receives.is_empty() {
            self.clock.time(|| self.transport.exchange(self.channel, &sends, &mut receives));
        }
    }
}

fn add<T: Number>(sum: &mut [T], values: &[T]) {
    sum.iter_mut().zip(values).for_each(|(sum, &value)| *sum += value);
}

/// `total` in `parts` parts, the first ones a value longer where it does not divide.
fn even_counts(total: usize, parts: usize) -> Vec<usize> {
    (0..parts).map(|i| total / parts + usize::from(i < total % parts)).collect()
}

fn split<'a, T>(mut values: &'a [T], counts: &[usize]) -> Vec<&'a [T]> {
    assert_eq!(values.len(), counts.iter().sum::<usize>(), "the counts are those of the values");
    let part = |&count: &usize| {
        let (part, rest) = values.split_at(count);
        values = rest;
        part
    };
    counts.iter().map(part).collect()
}

fn split_mut<'a, T>(mut values: &'a mut [T], counts: &[usize]) -> Vec<&'a mut [T]> {
    assert_eq!(values.len(), counts.iter().sum::<usize>(), "the counts are those of the values");
    let part = |&count: &usize| {
        let (part, rest) = std::mem::take(&mut values).split_at_mut(count);
        values = rest;
        part
    };
    counts.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_collective_gives_what_its_definition_says() {
        for size in 1..=5 {
            threads::run(size, |c| check_collectives(&c));
        }
    }

    fn check_collectives(c: &Communicator) {
        let (rank, size) = (c.rank(), c.size());
        let value = |rank: usize, i: usize| 1.0 / (1 + rank * 31 + i) as f32;
        for count in [1, 7, SMALL + 13, size * PIECE + 1] {
            let mut values: Vec<f32> = (0..count).map(|i| value(rank, i)).collect();
            let expected: Vec<f32> =
                (0..count).map(|i| (1..size).fold(value(0, i), |sum, rank| sum + value(rank, i))).collect();
            c.all_reduce_sum(&mut values);
            assert_eq!(values, expected, "sums are taken in the order of ranks");
        }
        // Rank r keeps the r-th part, which for the first rank is empty and for the last one more than a piece.
        let counts: Vec<usize> = (0..size).map(|r| r * (PIECE / (size - 1).max(1) + 1)).collect();
        let mut values: Vec<u64> = (0..counts.iter().sum()).map(|i| (i * size + rank) as u64).collect();
        c.reduce_scatter_sum(&mut values, &counts);
        let ranks = (size * (size - 1) / 2) as u64;
        for (i, &sum) in split(&values, &counts)[rank].iter().enumerate() {
            let i = (counts[..rank].iter().sum::<usize>() + i) * size;
            assert_eq!(sum, (i * size) as u64 + ranks);
        }
        assert_eq!(
            c.all_gather(&[rank as u64, 7]),
            (0..size).flat_map(|r| [r as u64, 7]).collect::<Vec<_>>()
        );
        let varied = c.all_gather_varied(&vec![rank as u8; rank]);
        assert_eq!(varied, (0..size).map(|r| vec![r as u8; r]).collect::<Vec<_>>());
        for root in 0..size {
            let mut values = [half::bf16::from_f32(rank as f32), half::bf16::ONE];
            c.broadcast(&mut values, root);
            assert_eq!(values, [half::bf16::from_f32(root as f32), half::bf16::ONE]);
        }
        // Rank s sends r + s values to rank r, each saying where it comes from and goes to.
        let counts: Vec<usize> = (0..size).map(|r| r + rank).collect();
        let values: Vec<u64> = (0..size).flat_map(|r| vec![(rank * 100 + r) as u64; r + rank]).collect();
        let received = c.all_to_all(&values, &counts, &counts);
        let expected: Vec<u64> = (0..size).flat_map(|s| vec![(s * 100 + rank) as u64; s + rank]).collect();
        assert_eq!(received, expected);
        if size > 1 {
            let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
            let mut token = [0u64];
            if rank == 0 {
                c.send(&[5u64], next);
                c.receive(&mut token, before);
                assert_eq!(token, [5 + size as u64 - 1]);
            } else {
                c.receive(&mut token, before);
                c.send(&[token[0] + 1], next);
            }
        }
        c.barrier();
    }

    #[test]
    fn groups_do_not_hear_each_other() {
        threads::run(4, |world| {
            let row = world.split(world.rank() / 2, world.rank());
            let column = world.split(world.rank() % 2, 9 - world.rank());
            assert_eq!((row.size(), row.rank()), (2, world.rank() % 2));
            assert_eq!((column.size(), column.rank()), (2, 1 - world.rank() / 2), "ordered by key");
            let mut values = [world.rank() as u64];
            row.all_reduce_sum(&mut values);
            assert_eq!(values, [[1, 5][world.rank() / 2]]);
            // Both groups at once, from two threads.
            let other = column.duplicate();
            std::thread::scope(|scope| {
                scope.spawn(|| assert_eq!(other.all_gather(&[1u8; 3]), [1; 6]));
                assert_eq!(row.all_gather(&[2u8]), [2; 2]);
            });
            check_collectives(&row);
            check_collectives(&column);
        });
    }

    #[test]
    fn a_rank_that_ends_ends_those_who_wait_for_it() {
        let failed = std::panic::catch_unwind(|| {
            threads::run(2, |c| {
                if c.rank() == 0 {
                    c.barrier();
                }
            });
        });
        let message = failed.unwrap_err();
        let message = message.downcast_ref::<String>().expect("a message");
        assert!(message.contains("rank 1 has ended"), "{message}");
    }
}
