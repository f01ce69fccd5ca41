//! Which part of a model a rank holds, tensor by tensor.

use std::ops::Range;

use mistral4_checkpoint::weights::{DType, HostData, HostTensor};

use super::adapted::split;
use super::{ParameterSource, SourceAdapter};
use crate::error::Result;
use crate::model::dropout::DropoutPosition;

/// One of equal parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which part, from 0.
    pub index: usize,
    /// Number of parts.
    pub of: usize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { index: 0, of: 1 };

    /// The part of `0..size`.
    fn range(self, size: usize) -> Range<usize> {
        assert_eq!(size % self.of, 0, "a layout is checked against the model before it is used");
        let each = size / self.of;
        self.index * each..(self.index + 1) * each
    }
}

/// The part of a model that one rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Heads of attention and columns of feed-forwards.
    pub tensor: Share,
    /// Experts.
    pub expert: Share,
    /// Decoder layers, by index.
    pub layers: Vec<Range<usize>>,
    /// Whether it holds what comes before the layers: embeddings, vision tower, projector.
    pub has_embeddings: bool,
    /// Whether it holds what comes after them: the final norm and the head.
    pub has_head: bool,
}

impl Partition {
    /// All of a model of so many layers.
    pub fn whole(layers: usize) -> Self {
        Self {
            tensor: Share::WHOLE,
            expert: Share::WHOLE,
            layers: std::iter::once(0..layers).collect(),
            has_embeddings: true,
            has_head: true,
        }
    }

    /// The part of the parameter `key`; `None` when it belongs to another stage.
    ///
    /// Embeddings, head, norms, routers and the projections to the latents are whole wherever they are. An adapter is
    /// divided as its weight: A by inputs, B and magnitude by outputs.
    pub fn part(&self, key: &str, shape: &[usize]) -> Option<Part> {
        let text = key.strip_prefix("language_model.").unwrap_or(key);
        let layer = text.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let held = match layer.and_then(|(index, _)| index.parse::<usize>().ok()) {
            Some(index) => self.layers.iter().any(|layers| layers.contains(&index)),
            None if text.starts_with("model.norm.") || text.starts_with("lm_head.") => self.has_head,
            None => self.has_embeddings,
        };
        held.then(|| match layer {
            Some((_, name)) => self.layer_part(name, shape),
            None => Part::whole(shape),
        })
    }

    fn layer_part(&self, name: &str, shape: &[usize]) -> Part {
        let mut part = Part::whole(shape);
        let last = shape.len().saturating_sub(1);
        let before = last.checked_sub(1);
        // The map, and which axes are its outputs and its inputs.
        let (map, outputs, inputs) = match split(name) {
            Some((map, "a")) => (map, None, Some(last)),
            Some((map, "b")) => (map, before, None),
            Some((map, _)) => (map, Some(last), None),
            None => (name.strip_suffix(".weight").unwrap_or(name), before, Some(last)),
        };
        let (module, leaf) = map.rsplit_once('.').unwrap_or(("", map));
        if module.starts_with("mlp.experts") {
            part.axes[0] = vec![self.expert.range(shape[0])];
        }
        match (leaf, outputs, inputs) {
            ("q_proj" | "q_b_proj" | "kv_b_proj" | "gate_proj" | "up_proj", Some(axis), _)
            | ("o_proj" | "down_proj", _, Some(axis)) => {
                part.axes[axis] = vec![self.tensor.range(shape[axis])];
            }
            // Of the gate's rows, and of the up projection's below them.
            ("gate_up_proj", Some(axis), _) if self.tensor != Share::WHOLE => {
                let width = shape[axis] / 2;
                let gate = self.tensor.range(width);
                part.axes[axis] = vec![gate.clone(), width + gate.start..width + gate.end];
            }
            _ => {}
        }
        part
    }
}

/// A part of a tensor: of every axis some ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    full: Vec<usize>,
    axes: Vec<Vec<Range<usize>>>,
}

impl Part {
    /// All of a tensor.
    pub fn whole(shape: &[usize]) -> Self {
        let axes = shape.iter().map(|&size| std::iter::once(0..size).collect()).collect();
        Self { full: shape.to_vec(), axes }
    }

    /// Whether it is all of the tensor.
    pub fn is_whole(&self) -> bool {
        *self == Self::whole(&self.full)
    }

    /// The range of the first axis, where the part is all of the tensor on every other.
    pub fn of_first_axis(&self) -> Option<Range<usize>> {
        let (first, rest) = self.axes.split_first()?;
        let is_all = |(ranges, &size): (&Vec<Range<usize>>, &usize)| matches!(ranges.as_slice(), [all] if *all == (0..size));
        match first.as_slice() {
            [range] if rest.iter().zip(&self.full[1..]).all(is_all) => Some(range.clone()),
            _ => None,
        }
    }

    /// Shape of the part.
    pub fn shape(&self) -> Vec<usize> {
        self.axes.iter().map(|ranges| ranges.iter().map(Range::len).sum()).collect()
    }

