//! Fully sharded parameters: every rank keeps its part of each, and a layer's are gathered when they are needed.
//!
//! A sharded model is a [`Mistral4`] in which each parameter holds this rank's part, in one row; so the optimizer, which
//! looks at values alone, works on it as on a whole one. Parts end at multiples of a block, so that states that are
//! stored in blocks are the same on any number of ranks.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use bytemuck::cast_slice_mut;
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
        // Waiting for the lane counts as this rank's; what the lane itself waits beside the computing does not.
        let lane = Lane::new(&groups.others);
        let groups = groups.duplicate();
        let quantized = quantized_parts(model, holdings.sharded_quantized());
        Self { lane, groups, shapes: Arc::new(shapes), quantized, trained }
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

/// Parameters and quantised weights of a unit on the device, by key.
type WholeUnit = (HashMap<String, NamedValues>, GatheredQuantized);

/// Passes over a sharded model in one step.
pub struct ShardedStore<'a> {
    model: &'a Mistral4,
    sharding: &'a Sharding,
    device: Device,
    /// This rank's parts of each unit's parameters.
    parts: HashMap<Unit, Vec<(String, Tensor<1>)>>,
    ahead: Option<(Unit, Pending<GatheredUnit>)>,
    /// Units that were gathered and stay, where they do.
    kept: Option<HashMap<Unit, WholeUnit>>,
    gradients: &'a mut ShardedGradients,
    sums: VecDeque<Pending<Summed>>,
    sums_now: bool,
    sums_each: bool,
}

/// When ranks of a sharded model communicate.
#[derive(Debug, Clone, Copy)]
pub struct ShardingPolicy {
    /// Whether gradients are summed over the group after each pass, and not only after the last one (see
    /// [`ParameterStore::set_last`]), until which they wait.
    pub sums_each: bool,
    /// Whether what was gathered stays as long as the store.
    pub keeps_gathered: bool,
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
    /// Passes over a sharded model, whose gradients are summed over the group, each rank keeping its part.
    pub fn new(
        model: &'a Mistral4,
        sharding: &'a Sharding,
        gradients: &'a mut ShardedGradients,
        ShardingPolicy { sums_each, keeps_gathered }: ShardingPolicy,
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
            kept: keeps_gathered.then(HashMap::new),
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

    /// The whole parameters and quantised weights of a unit.
    fn gathered(&mut self, unit: Unit, next: Option<Unit>) -> WholeUnit {
        let kept = self.kept.as_ref().and_then(|kept| kept.get(&unit)).cloned();
        let whole = kept.unwrap_or_else(|| {
            let pending = match self.ahead.take() {
                Some((ahead, pending)) if ahead == unit => pending,
                other => {
                    assert!(other.is_none(), "the walk takes what it announced");
                    self.start_gather(unit)
                }
            };
            let (gathered, quantized) = pending.wait();
            let to_device = |Gathered { key, shape, values }| {
                let dtype = values.dtype();
                (key, (shape, Tensor::from_data(values, (&self.device, dtype))))
            };
            (gathered.into_iter().map(to_device).collect(), quantized)
        });
        if let Some(kept) = &mut self.kept {
            kept.insert(unit, whole.clone());
        }
        let is_here = |unit: &Unit| self.kept.as_ref().is_some_and(|kept| kept.contains_key(unit));
        if let Some(next) = next.filter(|next| !is_here(next)) {
            self.ahead = Some((next, self.start_gather(next)));
        }
        whole
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
    let whole = |(key, part): (String, Tensor<1>)| {
        let shape = shapes[&key].clone();
        let elements = shape.iter().product();
        let part = part.into_data();
        let mut values = match part.dtype() {
            DType::BF16 => TensorData::new(vec![bf16::ZERO; elements], [elements]),
            DType::F32 => TensorData::new(vec![0.0f32; elements], [elements]),
            other => unreachable!("parameters are stored in f32 or bf16, not in {other:?}"),
        };
        let mine = part_of(elements, group.rank(), group.size());
        let width = part.dtype().size();
        bytes_mut(&mut values)[mine.start * width..mine.end * width].copy_from_slice(part.as_bytes());
        Gathered { key, shape, values }
    };
    let mut gathered: Vec<Gathered> = parts.into_iter().map(whole).collect();
    let arrays = gathered.iter_mut().map(|Gathered { values, .. }| {
        let (elements, width) = (values.num_elements(), values.dtype().size());
        let mut rest = bytes_mut(values);
        let part = |rank: usize| {
            let bytes = part_of(elements, rank, group.size()).len() * width;
            rest.split_off_mut(..bytes).expect("parts cover the whole")
        };
        (0..group.size()).map(part).collect()
    });
    group.all_gather_parts(arrays.collect());
    gathered
}

/// The memory of values that were made by [`gather`].
fn bytes_mut(values: &mut TensorData) -> &mut [u8] {
    match values.dtype() {
        DType::BF16 => cast_slice_mut(values.as_mut_slice::<bf16>().expect("the data has this dtype")),
        _ => cast_slice_mut(values.as_mut_slice::<f32>().expect("the data has this dtype")),
    }
}

/// Sums gradients over the group; returns this rank's parts of those that any rank has.
fn sum_parts(
    group: &Communicator,
    whole: Vec<(String, Option<Tensor<1>>)>,
    shapes: &HashMap<String, Vec<usize>>,
) -> Summed {
    let present: Vec<u8> = whole.iter().map(|(_, gradient)| u8::from(gradient.is_some())).collect();
    let present = anywhere(group, &present);
    let sum = |(key, gradient): (String, Option<Tensor<1>>)| {
        let elements: usize = shapes[&key].iter().product();
        let mut values = match gradient {
            Some(gradient) => gradient.into_data().try_into_vec::<f32>().expect("gradients are f32"),
            None => vec![0.0; elements],
        };
        let part = |rank: usize| part_of(elements, rank, group.size());
        let counts: Vec<usize> = (0..group.size()).map(|rank| part(rank).len()).collect();
        group.reduce_scatter_sum(&mut values, &counts);
        (key, values[part(group.rank())].to_vec())
    };
    whole.into_iter().zip(present).filter(|(_, present)| *present).map(|(entry, _)| sum(entry)).collect()
}

/// Which of the flags are set on any rank.
pub(super) fn anywhere(group: &Communicator, flags: &[u8]) -> Vec<bool> {
    let all = group.all_gather(flags);
    (0..flags.len()).map(|i| all.iter().skip(i).step_by(flags.len()).any(|&flag| flag != 0)).collect()
}

#[cfg(test)]
mod tests;
