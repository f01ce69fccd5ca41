//! One rank against many.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use mistral4::Mistral4;
use mistral4::model::dropout::DropoutSeed;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{AdaptedSource, ParameterSource, Partition, PartitionSource};
use mistral4_train::backward::{
    Activations, Gradients, LabelledInputs, LossScale, MicroBatch, MicroBatchLoss, Whole, evaluate,
    forward_backward,
};
use mistral4_train::parallel::communicator::{Communicator, threads};
use mistral4_train::parallel::{Mesh, ModelLayout};
use mistral4_train::recipe::{DistributedConfig, PipelineConfig, Strategy};

use crate::models::TinyModel;

/// Ranks along each side; experts are spread over data-parallel ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) pp: usize,
    pub(crate) chunks: usize,
    pub(crate) dp: usize,
    pub(crate) tp: usize,
    pub(crate) ep: usize,
}

/// What a rank computed.
struct Outcome {
    partition: Partition,
    /// By micro-batch, in the order in which the rank took them.
    measured: Vec<MicroBatchLoss>,
    held_out: f64,
    gradients: BTreeMap<String, Vec<f32>>,
}

const SCALE: LossScale = LossScale { per_token: 1.0 / 50.0, z_loss: 0.03, aux: 0.25 };

fn moe() -> MoeOptions {
    MoeOptions { aux_loss_coeff: 0.1, router_z_loss_coeff: 0.07, ..MoeOptions::default() }
}

fn values(gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
    let values = |t: &Tensor<1>| t.clone().into_data().try_into_vec::<f32>().unwrap();
    gradients.iter().map(|(key, gradient)| (key.to_owned(), values(gradient))).collect()
}

/// A part of a model, and its dropout, which is on.
fn build(tiny: &TinyModel, partition: &Partition) -> (Mistral4, DropoutSeed) {
    let (base, dropout) = (tiny.source(), DropoutSeed::default());
    dropout.begin(4, 2);
    let adapted = tiny.adapter.as_ref().map(|(adapter, position)| {
        AdaptedSource::new(&base, adapter).with_dropout(0.2, *position, dropout.clone())
    });
    let source: &dyn ParameterSource = adapted.as_ref().map_or(&base, |adapted| adapted);
    let source = PartitionSource { source, partition };
    let model = Mistral4::new(&tiny.config, moe(), &source, &Device::flex()).unwrap();
    (if tiny.adapter.is_some() { model.freeze_base() } else { model }, dropout)
}

/// Whole shapes of everything that may be trained.
fn shapes(tiny: &TinyModel) -> BTreeMap<String, Vec<usize>> {
    let partition = Partition::whole(tiny.config.text.num_hidden_layers);
    let (model, _) = build(tiny, &partition);
    model.parameters().into_iter().map(|parameter| (parameter.key, parameter.shape)).collect()
}

fn single(tiny: &TinyModel, activations: Activations) -> Outcome {
    let partition = Partition::whole(tiny.config.text.num_hidden_layers);
    let (model, dropout) = build(tiny, &partition);
    let mut gradients = Gradients::default();
    let step = |(index, batch)| {
        dropout.micro_batch(index);
        forward_backward(&model, batch, SCALE, activations, &mut gradients).unwrap()
    };
    let measured = tiny.batches.iter().enumerate().map(step).collect();
    dropout.end();
    let held_out = evaluate(&model, &tiny.batches[0]).unwrap();
    Outcome { partition, measured, held_out, gradients: values(&gradients) }
}