    /// Number of values of the whole tensor.
    pub fn full_elements(&self) -> usize {
        self.full.iter().product()
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Where the part's values lie in the flat tensor, in their order, as long runs as there are.
    pub fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = std::iter::once(0..1).collect();
        for (&size, ranges) in self.full.iter().zip(&self.axes) {
            runs = match ranges.as_slice() {
                [all] if *all == (0..size) => {
                    runs.into_iter().map(|run| run.start * size..run.end * size).collect()
                }
                some => runs
                    .into_iter()
                    .flatten()
                    .flat_map(|at| some.iter().map(move |r| at * size + r.start..at * size + r.end))
                    .collect(),
            };
        }
        runs
    }

    /// The stretch of the flat tensor in which the part lies, and where in it.
    fn span(&self) -> (Range<usize>, Vec<Range<usize>>) {
        let mut runs = self.runs();
        let span = runs.first().map_or(0, |run| run.start)..runs.last().map_or(0, |run| run.end);
        runs.iter_mut().for_each(|run| *run = run.start - span.start..run.end - span.start);
        (span, runs)
    }

    /// Takes the part out of a whole tensor.
    ///
    /// # Shapes
    /// - `whole`: flat, output: flat
    pub fn take<T: Copy>(&self, whole: &[T]) -> Vec<T> {
        self.runs().into_iter().flat_map(|run| whole[run].iter().copied()).collect()
    }

    /// Puts the part in its place in a whole tensor.
    ///
    /// # Shapes
    /// - `part`, `whole`: flat
    pub fn put<T: Copy>(&self, mut part: &[T], whole: &mut [T]) {
        for run in self.runs() {
            let (values, rest) = part.split_at(run.len());
            whole[run].copy_from_slice(values);
            part = rest;
        }
    }
}

/// The parameters of one rank's part; those of other stages have no elements.
pub struct PartitionSource<'a> {
    /// Gives whole parameters.
    pub source: &'a dyn ParameterSource,
    /// What the rank holds.
    pub partition: &'a Partition,
}

impl ParameterSource for PartitionSource<'_> {
    fn dtype(&self) -> DType {
        self.source.dtype()
    }

    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor> {
        match self.partition.part(key, shape) {
            None => Ok(HostTensor::f32(vec![0; shape.len()], Vec::new())),
            Some(part) if part.is_whole() => self.source.tensor(key, shape, f32),
            Some(part) => {
                let (span, runs) = part.span();
                let HostTensor { data, .. } = self.source.part(key, shape, f32, span)?;
                Ok(HostTensor { shape: part.shape(), data: pick(data, &runs) })
            }
        }
    }

    fn adapter(&self, module: &str, shape: &[usize]) -> Result<Option<SourceAdapter>> {
        let Some(mut adapter) = self.source.adapter(module, shape)? else { return Ok(None) };
        if let Some(dropout) = adapter.dropout.take() {
            // Dropout is of the map's inputs, or of its outputs.
            let axis = usize::from(dropout.position == DropoutPosition::Pre);
            let part = self.partition.part(&format!("{module}.weight"), shape);
            adapter.dropout = part.map(|part| match part.axes[axis].as_slice() {
                [columns] => dropout.of_columns(columns.clone(), shape[axis]),
                _ => unreachable!("linear maps are divided in one piece"),
            });
        }
        Ok(adapter.map(module, |key, tensor| {
            let part = self.partition.part(key, &tensor.shape)?;
            Some(HostTensor { shape: part.shape(), data: pick(tensor.data, &part.runs()) })
        }))
    }

    fn shape(&self, key: &str, shape: &[usize]) -> Option<Vec<usize>> {
        self.partition.part(key, shape).map(|part| part.shape())
    }

    fn part(&self, key: &str, shape: &[usize], f32: bool, range: Range<usize>) -> Result<HostTensor> {
        let part = self.partition.part(key, shape).map(|part| part.span());
        match part {
            // The part lies in one piece, as all but columns do.
            Some((span, runs)) if runs.len() == 1 => {
                self.source.part(key, shape, f32, span.start + range.start..span.start + range.end)
            }
            _ => {
                let HostTensor { data, .. } = self.tensor(key, shape, f32)?;
                Ok(HostTensor { shape: vec![range.len()], data: pick(data, &[range]) })
            }
        }
    }
}

