//! The whole model on composite operations, as GPU backends run it, against the fused ones: loss and every gradient.
//!
//! A file of its own, since the choice holds for the whole process.

use burn::tensor::{Device, Tensor};
use mistral4::checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::DType;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::InitialSource;
use mistral4::{Mistral4, ModelInputs, ops};
use mistral4_train::backward::{Activations, Gradients, LabelledInputs, LossScale, forward_backward};

fn values(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.clone().into_data().try_into_vec().expect("gradients are f32")
}

#[test]
fn composite_operations_train_like_the_fused_ones() {
    let config = ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap().text_only().config;
    let source = InitialSource::new(&config, 5, DType::F32);
    let model = Mistral4::new(&config, MoeOptions::default(), &source, &Device::flex()).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| 20 + i * 31 % 900).collect();
    let labels = ids.iter().skip(1).map(|&id| i64::from(id)).chain([-100]).collect();
    let batch = LabelledInputs::plain(ModelInputs::packed(ids, vec![0, 13, 40]), labels);
    let scale = LossScale { per_token: 1.0 / 39.0, z_loss: 0.0, aux: 1.0 };
    let run = || {
        let mut gradients = Gradients::default();
        let measured = forward_backward(&model, &batch, scale, Activations::Kept, &mut gradients).unwrap();
        (measured.loss_sum, gradients)
    };
    let (fused_loss, fused) = run();
    ops::force_composite(true);
    let (loss, composite) = run();
    assert!(!ops::is_fused(&Device::flex()));
    assert!((loss - fused_loss).abs() < 1e-5 * fused_loss, "{loss} against {fused_loss}");
    assert_eq!(fused.iter().count(), composite.iter().count());
    for (key, fused) in fused.iter() {
        let (fused, composite) = (values(fused), values(composite.get(key).unwrap()));
        let norm = fused.iter().map(|v| v * v).sum::<f32>().sqrt();
        let error = fused.iter().zip(&composite).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        assert!(error <= 1e-5 * norm + 1e-8, "{key}: {error} of {norm}");
    }
}
