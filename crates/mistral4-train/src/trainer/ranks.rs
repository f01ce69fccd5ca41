//! What the ranks of a run tell each other in a step.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::backward::MicroBatchLoss;
use crate::data::Batch;
use crate::guard::BatchLoss;
use crate::metrics::peak_memory_gib;
use crate::parallel::{Communicator, Mesh};

/// How much a step holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepCounts {
    /// Positions that are learned.
    pub(super) label_tokens: usize,
    /// Tokens without padding.
    pub(super) tokens: usize,
    /// Forward and backward passes.
    pub(super) micro_batches: usize,
    /// Passes of the ranks before this one.
    pub(super) micro_batches_before: usize,
}

impl StepCounts {
    /// What one rank's batches hold.
    pub(super) fn of(batches: &[Batch]) -> Self {
        Self {
            label_tokens: batches.iter().map(|batch| batch.num_label_tokens).sum(),
            tokens: batches.iter().map(|batch| batch.num_tokens).sum(),
            micro_batches: batches.iter().filter(|batch| !batch.is_filler()).count(),
            micro_batches_before: 0,
        }
    }

    /// Sums over the ranks with data of their own.
    pub(super) fn together(self, mesh: &Mesh) -> Self {
        let mine = [self.label_tokens, self.tokens, self.micro_batches].map(|count| count as u64);
        let all = mesh.data.all_gather(&mine);
        let ranks = all.as_chunks::<3>().0;
        let sum = |index: usize, ranks: &[[u64; 3]]| ranks.iter().map(|rank| rank[index] as usize).sum();
        Self {
            label_tokens: sum(0, ranks),
            tokens: sum(1, ranks),
            micro_batches: sum(2, ranks),
            micro_batches_before: sum(2, &ranks[..mesh.data.rank()]),
        }
    }
}

/// What a step measured, on one rank or on all of them.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// Sums over micro-batches.
    pub(super) losses: MicroBatchLoss,
    /// Each micro-batch's loss.
    pub(super) batches: Vec<BatchLoss>,
    /// Seconds that each rank computed; of a single rank, nothing is kept.
    busy: Vec<f64>,
    /// Largest memory of any rank so far, in GiB.
    pub(super) mem: f64,
    /// Whether any rank was asked to stop.
    pub(super) stop: bool,
}