/// The values of some runs.
fn pick(data: HostData, runs: &[Range<usize>]) -> HostData {
    fn of<T: Copy>(values: &[T], runs: &[Range<usize>]) -> Vec<T> {
        runs.iter().flat_map(|run| values[run.clone()].iter().copied()).collect()
    }
    let is_all = |count: usize| matches!(runs, [run] if *run == (0..count));
    match &data {
        HostData::F32(values) if !is_all(values.len()) => HostData::F32(of(values, runs)),
        HostData::BF16(values) if !is_all(values.len()) => HostData::BF16(of(values, runs)),
        HostData::F16(values) if !is_all(values.len()) => HostData::F16(of(values, runs)),
        _ => data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_tensor_once() {
        let shape = [4, 12, 5];
        let whole: Vec<usize> = (0..shape.iter().product()).collect();
        let mut together = vec![usize::MAX; whole.len()];
        for expert in 0..2 {
            for tensor in 0..3 {
                let partition = Partition {
                    tensor: Share { index: tensor, of: 3 },
                    expert: Share { index: expert, of: 2 },
                    ..Partition::whole(2)
                };
                let part = partition.part("model.layers.1.mlp.experts.gate_up_proj", &shape).unwrap();
                assert_eq!(part.shape(), [2, 4, 5]);
                let values = part.take(&whole);
                // The gate's rows come first: the part is a gate and an up projection itself.
                assert_eq!(values[0], expert * 120 + tensor * 10);
                assert_eq!(values[10], expert * 120 + 30 + tensor * 10);
                assert_eq!(part.elements(), values.len());
                part.put(&values, &mut together);
            }
        }
        assert_eq!(together, whole);
    }

    #[test]
    fn names_decide_what_is_split() {
        let partition = Partition {
            tensor: Share { index: 1, of: 2 },
            expert: Share { index: 0, of: 2 },
            layers: vec![0..1, 3..4],
            has_embeddings: false,
            has_head: true,
        };
        let shape = |key: &str, shape: &[usize]| partition.part(key, shape).map(|part| part.shape());
        let attention = "language_model.model.layers.3.self_attn";
        assert_eq!(shape(&format!("{attention}.kv_b_proj.weight"), &[8, 3]), Some(vec![4, 3]));
        assert_eq!(shape(&format!("{attention}.o_proj.weight"), &[3, 8]), Some(vec![3, 4]));
        assert_eq!(shape(&format!("{attention}.o_proj.bias"), &[3]), Some(vec![3]));
        assert_eq!(shape(&format!("{attention}.q_a_proj.weight"), &[8, 3]), Some(vec![8, 3]));
        assert_eq!(shape(&format!("{attention}.o_proj.lora.a"), &[2, 8]), Some(vec![2, 4]));
        assert_eq!(shape(&format!("{attention}.o_proj.lora.b"), &[3, 2]), Some(vec![3, 2]));
        assert_eq!(shape(&format!("{attention}.o_proj.lora.magnitude"), &[3]), Some(vec![3]));
        assert_eq!(shape(&format!("{attention}.kv_b_proj.lora.a"), &[2, 3]), Some(vec![2, 3]));
        assert_eq!(shape(&format!("{attention}.kv_b_proj.lora.b"), &[8, 2]), Some(vec![4, 2]));
        assert_eq!(shape(&format!("{attention}.kv_b_proj.lora.magnitude"), &[8]), Some(vec![4]));
        let stacks = "model.layers.3.mlp.experts";
        assert_eq!(shape(&format!("{stacks}.gate_up_proj_lora.a"), &[4, 2, 5]), Some(vec![2, 2, 5]));
        assert_eq!(shape(&format!("{stacks}.gate_up_proj_lora.b"), &[4, 8, 2]), Some(vec![2, 4, 2]));
        assert_eq!(shape(&format!("{stacks}.down_proj_lora.a"), &[4, 2, 6]), Some(vec![2, 2, 3]));
        assert_eq!(shape(&format!("{stacks}.down_proj_lora.b"), &[4, 3, 2]), Some(vec![2, 3, 2]));
        assert_eq!(shape("lm_head.lora.a", &[2, 3]), Some(vec![2, 3]));
        assert_eq!(shape("model.layers.1.self_attn.o_proj.lora.a", &[2, 8]), None);
        let experts = Partition { tensor: Share::WHOLE, ..partition.clone() };
        let part = experts.part("model.layers.0.mlp.experts.gate_up_proj", &[4, 6, 5]).unwrap();
        let runs = part.runs();
        assert_eq!((runs.len(), &runs[0]), (1, &(0..60)), "experts of a rank lie in one piece");
        let down = "model.layers.0.mlp.experts.down_proj";
        assert_eq!(shape(down, &[4, 3, 6]), Some(vec![2, 3, 3]));
        assert_eq!(shape("model.layers.0.mlp.shared_experts.down_proj.weight", &[3, 6]), Some(vec![3, 3]));
        assert_eq!(shape("model.layers.0.mlp.gate.weight", &[4, 3]), Some(vec![4, 3]));
        assert_eq!(shape("model.layers.1.mlp.gate.weight", &[4, 3]), None);
        assert_eq!(shape("model.embed_tokens.weight", &[9, 3]), None);
        assert_eq!(shape("vision_tower.transformer.layers.0.attention.q_proj.weight", &[4, 4]), None);
        assert_eq!(shape("lm_head.weight", &[9, 3]), Some(vec![9, 3]));
    }
}
