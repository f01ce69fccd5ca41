//! Muon: momentum whose matrices are brought to orthogonal ones before they are subtracted.
//!
//! Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the update, the coefficients
//! and the two adjustments of the rate are those of `dion.Muon`, which NeMo AutoModel uses.

use std::ops::Range;

use burn::tensor::{DType, Tensor, TensorData};
use mistral4::ops;

use super::{Group, Moments, ParameterState, StepFactors};
use crate::parallel::Communicator;
use crate::recipe::{AdjustLr, MuonConfig};

/// Coefficients `(a, b, c)` of each iteration `X <- a X + (b A + c A A) X`, `A = X X^T`.
const NEWTON_SCHULZ: [(f64, f64, f64); 5] = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
];

impl MuonConfig {
    /// The rate of a parameter that AdamW takes, relative to that of the matrices.
    pub(super) fn scalar_rate(&self, group: Group, shape: &[usize], base: f64) -> f64 {
        let scalar = self.scalar_lr.unwrap_or(base);
        let rate = match group {
            Group::Matrix => base,
            Group::Vector => scalar,
            Group::Embedding => self.embed_lr.unwrap_or(scalar),
            Group::LmHead => {
                let inputs = shape.last().copied().unwrap_or(1).max(1);
                self.lm_head_lr.unwrap_or(base / (inputs as f64).sqrt())
            }
        };
        if base > 0.0 { rate / base } else { 1.0 }
    }

    /// The rate of a matrix.
    fn adjusted(&self, lr: f64, [rows, cols]: [usize; 2]) -> f64 {
        let (rows, cols) = (rows as f64, cols as f64);
        match self.adjust_lr {
            None => lr,
            Some(AdjustLr::SpectralNorm) => lr * (rows / cols).sqrt(),
            Some(AdjustLr::RmsNorm) => lr * 0.2 * rows.max(cols).sqrt(),
        }
    }
}

/// A parameter seen as a stack of matrices, of which this rank may keep some values.
pub(super) struct Matrices {
    /// Matrices, rows, columns.
    shape: [usize; 3],
    /// The values that each rank of `group` keeps, flat; empty: all are here.
    shards: Vec<Range<usize>>,
    /// The ranks that keep the stack together.
    group: Option<Communicator>,
}

impl Matrices {
    /// All of a parameter.
    ///
    /// The experts of a stack are matrices of their own, and so are the gate and the up projection that lie one after
    /// the other in `gate_up_proj`.
    pub(super) fn whole(key: &str, shape: &[usize]) -> Self {
        let shape = match *shape {
            [rows, cols] => [1, rows, cols],
            [experts, both, cols] if key.ends_with("gate_up_proj") => [2 * experts, both / 2, cols],
            [experts, rows, cols] => [experts, rows, cols],
            _ => unreachable!("matrices have two dimensions, stacks of them three"),
        };
        Self { shape, shards: Vec::new(), group: None }
    }

    /// The same over the ranks of a group, each with its shard.
    pub(super) fn over(self, group: &Communicator, shards: Vec<Range<usize>>) -> Self {
        Self { shards, group: Some(group.clone()), ..self }
    }

    /// This rank's values of `direction` with every matrix orthogonalised; collective.
    ///
    /// A matrix that lies on several ranks is put together on all of them, one matrix at a time.
    fn orthogonal(&self, config: &MuonConfig, direction: Tensor<1>) -> Tensor<1> {
        let [count, rows, cols] = self.shape;
        let size = rows * cols;
        let all: Vec<Range<usize>> = std::iter::once(0..count * size).collect();
        let shards = if self.group.is_some() { &self.shards } else { &all };
        let me = self.group.as_ref().map_or(0, Communicator::rank);
        let mut changes = Vec::new();
        for matrix in 0..count {
            let within = |shard: &Range<usize>| {
                let start = shard.start.clamp(matrix * size, (matrix + 1) * size);
                start..shard.end.clamp(start, (matrix + 1) * size)
            };
            let mine = within(&shards[me]);
            let here = if mine.is_empty() { 0 } else { mine.start - shards[me].start };
            let part = direction.clone().slice(here..here + mine.len());
            let is_shared = shards.iter().filter(|shard| !within(shard).is_empty()).count() > 1;
            let values = match &self.group {
                Some(group) if is_shared => gather(group, part, size),
                _ => part,
            };
            if mine.is_empty() {
                continue;
            }
            let orthogonal = orthogonalize(config, values.reshape([rows, cols])).flatten::<1>(0, 1);
            changes.push(orthogonal.slice(mine.start - matrix * size..mine.end - matrix * size));
        }
        if changes.is_empty() { direction } else { Tensor::cat(changes, 0) }
    }
}

/// The values of all ranks, in their order; collective.
fn gather(group: &Communicator, part: Tensor<1>, elements: usize) -> Tensor<1> {
    let device = part.device();
    let part = part.into_data();
    let all = group.all_gather_varied(part.as_slice::<f32>().expect("directions are f32")).concat();
    Tensor::from_data(TensorData::new(all, [elements]), (&device, DType::F32))
}

/// Steps a matrix, or each one of a stack, or what this rank keeps of them.
pub(super) fn step(
    config: &MuonConfig,
    state: Option<ParameterState>,
    values: Tensor<1>,
    gradient: Tensor<1>,
    matrices: &Matrices,
    factors: StepFactors,
) -> (ParameterState, Tensor<1>) {
    let [_, rows, cols] = matrices.shape;
    let dtype = values.dtype();
    let gradient = gradient * factors.grad_scale;
    let (momentum, master) = match state {
        Some(ParameterState { moments: Moments::Momentum(momentum), master }) => {
            (momentum * config.mu + gradient.clone(), master)
        }
        Some(_) => unreachable!("a resumed run's states are checked against its optimizer"),
        None => (gradient.clone(), None),
    };
    let full = master.unwrap_or_else(|| values.cast(DType::F32));
    let direction = if config.nesterov { momentum.clone() * config.mu + gradient } else { momentum.clone() };
    let change = matrices.orthogonal(config, direction);
    let keep = 1.0 - factors.lr * factors.weight_decay;
    let full: Tensor<1> = full * keep - change * config.adjusted(factors.lr, [rows, cols]);
    let master = (dtype != DType::F32).then(|| full.clone());
    (ParameterState { moments: Moments::Momentum(momentum), master }, full.cast(dtype))
}

/// Brings all singular values of a matrix near 1, in `newton_schulz_dtype`; returns f32.
fn orthogonalize(config: &MuonConfig, matrix: Tensor<2>) -> Tensor<2> {
    let [rows, cols] = matrix.dims();
    let is_tall = rows > cols;
    let x = matrix.cast(config.newton_schulz_dtype.dtype());
    let mut x = if is_tall { x.transpose() } else { x };
    let norm = x.clone().cast(DType::F32).square().sum().sqrt().cast(x.dtype()) + config.epsilon;
    x = x / norm.unsqueeze();
    for (a, b, c) in NEWTON_SCHULZ {
        let squared = ops::linear(x.clone(), x.clone());
        // It is symmetric, so that the product with its transpose is its square.
        let mix = squared.clone() * b + ops::linear(squared.clone(), squared) * c;
        x = x.clone() * a + ops::linear(mix, x.transpose());
    }
    let x = if is_tall { x.transpose() } else { x };
    x.cast(DType::F32)
}
