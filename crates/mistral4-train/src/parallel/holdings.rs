//! Which values of each parameter every rank of a mesh keeps.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mistral4::weights::{ParameterSource, Part, Partition, PartitionSource, SourceAdapter};
use mistral4_checkpoint::weights::{DType, HostData, HostTensor, QuantizedMatrix};
use mistral4_kernels::StackDims;

use super::groups::is_expert;
use super::mesh::{MeshShape, Place};
use super::sharding::{BLOCK, is_kept_whole, part_of};

/// How the parameters of a model are divided over a mesh, as far as it can be said without the model.
#[derive(Debug, Clone)]
pub struct Division {
    /// The mesh.
    pub mesh: MeshShape,
    /// Whether ranks with the same part of the model each keep but a shard of it.
    pub is_sharded: bool,
    /// The part of the model of each rank, by world rank.
    pub partitions: Arc<[Partition]>,
}

impl Division {
    /// Ranks that could share the values of a parameter within a replica, and which of them `place` is.
    fn sharers(&self, key: &str, place: Place) -> (usize, usize) {
        match is_expert(key) {
            true => (self.mesh.dp_shard / self.mesh.ep, place.dp_shard / self.mesh.ep),
            false => (self.mesh.dp_shard, place.dp_shard),
        }
    }

    /// What a rank keeps of a parameter of a whole shape; `None`: it belongs to other stages.
    pub fn held(&self, key: &str, shape: &[usize], rank: usize) -> Option<Held> {
        let part = self.partitions[rank].part(key, shape)?;
        let range = self.shard(key, &part, self.mesh.place(rank));
        Some(Held { part, range })
    }

    /// The values of the rank's part of a parameter that the rank keeps.
    fn shard(&self, key: &str, part: &Part, place: Place) -> Range<usize> {
        let (ranks, rank) = self.sharers(key, place);
        match self.is_sharded && !is_kept_whole(key) {
            true => part_of(part.elements(), rank, ranks),
            false => 0..part.elements(),
        }
    }
}

/// What a rank keeps of a parameter.
#[derive(Debug, Clone)]
pub struct Held {
    /// Its part of the model's parameter.
    pub part: Part,
    /// The values of that part, flat.
    pub range: Range<usize>,
}

impl Held {
    /// Where the values lie in the whole parameter, flat.
    pub fn runs(&self) -> Vec<Range<usize>> {
        let mut at = 0;
        let mut runs = Vec::new();
        for run in self.part.runs() {
            let start = self.range.start.clamp(at, at + run.len());
            let end = self.range.end.clamp(at, at + run.len());
            if start < end {
                runs.push(run.start + start - at..run.start + end - at);
            }
            at += run.len();
        }
        runs
    }
}

impl Held {
    /// Where the blocks of `BLOCK` values that the rank keeps lie among those of the whole parameter; `None`: it keeps
    /// parts of blocks.
    pub fn blocks(&self) -> Option<Vec<Range<usize>>> {
        let end = self.part.full_elements();
        let blocks = |run: Range<usize>| {
            let is_aligned =
                run.start.is_multiple_of(BLOCK) && (run.end.is_multiple_of(BLOCK) || run.end == end);
            is_aligned.then(|| run.start / BLOCK..run.end.div_ceil(BLOCK))
        };
        self.runs().into_iter().map(blocks).collect()
    }
}

/// Which values of each parameter every rank keeps.
#[derive(Debug, Clone)]
pub struct Holdings {
    division: Division,
    rank: usize,
    /// Whole shapes of all parameters of the model, by key.
    shapes: Arc<HashMap<String, Vec<usize>>>,
    /// Sizes, before sharding, of the quantised weights that are sharded, by key.
    quantized: HashMap<String, StackDims>,
}

impl Holdings {
    /// The whole shape of a parameter of the model, wherever it is.
    ///
    /// # Panics
    /// When the model has no such parameter.
    pub fn shape(&self, key: &str) -> &[usize] {
        self.shapes.get(key).unwrap_or_else(|| panic!("{key} is no parameter of the model"))
    }

