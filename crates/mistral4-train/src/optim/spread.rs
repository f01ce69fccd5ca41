//! What updates need to know of parameters that are spread over ranks.

use super::muon::Matrices;
use crate::parallel::holdings::Held;
use crate::parallel::{Holdings, KeyGroups};

/// How parameters are spread over ranks.
#[derive(Debug, Clone)]
pub struct Spread {
    /// What every rank keeps.
    pub holdings: Holdings,
    /// Ranks that keep a parameter together, each its shard.
    pub shards: KeyGroups,
}

impl Spread {
    /// The shape of a parameter over all ranks.
    pub(super) fn whole_shape(&self, key: &str) -> &[usize] {
        self.holdings.shape(key)
    }

    /// What this rank keeps of a parameter, as matrices.
    pub(super) fn matrices(&self, key: &str) -> Matrices {
        let Held { part, range } = self.holdings.mine(key).expect("a rank moves what it keeps");
        let matrices = Matrices::whole(key, &part.shape());
        if range.len() == part.elements() {
            return matrices;
        }
        let group = self.shards.of(key);
        let shards = (0..group.size()).map(|rank| self.holdings.shard(key, rank)).collect();
        matrices.over(group, shards)
    }
}
