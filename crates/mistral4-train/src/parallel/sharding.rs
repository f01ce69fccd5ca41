//! Fully sharded parameters: every rank keeps its part of each, and a layer's are gathered when they are needed.
//!
//! A sharded model is a [`Mistral4`] in which each parameter holds this rank's part, in one row; so the optimizer, which
//! looks at values alone, works on it as on a whole one. Parts end at multiples of a block, so that states that are
//! stored in blocks are the same on any number of ranks.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;
use mistral4::model::Mistral4;
use mistral4::model::NamedQuantized;
use mistral4::model::decoder_layer::DecoderLayer;
use mistral4::model::linear::Linear;
use mistral4::model::norm::RmsNorm;
use mistral4::weights::{NamedValues, is_adapter, reshape_parameters};
use mistral4_kernels::{QuantizedMatrix, StackDims};

use super::{Communicator, Holdings, KeyGroups, Lane, Pending};
use crate::backward::{Gradients, ParameterStore, Unit};

/// Values that stay together on a rank: those of a block of 8-bit states.
pub(crate) const BLOCK: usize = mistral4_kernels::BLOCK_8BIT;
/// Sums of gradients that may be under way at once; each holds a layer's gradients.
const SUMS_UNDER_WAY: usize = 2;
/// The router's bias is read whole, is small, and is moved by every rank alike.
const KEPT_WHOLE: &str = "e_score_correction_bias";

/// The values of a parameter of `elements` values that the rank `rank` of `ranks` keeps.
pub fn part_of(elements: usize, rank: usize, ranks: usize) -> Range<usize> {
    let blocks = elements.div_ceil(BLOCK);
    let start = |rank: usize| (blocks * rank / ranks * BLOCK).min(elements);
    start(rank)..start(rank + 1)
}

/// Whether every rank keeps a parameter whole.
pub(crate) fn is_kept_whole(key: &str) -> bool {
    key.ends_with(KEPT_WHOLE) || is_adapter(key)
}

/// How a model is spread over a group of ranks.
pub struct Sharding {
    /// Ranks that keep a parameter together, for the lane alone.
    groups: KeyGroups,
    lane: Lane,
    /// Shapes, before sharding, of the parameters that are sharded, by key.
    shapes: Arc<HashMap<String, Vec<usize>>>,
    /// This rank's panels of each unit's quantised weights.
    quantized: HashMap<Unit, Vec<QuantizedPart>>,
    /// Units with trained parameters, and the keys of those that are spread.
    trained: HashMap<Unit, Arc<Vec<String>>>,
}

impl Sharding {
    /// For a model of which each rank keeps its shard of its part, as `holdings` say; collective.
    pub(crate) fn new(model: &Mistral4, holdings: &Holdings, groups: &KeyGroups) -> Self {
        let shapes = holdings.sharded_shapes();
        let mut trained: HashMap<Unit, Vec<String>> = HashMap::new();
        let prefix = model.text_prefix();
        for parameter in model.parameters().into_iter().filter(|parameter| parameter.trainable) {
            let keys = trained.entry(Unit::of(&parameter.key, prefix)).or_default();
            // Adapters are small, and whole on every rank.
            if shapes.contains_key(&parameter.key) {
                keys.push(parameter.key);
            }
        }
        let trained = trained.into_iter().map(|(unit, keys)| (unit, Arc::new(keys))).collect();
        let groups = groups.duplicate();
        let quantized = quantized_parts(model, holdings.sharded_quantized());
        Self { lane: Lane::new(&groups.others), groups, shapes: Arc::new(shapes), quantized, trained }
    }

    /// Shapes by key, to use on another thread.
    fn shapes(&self) -> Arc<HashMap<String, Vec<usize>>> {
        Arc::clone(&self.shapes)
    }
}

/// A parameter that was gathered.
struct Gathered {
    key: String,
    shape: Vec<usize>,
    values: TensorData,
}

/// This rank's panels of a quantised weight.
#[derive(Clone)]
struct QuantizedPart {
    key: String,
    panels: Arc<QuantizedMatrix>,
    /// Sizes of the whole.
    dims: StackDims,
}

/// Quantised weights that were gathered, by key.
type GatheredQuantized = HashMap<String, Arc<QuantizedMatrix>>;

/// Parameters and quantised weights of a unit.
type GatheredUnit = (Vec<Gathered>, GatheredQuantized);

