//! How ranks are laid out: which of them hold the same part of the model and of the data.
//!
//! Source: `MeshContext` and `_mesh_utils.py` in NVIDIA NeMo AutoModel: pipeline outermost, then replicas, shards,
//! context and, of neighbouring ranks, tensor parallelism; experts are spread over the ranks that share the data.

use std::fmt;

use super::Communicator;
use crate::error::{Error, Result};
use crate::recipe::{DistributedConfig, Strategy};

/// The sizes of a mesh, whose product is the number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// Pipeline stages.
    pub pp: usize,
    /// Groups that hold the same parameters and gradients.
    pub dp_replicate: usize,
    /// Ranks of such a group, each with its own part of the parameters (or, under `ddp`, with all of them).
    pub dp_shard: usize,
    /// Ranks that share a sequence.
    pub cp: usize,
    /// Ranks that share each linear.
    pub tp: usize,
    /// Ranks over which the experts are spread, a divisor of `dp_shard * cp`.
    pub ep: usize,
}

impl MeshShape {
    /// The mesh that a recipe asks for on `ranks` ranks.
    ///
    /// # Errors
    /// Sizes whose product is another number, with the arithmetic.
    pub fn new(config: &DistributedConfig, ranks: usize) -> Result<Self> {
        let DistributedConfig { tp_size: tp, cp_size: cp, pp_size: pp, ep_size: ep, .. } = *config;
        let wrong = |key: &str, value: usize, message: String| Error::Inconsistent {
            key: format!("distributed.{key}"),
            value: value.to_string(),
            message,
        };
        let others = tp * cp * pp;
        let dp = match config.dp_size {
            Some(dp) if dp * others != ranks => {
                return Err(wrong(
                    "dp_size",
                    dp,
                    format!(
                        "dp_size * tp_size * cp_size * pp_size is {dp} * {tp} * {cp} * {pp} = {}, and there are {ranks} ranks; start {}, or leave dp_size out",
                        dp * others,
                        dp * others
                    ),
                ));
            }
            Some(dp) => dp,
            None if ranks.is_multiple_of(others) => ranks / others,
            None => {
                let (key, value) = [("tp_size", tp), ("cp_size", cp), ("pp_size", pp)]
                    .into_iter()
                    .max_by_key(|&(_, size)| size)
                    .expect("there are three");
                return Err(wrong(
                    key,
                    value,
                    format!(
                        "tp_size * cp_size * pp_size is {tp} * {cp} * {pp} = {others}, which does not divide the {ranks} ranks; start {} ranks (--nproc)",
                        ranks.next_multiple_of(others)
                    ),
                ));
            }
        };
        let replicate = config.dp_replicate_size;
        if !dp.is_multiple_of(replicate) {
            return Err(wrong(
                "dp_replicate_size",
                replicate,
                format!("must divide the data-parallel ranks: {ranks} / ({tp} * {cp} * {pp}) = {dp}"),
            ));
        }
        let shard = dp / replicate;
        if !(shard * cp).is_multiple_of(ep) {
            return Err(wrong(
                "ep_size",
                ep,
                format!(
                    "must divide the ranks that share parameters: dp_size / dp_replicate_size * cp_size = {dp} / {replicate} * {cp} = {}",
                    shard * cp
                ),
            ));
        }
        Ok(Self { pp, dp_replicate: replicate, dp_shard: shard, cp, tp, ep })
    }

    /// The fewest ranks that a recipe's mesh can be laid out on.
    pub fn fewest_ranks(config: &DistributedConfig) -> usize {
        let DistributedConfig { tp_size: tp, cp_size: cp, pp_size: pp, ep_size: ep, .. } = *config;
        // Experts are spread over the ranks of `dp_shard * cp`.
        let shard = (1..=ep).find(|shard| (shard * cp).is_multiple_of(ep)).unwrap_or(ep);
        config.dp_size.unwrap_or(config.dp_replicate_size * shard) * tp * cp * pp
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.pp * self.dp() * self.cp * self.tp
    }

    /// Ranks with data of their own.
    pub fn dp(&self) -> usize {
        self.dp_replicate * self.dp_shard
    }

    /// The place of a rank.
    pub fn place(&self, rank: usize) -> Place {
        Place {
            tp: rank % self.tp,
            cp: rank / self.tp % self.cp,
            dp_shard: rank / (self.tp * self.cp) % self.dp_shard,
            dp_replicate: rank / (self.tp * self.cp * self.dp_shard) % self.dp_replicate,
            pp: rank / (self.tp * self.cp * self.dp()),
        }
    }
}

impl fmt::Display for MeshShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pp, dp_replicate, dp_shard, cp, tp, ep } = self;
        write!(
            f,
            "pp {pp} * dp_replicate {dp_replicate} * dp_shard {dp_shard} * cp {cp} * tp {tp} = {} ranks, ep {ep}",
            self.ranks()
        )
    }
}