    /// What a rank keeps of a parameter; `None`: it belongs to other stages.
    pub fn held(&self, key: &str, rank: usize) -> Option<Held> {
        self.division.held(key, self.shape(key), rank)
    }

    /// The values of this rank's part of a parameter that the rank `rank` of those that keep it together has.
    pub(crate) fn shard(&self, key: &str, rank: usize) -> Range<usize> {
        let (ranks, _) = self.division.sharers(key, self.division.mesh.place(self.rank));
        self.mine(key).map_or(0..0, |held| part_of(held.part.elements(), rank, ranks))
    }

    /// What this rank keeps of a parameter.
    pub fn mine(&self, key: &str) -> Option<Held> {
        self.held(key, self.rank)
    }

    /// Where what this rank keeps lies in a stored tensor of `elements` values that belongs to a parameter; `None`: it
    /// keeps nothing of it. All of a tensor that is no parameter's, for others to judge.
    pub fn runs(&self, key: &str, elements: usize) -> Option<Vec<Range<usize>>> {
        match self.shapes.get(key) {
            Some(shape) if shape.iter().product::<usize>() == elements => {
                self.mine(key).map(|held| held.runs())
            }
            _ => Some(std::iter::once(0..elements).collect()),
        }
    }

    /// As [`Holdings::runs`], of a stored tensor with a value for each of `blocks` blocks of a parameter.
    pub fn block_runs(&self, key: &str, blocks: usize) -> Option<Vec<Range<usize>>> {
        match self.shapes.get(key) {
            Some(shape) if shape.iter().product::<usize>().div_ceil(BLOCK) == blocks => {
                self.mine(key)?.blocks()
            }
            _ => Some(std::iter::once(0..blocks).collect()),
        }
    }

    /// Whether every rank keeps whole blocks of a parameter.
    pub fn keeps_blocks(&self, key: &str) -> bool {
        let mut ranks = 0..self.division.mesh.ranks();
        ranks.all(|rank| self.held(key, rank).is_none_or(|held| held.blocks().is_some()))
    }

    /// Local shapes, before sharding, of the parameters that are sharded, by key.
    pub(crate) fn sharded_shapes(&self) -> HashMap<String, Vec<usize>> {
        let keys = self.shapes.keys().filter(|key| self.division.is_sharded && !is_kept_whole(key));
        keys.filter_map(|key| Some((key.clone(), self.mine(key)?.part.shape()))).collect()
    }

    /// Sizes, before sharding, of the quantised weights that are sharded, by key.
    pub(crate) fn sharded_quantized(&self) -> &HashMap<String, StackDims> {
        &self.quantized
    }

    /// Whether tensor parallelism divides a parameter.
    fn is_divided(&self, key: &str) -> bool {
        let whole = Partition {
            tensor: mistral4::weights::Share::WHOLE,
            ..self.division.partitions[self.rank].clone()
        };
        let part = |partition: &Partition| partition.part(key, self.shape(key));
        part(&whole) != part(&self.division.partitions[self.rank])
    }

    /// Whether this rank begins with token ids and images.
    pub fn has_embeddings(&self) -> bool {
        self.division.partitions[self.rank].has_embeddings
    }

    /// Whether the first rank keeps every parameter whole.
    pub fn first_has_all(&self) -> bool {
        let mesh = &self.division.mesh;
        let shards = if self.division.is_sharded { mesh.dp_shard } else { 1 };
        mesh.pp * mesh.tp * mesh.ep * shards == 1
    }

    /// Ranks that keep the same values of a parameter as this one, itself included.
    pub fn copies(&self, key: &str) -> usize {
        let mesh = &self.division.mesh;
        let tensor = if self.is_divided(key) { 1 } else { mesh.tp };
        let (sharers, _) = self.division.sharers(key, mesh.place(self.rank));
        let sharers = if self.division.is_sharded && !is_kept_whole(key) { 1 } else { sharers };
        tensor * sharers * mesh.dp_replicate * mesh.cp
    }