/// This rank's panels of a model's quantised weights, of which `dims` tells the whole sizes.
fn quantized_parts(model: &Mistral4, dims: &HashMap<String, StackDims>) -> HashMap<Unit, Vec<QuantizedPart>> {
    let mut parts: HashMap<Unit, Vec<QuantizedPart>> = HashMap::new();
    let (prefix, mut text) = (model.text_prefix(), model.text().clone());
    let mut take = |unit, module: String, weights: Vec<NamedQuantized<'_>>| {
        for (name, weight) in weights {
            let key = format!("{prefix}{module}.{name}");
            if let Some(&dims) = dims.get(&key) {
                let panels = Arc::clone(&weight.weight);
                parts.entry(unit).or_default().push(QuantizedPart { key, panels, dims });
            }
        }
    };
    for (index, layer) in text.model.layers.iter_mut().enumerate() {
        take(Unit::Layer(index), format!("model.layers.{index}"), layer.quantized_mut());
    }
    take(Unit::Head, "lm_head".to_owned(), text.lm_head.quantized_mut());
    parts
}

/// Puts gathered weights in the place of a module's panels.
fn put_quantized(prefix: &str, weights: Vec<NamedQuantized<'_>>, gathered: &mut GatheredQuantized) {
    for (name, weight) in weights {
        if let Some(whole) = gathered.remove(&format!("{prefix}{name}")) {
            weight.weight = whole;
        }
    }
}

/// This rank's parts of gradients that were summed, by key.
type Summed = Vec<(String, Vec<f32>)>;

/// One pass over a sharded model.
pub struct ShardedStore<'a> {
    model: &'a Mistral4,
    sharding: &'a Sharding,
    device: Device,
    /// This rank's parts of each unit's parameters.
    parts: HashMap<Unit, Vec<(String, Tensor<1>)>>,
    ahead: Option<(Unit, Pending<GatheredUnit>)>,
    gradients: &'a mut ShardedGradients,
    sums: VecDeque<Pending<Summed>>,
    sums_now: bool,
    sums_each: bool,
}

/// Gradients of a sharded model.
#[derive(Debug, Default)]
pub struct ShardedGradients {
    /// This rank's parts, summed over the group.
    pub parts: Gradients,
    /// Whole gradients that wait to be summed over the group.
    waiting: Gradients,
}

impl<'a> ShardedStore<'a> {
    /// Passes over a sharded model. After the last one (see [`ParameterStore::set_last`]), or with `sums_each` after
    /// each, gradients are summed over the group, each rank keeping its part; until then they wait.
    pub fn new(
        model: &'a Mistral4,
        sharding: &'a Sharding,
        gradients: &'a mut ShardedGradients,
        sums_each: bool,
    ) -> Self {
        let mut parts: HashMap<Unit, Vec<(String, Tensor<1>)>> = HashMap::new();
        let prefix = model.text_prefix();
        for parameter in model.parameters() {
            if sharding.shapes.contains_key(&parameter.key) {
                parts
                    .entry(Unit::of(&parameter.key, prefix))
                    .or_default()
                    .push((parameter.key, parameter.values));
            }
        }
        let device = model.text().model.norm.weight.val().device();
        Self {
            model,
            sharding,
            device,
            parts,
            ahead: None,
            gradients,
            sums: VecDeque::new(),
            sums_now: sums_each,
            sums_each,
        }
    }

    fn start_gather(&self, unit: Unit) -> Pending<GatheredUnit> {
        let parts = self.parts.get(&unit).cloned().unwrap_or_default();
        let quantized = self.sharding.quantized.get(&unit).cloned().unwrap_or_default();
        let (shapes, groups) = (self.sharding.shapes(), self.sharding.groups.clone());
        self.sharding.lane.start(move |_| {
            let divided = groups.divide(parts, |(key, _)| key);
            let dense =
                divided.into_iter().flat_map(|(group, parts)| gather(group, parts, &shapes)).collect();
            let join = |QuantizedPart { key, panels, dims }: QuantizedPart| {
                let all = groups.of(&key).all_gather_varied(&panels.to_bytes());
                let whole = panels.joined(dims, all.iter().map(Vec::as_slice));
                (key, Arc::new(whole))
            };
            (dense, quantized.into_iter().map(join).collect())
        })
    }