/// Where in a mesh a rank is, along each of its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Pipeline stage.
    pub pp: usize,
    /// Replica.
    pub dp_replicate: usize,
    /// Shard.
    pub dp_shard: usize,
    /// Part of the sequence.
    pub cp: usize,
    /// Part of each linear.
    pub tp: usize,
}

/// A mesh with the groups of one rank.
#[derive(Debug, Clone)]
pub struct Mesh {
    /// Its sizes.
    pub shape: MeshShape,
    /// Where this rank is.
    pub place: Place,
    /// How parameters are kept.
    pub strategy: Strategy,
    /// All ranks.
    pub world: Communicator,
    /// Ranks that differ in their data alone: replicas and shards.
    pub data: Communicator,
    /// Ranks that hold a replica together.
    pub shard: Communicator,
    /// Ranks that hold the same part of different replicas.
    pub replicate: Communicator,
}

impl Mesh {
    /// Lays out the ranks of `world`; collective.
    ///
    /// # Errors
    /// As [`MeshShape::new`].
    pub fn new(config: &DistributedConfig, world: Communicator) -> Result<Self> {
        let shape = MeshShape::new(config, world.size())?;
        let rank = world.rank();
        let place = shape.place(rank);
        let Place { pp, dp_replicate, dp_shard, cp, tp } = place;
        // Ranks that agree in everything but the sides that a group runs along have one color.
        let beside = (pp * shape.cp + cp) * shape.tp + tp;
        Ok(Self {
            shape,
            place,
            strategy: config.strategy,
            data: world.split(beside, rank),
            shard: world.split(beside * shape.dp_replicate + dp_replicate, rank),
            replicate: world.split(beside * shape.dp_shard + dp_shard, rank),
            world,
        })
    }

    /// Whether each rank keeps but a part of every parameter.
    pub fn is_sharded(&self) -> bool {
        self.strategy == Strategy::FullyShard && self.shard.size() > 1
    }

    /// The mesh of a single rank.
    pub fn single() -> Self {
        Self::new(&DistributedConfig::default(), Communicator::single())
            .expect("one rank needs no arithmetic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::communicator::threads;

    fn config() -> DistributedConfig {
        DistributedConfig::default()
    }

    #[test]
    fn sizes_that_do_not_fit_say_why() {
        let message = |config, ranks| MeshShape::new(&config, ranks).unwrap_err().to_string();
        let text = message(DistributedConfig { dp_size: Some(2), tp_size: 2, ..config() }, 6);
        assert!(text.contains("2 * 2 * 1 * 1 = 4, and there are 6 ranks"), "{text}");
        let text = message(DistributedConfig { pp_size: 4, tp_size: 2, ..config() }, 6);
        assert!(text.contains("2 * 1 * 4 = 8, which does not divide the 6 ranks; start 8 ranks"), "{text}");
        let text = message(DistributedConfig { dp_replicate_size: 3, ..config() }, 4);
        assert!(text.contains("4 / (1 * 1 * 1) = 4"), "{text}");
        let text = message(DistributedConfig { dp_replicate_size: 2, ep_size: 4, ..config() }, 4);
        assert!(text.contains("4 / 2 * 1 = 2"), "{text}");
    }

    #[test]
    fn the_remaining_ranks_are_data_parallel() {
        let shape = MeshShape::new(&DistributedConfig { tp_size: 2, pp_size: 2, ..config() }, 24).unwrap();
        assert_eq!((shape.dp(), shape.ranks()), (6, 24));
        let places: Vec<Place> = (0..24).map(|rank| shape.place(rank)).collect();
        assert_eq!(places[1], Place { tp: 1, ..places[0] });
        assert_eq!(places[2], Place { dp_shard: 1, ..places[0] });
        assert_eq!(places[12], Place { pp: 1, ..places[0] });
    }

    #[test]
    fn the_fewest_ranks_fit() {
        for (config, ranks) in [
            (config(), 1),
            (DistributedConfig { pp_size: 4, ep_size: 8, ..config() }, 32),
            (DistributedConfig { ep_size: 16, dp_replicate_size: 2, ..config() }, 32),
            (DistributedConfig { ep_size: 4, cp_size: 2, tp_size: 3, ..config() }, 12),
            (DistributedConfig { dp_size: Some(6), tp_size: 2, ..config() }, 12),
        ] {
            assert_eq!(MeshShape::fewest_ranks(&config), ranks);
            assert_eq!(MeshShape::new(&config, ranks).unwrap().ranks(), ranks);
        }
    }

    #[test]
    fn groups_run_along_their_sides() {
        threads::run(8, |world| {
            let rank = world.rank() as u64;
            let config = DistributedConfig { dp_replicate_size: 2, tp_size: 2, ..config() };
            let mesh = Mesh::new(&config, world).unwrap();
            let members = |group: &Communicator| group.all_gather(&[rank]);
            assert_eq!(members(&mesh.data), [0, 2, 4, 6].map(|r| r + rank % 2));
            assert_eq!(members(&mesh.shard), [0, 2].map(|r| r + rank % 2 + rank / 4 * 4));
            assert_eq!(members(&mesh.replicate), [0, 4].map(|r| r + rank % 4));
        });
    }
}