    /// Ranks that together keep each value of a parameter once.
    pub fn keepers(&self, key: &str) -> Vec<(usize, Held)> {
        let mesh = &self.division.mesh;
        let mut keepers: Vec<(usize, Held)> = Vec::new();
        for rank in 0..mesh.ranks() {
            let Some(held) = self.held(key, rank).filter(|_| mesh.place(rank).dp_replicate == 0) else {
                continue;
            };
            let same = |(_, other): &(usize, Held)| other.part == held.part && other.range == held.range;
            if !keepers.iter().any(same) {
                keepers.push((rank, held));
            }
        }
        keepers
    }
}

/// A source of parameters of which a rank takes what it keeps; remembers the whole shapes of all.
pub(crate) struct HeldSource<'a> {
    source: PartitionSource<'a>,
    division: Division,
    rank: usize,
    shapes: Mutex<HashMap<String, Vec<usize>>>,
    quantized: Mutex<HashMap<String, StackDims>>,
}

impl<'a> HeldSource<'a> {
    /// What the rank `rank` keeps of the parameters of `source`.
    pub(crate) fn new(source: &'a dyn ParameterSource, division: &'a Division, rank: usize) -> Self {
        let source = PartitionSource { source, partition: &division.partitions[rank] };
        let (shapes, quantized) = Default::default();
        Self { source, division: division.clone(), rank, shapes, quantized }
    }

    /// What every rank keeps of the parameters and adapters that were asked for.
    pub(crate) fn into_holdings(self) -> Holdings {
        let shapes = self.shapes.into_inner().unwrap_or_else(PoisonError::into_inner);
        let quantized = self.quantized.into_inner().unwrap_or_else(PoisonError::into_inner);
        Holdings { division: self.division, rank: self.rank, shapes: Arc::new(shapes), quantized }
    }
}

impl ParameterSource for HeldSource<'_> {
    fn dtype(&self) -> DType {
        self.source.dtype()
    }

    fn adapter(&self, module: &str, shape: &[usize]) -> mistral4::Result<Option<SourceAdapter>> {
        if let Some(whole) = self.source.source.adapter(module, shape)? {
            self.shapes.lock().unwrap_or_else(PoisonError::into_inner).extend(whole.shapes(module));
        }
        self.source.adapter(module, shape)
    }

    /// Of the experts some, and of what is sharded some panels of 16 rows. What tensor parallelism divides is dense.
    fn quantized(&self, key: &str, shape: &[usize]) -> mistral4::Result<Option<QuantizedMatrix>> {
        let part = self.division.partitions[self.rank].part(key, shape);
        let Some(first) = part.filter(|part| stays_quantized(part, shape)).and_then(|p| p.of_first_axis())
        else {
            return Ok(None);
        };
        let Some(mut weight) = self.source.source.quantized(key, shape)? else { return Ok(None) };
        if first != (0..shape[0]) {
            let each = weight.dims().matrices / shape[0];
            weight = weight.matrices(first.start * each..first.end * each);
        }
        if self.division.is_sharded {
            self.quantized
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(key.to_owned(), weight.dims());
            let (ranks, rank) = self.division.sharers(key, self.division.mesh.place(self.rank));
            let panels = weight.all_panels();
            weight = weight.panels_as_matrix(panels * rank / ranks..panels * (rank + 1) / ranks);
        }
        Ok(Some(weight))
    }

    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> mistral4::Result<HostTensor> {
        self.shapes.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), shape.to_vec());
        let Some(held) = self.division.held(key, shape, self.rank) else {
            return self.source.tensor(key, shape, f32);
        };
        let is_sharded = self.division.is_sharded && !is_kept_whole(key);
        let shape_here = match is_sharded {
            true => [vec![1; shape.len() - 1], vec![held.range.len()]].concat(),
            false => held.part.shape(),
        };
        if let Some(weight) = self.source.source.quantized(key, shape)? {
            let data = dense(&weight, self.dtype(), &held.runs());
            return Ok(HostTensor { shape: shape_here, data });
        }
        if !is_sharded {
            return self.source.tensor(key, shape, f32);
        }
        let HostTensor { data, .. } = self.source.part(key, shape, f32, held.range)?;
        Ok(HostTensor { shape: shape_here, data })
    }
}