    /// The whole parameters and quantised weights of a unit, by key.
    fn gathered(
        &mut self,
        unit: Unit,
        next: Option<Unit>,
    ) -> (HashMap<String, NamedValues>, GatheredQuantized) {
        let pending = match self.ahead.take() {
            Some((ahead, pending)) if ahead == unit => pending,
            other => {
                assert!(other.is_none(), "the walk takes what it announced");
                self.start_gather(unit)
            }
        };
        let (gathered, quantized) = pending.wait();
        self.ahead = next.map(|next| (next, self.start_gather(next)));
        let to_device = |Gathered { key, shape, values }| {
            let dtype = values.dtype();
            (key, (shape, Tensor::from_data(values, (&self.device, dtype))))
        };
        (gathered.into_iter().map(to_device).collect(), quantized)
    }

    fn keep_oldest_sum(&mut self) {
        let Some(sum) = self.sums.pop_front() else { return };
        for (key, values) in sum.wait() {
            let count = values.len();
            let part = Tensor::from_data(TensorData::new(values, [count]), (&self.device, DType::F32));
            self.gradients.parts.add(key, part);
        }
    }

    /// Waits for the sums under way.
    pub fn finish(mut self) {
        while !self.sums.is_empty() {
            self.keep_oldest_sum();
        }
    }
}

impl ParameterStore for ShardedStore<'_> {
    fn front(&mut self, next: Option<Unit>) -> Mistral4 {
        let (mut gathered, _) = self.gathered(Unit::Front, next);
        self.model.clone().reshape_parameters(|key, part| gathered.remove(key).unwrap_or(part))
    }

    fn layer(&mut self, index: usize, next: Option<Unit>) -> DecoderLayer {
        let (mut gathered, mut quantized) = self.gathered(Unit::Layer(index), next);
        let prefix = format!("{}model.layers.{index}.", self.model.text_prefix());
        let mut layer = self.model.text().model.layers[index].clone();
        put_quantized(&prefix, layer.quantized_mut(), &mut quantized);
        reshape_parameters(layer, |key, part| gathered.remove(&format!("{prefix}{key}")).unwrap_or(part))
    }

    fn head(&mut self, next: Option<Unit>) -> (RmsNorm, Linear) {
        let (mut gathered, mut quantized) = self.gathered(Unit::Head, next);
        let prefix = self.model.text_prefix();
        let text = self.model.text();
        let norm = reshape_parameters(text.model.norm.clone(), |key, part| {
            gathered.remove(&format!("{prefix}model.norm.{key}")).unwrap_or(part)
        });
        let mut lm_head = text.lm_head.clone();
        put_quantized(&format!("{prefix}lm_head."), lm_head.quantized_mut(), &mut quantized);
        let lm_head = reshape_parameters(lm_head, |key, part| {
            gathered.remove(&format!("{prefix}lm_head.{key}")).unwrap_or(part)
        });
        (norm, lm_head)
    }

    fn trains(&self, unit: Unit) -> bool {
        self.sharding.trained.contains_key(&unit)
    }

    fn set_last(&mut self, is_last: bool) {
        self.sums_now = is_last || self.sums_each;
    }

    fn add(&mut self, unit: Unit, gradients: Vec<(String, Tensor<1>)>) {
        let ShardedGradients { parts, waiting } = &mut *self.gradients;
        for (key, gradient) in gradients {
            let is_spread = self.sharding.shapes.contains_key(&key);
            let to = if is_spread { &mut *waiting } else { &mut *parts };
            to.add(key, gradient);
        }
        let Some(keys) = self.sharding.trained.get(&unit).filter(|_| self.sums_now) else { return };
        let whole: Vec<(String, Option<Tensor<1>>)> =
            keys.iter().map(|key| (key.clone(), waiting.remove(key))).collect();
        while self.sums.len() >= SUMS_UNDER_WAY {
            self.keep_oldest_sum();
        }
        let (shapes, groups) = (self.sharding.shapes(), self.sharding.groups.clone());
        let sum = self.sharding.lane.start(move |_| {
            let divided = groups.divide(whole, |(key, _)| key);
            divided.into_iter().flat_map(|(group, whole)| sum_parts(group, whole, &shapes)).collect()
        });
        self.sums.push_back(sum);
    }
}