impl Measured {
    /// Adds a micro-batch, whose routers' losses count with the factor `aux`.
    pub(super) fn add(&mut self, rows: Vec<usize>, label_tokens: usize, part: MicroBatchLoss, aux: f64) {
        self.batches.push(BatchLoss { rows, loss_sum: part.sums().iter().sum(), label_tokens });
        self.losses.loss_sum += part.loss_sum;
        self.losses.z_loss += part.z_loss;
        self.losses.aux_loss += part.aux_loss * aux;
        self.losses.router_z_loss += part.router_z_loss * aux;
        if self.losses.loads.is_empty() {
            self.losses.loads = part.loads;
            return;
        }
        for ((_, sum), (_, part)) in self.losses.loads.iter_mut().zip(part.loads) {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }

    /// What all ranks measured, given this rank's time and whether it was asked to stop.
    pub(super) fn together(mut self, mesh: &Mesh, busy: Duration, stop: bool) -> Self {
        self.stop = stop;
        self.mem = peak_memory_gib();
        if mesh.world.size() == 1 {
            return self;
        }
        let all = mesh.world.all_gather(&[busy.as_secs_f64(), self.mem, f64::from(u8::from(stop))]);
        let all = all.as_chunks::<3>().0;
        self.busy = all.iter().map(|&[busy, ..]| busy).collect();
        self.mem = all.iter().map(|&[_, mem, _]| mem).fold(0.0, f64::max);
        self.stop = all.iter().any(|&[.., stop]| stop > 0.0);
        let mut sums = self.losses.sums();
        mesh.data.all_reduce_sum(&mut sums);
        self.losses.set_sums(sums);
        self.batches = gather_batches(&self.batches, &mesh.data);
        // A rank without a micro-batch knows no loads; the others say how many there are.
        let known = mesh.data.all_gather(&[self.losses.loads.len() as u64]);
        if let Some(knows) = known.iter().position(|&count| count > 0) {
            self.losses.loads = sum_loads(std::mem::take(&mut self.losses.loads), knows, &mesh.data);
        }
        self
    }

    /// How long ranks computed, and which took longest; nothing for a single rank.
    pub(super) fn time_metrics(&self, rank_names: &[String]) -> Map<String, Value> {
        let mut more = Map::new();
        let slowest = (0..self.busy.len()).max_by(|&a, &b| self.busy[a].total_cmp(&self.busy[b]));
        if let Some(slowest) = slowest {
            let mean = self.busy.iter().sum::<f64>() / self.busy.len() as f64;
            more.insert("rank_time_max".into(), self.busy[slowest].into());
            more.insert("rank_time_mean".into(), mean.into());
            more.insert("slowest_rank".into(), rank_names[slowest].as_str().into());
        }
        more
    }
}

/// Every rank's name: its number and its machine.
pub(super) fn rank_names(world: &Communicator) -> Vec<String> {
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let names = world.all_gather_varied(machine.trim().as_bytes());
    let name = |(rank, name): (usize, Vec<u8>)| match String::from_utf8_lossy(&name) {
        name if name.is_empty() => rank.to_string(),
        name => format!("{rank} on {name}"),
    };
    names.into_iter().enumerate().map(name).collect()
}

/// Every rank's micro-batches, in the order of ranks.
fn gather_batches(batches: &[BatchLoss], group: &Communicator) -> Vec<BatchLoss> {
    let mut words = Vec::new();
    for BatchLoss { rows, loss_sum, label_tokens } in batches {
        words.extend([*label_tokens as u64, loss_sum.to_bits(), rows.len() as u64]);
        words.extend(rows.iter().map(|&row| row as u64));
    }
    let all = group.all_gather_varied(&words).concat();
    let mut batches = Vec::new();
    let mut rest = &all[..];
    while let [label_tokens, loss, rows, after @ ..] = rest {
        let (rows, after) = after.split_at(*rows as usize);
        batches.push(BatchLoss {
            rows: rows.iter().map(|&row| row as usize).collect(),
            loss_sum: f64::from_bits(*loss),
            label_tokens: *label_tokens as usize,
        });
        rest = after;
    }
    batches
}

/// Sums loads over ranks; the rank `knows` says which layers have any.
fn sum_loads(loads: Vec<(usize, Vec<u64>)>, knows: usize, group: &Communicator) -> Vec<(usize, Vec<u64>)> {
    let mut layout = [loads.len() as u64, loads.first().map_or(0, |(_, load)| load.len()) as u64];
    group.broadcast(&mut layout, knows);
    let [layers, experts] = layout.map(|count| count as usize);
    let mut indices: Vec<u64> = loads.iter().map(|(layer, _)| *layer as u64).collect();
    indices.resize(layers, 0);
    group.broadcast(&mut indices, knows);
    let mut sums: Vec<u64> = loads.into_iter().flat_map(|(_, load)| load).collect();
    sums.resize(layers * experts, 0);
    group.all_reduce_sum(&mut sums);
    indices.into_iter().map(|layer| layer as usize).zip(sums.chunks(experts).map(<[u64]>::to_vec)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::communicator::threads;
    use crate::recipe::DistributedConfig;

    #[test]
    fn ranks_agree_on_a_step_and_name_the_slowest() {
        let all = threads::run(3, |world| {
            let names = rank_names(&world);
            let rank = world.rank();
            let mesh = Mesh::new(&DistributedConfig::default(), world).unwrap();
            let mut mine = Measured::default();
            // The first rank has nothing to do.
            for i in 0..rank {
                let loads = vec![(1, vec![rank as u64, 1]), (2, vec![0, i as u64])];
                let losses = MicroBatchLoss { loss_sum: 0.5, aux_loss: 1.0, ..Default::default() };
                let part = MicroBatchLoss { z_loss: 0.25, router_z_loss: 2.0, loads, ..losses };
                mine.add(vec![rank, i], rank, part, 0.25);
                if rank == 2 {
                    mine.batches[i].loss_sum = f64::NAN;
                }
            }
            let busy = Duration::from_secs([1, 5, 3][rank]);
            let all = mine.together(&mesh, busy, rank == 1);
            let metrics = all.time_metrics(&names);
            assert_eq!(
                (metrics["rank_time_max"].as_f64(), metrics["rank_time_mean"].as_f64()),
                (Some(5.0), Some(3.0))
            );
            assert!(metrics["slowest_rank"].as_str().unwrap().starts_with('1'));
            all
        });
        for all in all {
            assert!(all.stop);
            assert_eq!(all.losses.sums(), [1.5, 0.75, 0.75, 1.5]);
            assert_eq!(all.losses.loads, [(1, vec![5, 3]), (2, vec![0, 1])]);
            let rows: Vec<_> = all.batches.iter().map(|batch| batch.rows.clone()).collect();
            assert_eq!(rows, [[1, 0], [2, 0], [2, 1]]);
            assert!(all.batches[1].loss_sum.is_nan() && all.batches[2].label_tokens == 2);
        }
    }
}