fn on_rank(tiny: &TinyModel, layout: Layout, activations: Activations, world: Communicator) -> Outcome {
    let Layout { pp, chunks, dp, tp, ep } = layout;
    // Both models have 4 layers.
    let interleaved =
        PipelineConfig { interleaved: chunks > 1, layers_per_stage: Some(4 / (pp * chunks).min(4)) };
    let config = DistributedConfig {
        pp_size: pp,
        tp_size: tp,
        ep_size: ep,
        strategy: Strategy::Replicate,
        ..DistributedConfig::default()
    };
    let mesh = Mesh::new(&config, world).unwrap();
    let (d, config) = (mesh.data.rank(), &tiny.config);
    let ModelLayout { division, groups, pipeline, .. } =
        ModelLayout::new(&mesh, config, interleaved).unwrap();
    let partition = division.partitions[mesh.world.rank()].clone();
    let (mut model, dropout) = build(tiny, &partition);
    model.set_groups(&groups);

    let batches: Vec<LabelledInputs> = tiny.batches.iter().skip(d).step_by(dp).cloned().collect();
    let begin = |index| dropout.micro_batch(d + index * dp);
    let mut gradients = Gradients::default();
    let (measured, held_out) = match &pipeline {
        Some(pipeline) => {
            let mut store = Whole::new(&model, &mut gradients);
            let micro_batch = |inputs: &LabelledInputs| MicroBatch { inputs: inputs.clone(), scale: SCALE };
            let batches: Vec<MicroBatch> = batches.iter().map(micro_batch).collect();
            let measured =
                pipeline.forward_backward(&mut store, &model, &batches, activations, &begin).unwrap();
            dropout.end();
            (measured, pipeline.evaluate(&mut store, &model, &tiny.batches[0]).unwrap())
        }
        None => {
            let step = |(index, batch)| {
                begin(index);
                forward_backward(&model, batch, SCALE, activations, &mut gradients).unwrap()
            };
            let measured = batches.iter().enumerate().map(step).collect();
            dropout.end();
            (measured, evaluate(&model, &tiny.batches[0]).unwrap())
        }
    };
    Outcome { partition, measured, held_out, gradients: values(&gradients) }
}

/// Compares losses, loads and every gradient of a layout with those of one rank.
pub(crate) fn compare(tiny: &TinyModel, layout: Layout, activations: Activations) {
    let Layout { pp, dp, tp, ep, .. } = layout;
    let case = format!("{}, {layout:?}, {activations:?}", tiny.name);
    let one = single(tiny, activations);
    let ranks = threads::run(pp * dp * tp, |world| on_rank(tiny, layout, activations, world));

    for (rank, outcome) in ranks.iter().enumerate() {
        let data = rank / tp % dp;
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs();
        assert!(close(outcome.held_out, one.held_out), "{case}: {} {}", outcome.held_out, one.held_out);
        let expected: Vec<&MicroBatchLoss> = one.measured.iter().skip(data).step_by(dp).collect();
        assert_eq!(outcome.measured.len(), expected.len());
        for (got, want) in outcome.measured.iter().zip(expected) {
            for (name, got, want) in [
                ("loss_sum", got.loss_sum, want.loss_sum),
                ("z_loss", got.z_loss, want.z_loss),
                ("aux_loss", got.aux_loss, want.aux_loss),
                ("router_z_loss", got.router_z_loss, want.router_z_loss),
            ] {
                assert!(want > 0.0 && close(got, want), "{case}: {name}: {got} {want}");
            }
            assert_eq!(got.loads, want.loads, "{case}");
        }
    }

    let shapes = shapes(tiny);
    for (key, whole) in &one.gradients {
        let mut holders = 0;
        for (rank, outcome) in ranks.iter().enumerate() {
            let Some(part) = outcome.partition.part(key, &shapes[key]) else { continue };
            holders += 1;
            // The ranks whose data this part's gradient is a sum over.
            let data = rank / tp % dp;
            let together = (0..dp).filter(|other| !key.contains(".experts.") || other % ep == data % ep);
            let mut sum = vec![0f32; part.elements()];
            for other in together {
                let other = &ranks[rank - data * tp + other * tp];
                let Some(gradient) = other.gradients.get(key) else { continue };
                sum.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
            }
            let want = part.take(whole);
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            let difference = norm(&mut sum.iter().zip(&want).map(|(a, b)| a - b));
            // A part may be nearly zero where the whole is not.
            let scale = norm(&mut whole.iter().copied());
            // Adapters' gradients are products of two small matrices: larger sums cancel in them.
            let tolerance = if tiny.adapter.is_some() { 2e-5 } else { 1e-5 };
            assert!(
                difference <= tolerance * scale + 1e-9,
                "{case}: {key} on rank {rank}: {difference} of {scale}"
            );
        }
        assert!(holders > 0, "{case}: nobody holds {key}");
    }
}