/// Everybody's parts of parameters, put together.
fn gather(
    group: &Communicator,
    parts: Vec<(String, Tensor<1>)>,
    shapes: &HashMap<String, Vec<usize>>,
) -> Vec<Gathered> {
    let mut mine = Vec::new();
    let mut layout = Vec::with_capacity(parts.len());
    for (key, part) in parts {
        let data = part.into_data();
        layout.push((shapes[&key].clone(), data.dtype(), key));
        mine.extend_from_slice(data.as_bytes());
    }
    let bytes = |(shape, dtype, _): &(Vec<usize>, DType, String), rank: usize| {
        let part = part_of(shape.iter().product(), rank, group.size());
        part.start * dtype.size()..part.end * dtype.size()
    };
    let counts: Vec<usize> =
        (0..group.size()).map(|rank| layout.iter().map(|entry| bytes(entry, rank).len()).sum()).collect();
    let mut all = vec![0u8; counts.iter().sum()];
    group.all_gather_into(&mine, &counts, &mut all);
    drop(mine);
    // Where the next parameter's part lies in what each rank gave.
    let mut at: Vec<usize> = counts
        .iter()
        .scan(0, |end, count| {
            *end += count;
            Some(*end - count)
        })
        .collect();
    let mut fill = |entry: &(Vec<usize>, DType, String), whole: &mut [u8]| {
        for (rank, at) in at.iter_mut().enumerate() {
            let place = bytes(entry, rank);
            let from = *at..*at + place.len();
            *at = from.end;
            whole[place].copy_from_slice(&all[from]);
        }
    };
    let mut gathered = Vec::with_capacity(layout.len());
    for entry in layout {
        let elements = entry.0.iter().product();
        let values = match entry.1 {
            DType::BF16 => {
                let mut whole = vec![bf16::ZERO; elements];
                fill(&entry, cast_slice_mut(&mut whole));
                TensorData::new(whole, [elements])
            }
            DType::F32 => {
                let mut whole = vec![0.0f32; elements];
                fill(&entry, cast_slice_mut(&mut whole));
                TensorData::new(whole, [elements])
            }
            other => unreachable!("parameters are stored in f32 or bf16, not in {other:?}"),
        };
        gathered.push(Gathered { key: entry.2, shape: entry.0, values });
    }
    gathered
}

/// Sums gradients over the group; returns this rank's parts of those that any rank has.
fn sum_parts(
    group: &Communicator,
    whole: Vec<(String, Option<Tensor<1>>)>,
    shapes: &HashMap<String, Vec<usize>>,
) -> Vec<(String, Vec<f32>)> {
    let present: Vec<u8> = whole.iter().map(|(_, gradient)| u8::from(gradient.is_some())).collect();
    let present = anywhere(group, &present);
    let ranks = group.size();
    let gradients: Vec<(String, usize, Option<TensorData>)> = whole
        .into_iter()
        .zip(present)
        .filter(|(_, present)| *present)
        .map(|((key, gradient), _)| {
            let elements = shapes[&key].iter().product();
            (key, elements, gradient.map(|gradient| gradient.into_data()))
        })
        .collect();
    let part_lengths = |rank: usize| gradients.iter().map(move |&(_, n, _)| part_of(n, rank, ranks).len());
    let counts: Vec<usize> = (0..ranks).map(|rank| part_lengths(rank).sum()).collect();
    let mut values: Vec<f32> = Vec::with_capacity(counts.iter().sum());
    for rank in 0..ranks {
        for (_, elements, gradient) in &gradients {
            let part = part_of(*elements, rank, ranks);
            match gradient {
                Some(gradient) => {
                    values.extend_from_slice(&cast_slice::<u8, f32>(gradient.as_bytes())[part]);
                }
                None => values.resize(values.len() + part.len(), 0.0),
            }
        }
    }
    let mut rest = &group.reduce_scatter_sum(&values, &counts)[..];
    let mut parts = Vec::with_capacity(gradients.len());
    for ((key, ..), length) in gradients.iter().zip(part_lengths(group.rank())) {
        let (part, after) = rest.split_at(length);
        parts.push((key.clone(), part.to_vec()));
        rest = after;
    }
    parts
}

/// Which of the flags are set on any rank.
pub(super) fn anywhere(group: &Communicator, flags: &[u8]) -> Vec<bool> {
    let all = group.all_gather(flags);
    (0..flags.len()).map(|i| all.iter().skip(i).step_by(flags.len()).any(|&flag| flag != 0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_blocks_and_cover_everything() {
        for (elements, ranks) in [(0, 3), (1, 2), (256, 2), (1000, 3), (65_536, 4)] {
            let parts: Vec<_> = (0..ranks).map(|rank| part_of(elements, rank, ranks)).collect();
            assert_eq!((parts[0].start, parts[ranks - 1].end), (0, elements));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(parts.iter().all(|part| part.start.is_multiple_of(BLOCK) || part.start == elements));
        }
        assert_eq!(part_of(65_536, 1, 4), 16_384..32_768);
    }
}
