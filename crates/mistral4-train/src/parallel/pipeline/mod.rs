//! Pipelines: each rank holds some layers, and micro-batches flow through the ranks.
//!
//! Every rank of a pipeline reads the same batches. The first stage gets the token ids and images of a micro-batch as
//! its arguments, every other stage hidden states with the number of the micro-batch on them; nothing about a micro-batch
//! is remembered outside of its own passes.

mod link;
pub mod schedule;

use std::collections::HashMap;
use std::ops::Range;

use mistral4::model::Mistral4;

use self::link::{Link, Message};
use self::schedule::{Pass, actions, split_layers};
use super::{Communicator, Pending};
use crate::backward::{
    Activations, LabelledInputs, MicroBatch, MicroBatchLoss, ParameterStore, Stage, StageForward,
};
use crate::error::Result;

/// This rank's place in a pipeline.
pub struct Pipeline {
    /// The ranks of the pipeline, for sums over them.
    ranks: Communicator,
    /// Layers of every stage.
    stages: Vec<Range<usize>>,
    chunks: usize,
    activations: Link,
    gradients: Link,
}

impl Pipeline {
    /// A pipeline over `ranks`, each with `chunks` runs of the model's `layers`; collective.
    ///
    /// # Errors
    /// Fewer layers than stages.
    pub fn new(ranks: Communicator, layers: usize, chunks: usize) -> Result<Self> {
        let stages = split_layers(layers, ranks.size(), chunks)?;
        let (activations, gradients) = (Link::new(&ranks), Link::new(&ranks));
        Ok(Self { ranks, stages, chunks, activations, gradients })
    }

    fn stage(&self, chunk: usize) -> usize {
        chunk * self.ranks.size() + self.ranks.rank()
    }

    /// Runs the micro-batches of a step forward and backward; the gradients go to `store`, and `begin` is told of every
    /// pass which micro-batch it is of.
    ///
    /// Returns what each measured, on every rank the same.
    ///
    /// # Errors
    /// Inputs that the model refuses, or that are not those of the rank before.
    pub fn forward_backward(
        &self,
        store: &mut dyn ParameterStore,
        model: &Mistral4,
        micro_batches: &[MicroBatch],
        activations: Activations,
        begin: &dyn Fn(usize),
    ) -> Result<Vec<MicroBatchLoss>> {
        let (size, rank) = (self.ranks.size(), self.ranks.rank());
        let device = model.text().model.norm.weight.device().without_autodiff();
        let count = micro_batches.len();
        let mut under_way: HashMap<(usize, usize), StageForward> = HashMap::new();
        let mut sent = Vec::new();
        let mut measured = vec![MicroBatchLoss::default(); count];
        for action in actions(rank, size, self.chunks, count) {
            begin(action.micro_batch);
            let number = self.stage(action.chunk);
            let stage = Stage::new(model, self.stages[number].clone(), activations);
            let (is_first, is_last) = (stage.is_first(), stage.is_last());
            let MicroBatch { inputs: batch, scale } = &micro_batches[action.micro_batch];
            let expected =
                Message { stage: number, micro_batch: action.micro_batch, tokens: batch.labels.len() };
            let (before, after) = ((rank + size - 1) % size, (rank + 1) % size);
            match action.pass {
                Pass::Forward => {
                    let input = match is_first {
                        true => None,
                        false => Some(self.activations.receive(before, expected, &device)?),
                    };
                    let forward = stage.forward(store, batch, input)?;
                    if !is_last {
                        let message = Message { stage: number + 1, ..expected };
                        sent.push(self.activations.send(after, message, forward.output()));
                    }
                    under_way.insert((action.micro_batch, action.chunk), forward);
                }
                Pass::Backward => {
                    let forward = under_way.remove(&(action.micro_batch, action.chunk));
                    let forward = forward.expect("a schedule runs forward before it runs backward");
                    let dy = match is_last {
                        true => None,
                        false => Some(self.gradients.receive(after, expected, &device)?),
                    };
                    // Backward passes over a stage come in the order of micro-batches.
                    store.set_last(action.micro_batch + 1 == count);
                    let (part, dx) = forward.backward(store, batch, dy, *scale)?;
                    if let Some(dx) = dx {
                        let message = Message { stage: number - 1, ..expected };
                        sent.push(self.gradients.send(before, message, dx));
                    }
                    measured[action.micro_batch].merge(part);
                }
            }
        }
        sent.into_iter().for_each(Pending::wait);
        Ok(self.share(measured))
    }

    /// The summed cross entropy of a batch, without gradients, on every rank the same.
    ///
    /// # Errors
    /// As [`Pipeline::forward_backward`].
    pub fn evaluate(
        &self,
        store: &mut dyn ParameterStore,
        model: &Mistral4,
        batch: &LabelledInputs,
    ) -> Result<f64> {
        let (size, rank) = (self.ranks.size(), self.ranks.rank());
        let device = model.text().model.norm.weight.device().without_autodiff();
        let mut loss = [0.0];
        for chunk in 0..self.chunks {
            let number = self.stage(chunk);
            let stage = Stage::new(model, self.stages[number].clone(), Activations::Recomputed);
            let expected = Message { stage: number, micro_batch: 0, tokens: batch.labels.len() };
            let input = match stage.is_first() {
                true => None,
                false => Some(self.activations.receive((rank + size - 1) % size, expected, &device)?),
            };
            let output = stage.output(store, batch, input)?;
            if stage.is_last() {
                loss = [stage.loss_sum(store, batch, output)];
            } else {
                let message = Message { stage: number + 1, ..expected };
                self.activations.send((rank + 1) % size, message, output).wait();
            }
        }
        self.ranks.all_reduce_sum(&mut loss);
        Ok(loss[0])
    }

    /// Puts together what the ranks measured of each micro-batch.
    fn share(&self, mut measured: Vec<MicroBatchLoss>) -> Vec<MicroBatchLoss> {
        let mut losses: Vec<f64> = measured.iter().flat_map(MicroBatchLoss::sums).collect();
        self.ranks.all_reduce_sum(&mut losses);
        // Of each load: micro-batch, layer, number of experts, tokens of each.
        let mine: Vec<u64> = measured
            .iter_mut()
            .enumerate()
            .flat_map(|(index, batch)| {
                std::mem::take(&mut batch.loads).into_iter().flat_map(move |(layer, load)| {
                    [index as u64, layer as u64, load.len() as u64].into_iter().chain(load)
                })
            })
            .collect();
        for theirs in self.ranks.all_gather_varied(&mine) {
            let mut rest = theirs.as_slice();
            while let [index, layer, experts, more @ ..] = rest {
                let (load, after) = more.split_at(*experts as usize);
                measured[*index as usize].loads.push((*layer as usize, load.to_vec()));
                rest = after;
            }
        }
        for (batch, sums) in measured.iter_mut().zip(losses.as_chunks().0) {
            batch.set_sums(*sums);
            batch.loads.sort_unstable_by_key(|(layer, _)| *layer);
        }
        measured
    }
}