/// Whether a rank keeps its part of a quantised weight quantised: all of it, or some of the experts.
pub(crate) fn stays_quantized(part: &Part, shape: &[usize]) -> bool {
    part.is_whole() || (shape.len() == 3 && part.of_first_axis().is_some())
}

/// Some values of a quantised weight.
fn dense(weight: &QuantizedMatrix, dtype: DType, runs: &[Range<usize>]) -> HostData {
    fn values<T: mistral4_kernels::Element>(
        weight: &QuantizedMatrix,
        zero: T,
        runs: &[Range<usize>],
    ) -> Vec<T> {
        let StackDims { matrices, rows, columns } = weight.dims();
        let mut whole = vec![zero; matrices * rows * columns];
        for (matrix, values) in whole.chunks_exact_mut((rows * columns).max(1)).enumerate() {
            weight.dequantize(matrix, values);
        }
        runs.iter().flat_map(|run| whole[run.clone()].iter().copied()).collect()
    }
    match dtype {
        DType::BF16 => HostData::BF16(values(weight, half::bf16::ZERO, runs)),
        _ => HostData::F32(values(weight, 0.0, runs)),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use mistral4::Mistral4;
    use mistral4::model::moe::MoeOptions;
    use mistral4::weights::InitialSource;
    use mistral4_checkpoint::config::{ConfigFile, ConfigOptions};

    use super::*;
    use crate::recipe::DistributedConfig;

    /// Counts the values that are asked for of each parameter.
    struct Counting<'a> {
        source: InitialSource<'a>,
        read: Mutex<HashMap<String, usize>>,
    }

    impl Counting<'_> {
        fn count(&self, key: &str, values: usize) {
            *self.read.lock().unwrap().entry(key.to_owned()).or_default() += values;
        }
    }

    impl ParameterSource for Counting<'_> {
        fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> mistral4::Result<HostTensor> {
            self.count(key, shape.iter().product());
            self.source.tensor(key, shape, f32)
        }

        fn part(
            &self,
            key: &str,
            shape: &[usize],
            f32: bool,
            range: Range<usize>,
        ) -> mistral4::Result<HostTensor> {
            self.count(key, range.len());
            self.source.part(key, shape, f32, range)
        }

        fn dtype(&self) -> DType {
            self.source.dtype()
        }
    }

    #[test]
    fn a_rank_asks_for_its_part_of_sharded_parameters_alone() {
        let config = ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap().text_only().config;
        let distributed = DistributedConfig { ep_size: 2, ..DistributedConfig::default() };
        let mesh = MeshShape::new(&distributed, 4).unwrap();
        let division = Division::new(mesh, true, &config, distributed.pipeline).unwrap();
        let mut sharded = HashMap::<String, usize>::new();
        let mut wholes = HashMap::new();
        for rank in 0..4 {
            let source = InitialSource::new(&config, 3, DType::F32);
            let counting = Counting { source, read: Mutex::default() };
            let held = HeldSource::new(&counting, &division, rank);
            Mistral4::new(&config, MoeOptions::default(), &held, &Device::flex()).unwrap();
            let shapes = held.into_holdings().shapes;
            for (key, read) in counting.read.into_inner().unwrap() {
                let whole = shapes[&key].iter().product::<usize>();
                if is_kept_whole(&key) {
                    assert_eq!(read, whole, "{key} of rank {rank}");
                } else {
                    let of_rank = division.held(&key, &shapes[&key], rank).unwrap().range.len();
                    assert_eq!(read, of_rank, "{key} of rank {rank}");
                    *sharded.entry(key.clone()).or_default() += read;
                    wholes.insert(key, whole);
                }
            }
        }
        assert!(sharded.len() > 10 && sharded == wholes, "the ranks' parts are all of each parameter, once");
    }
}
