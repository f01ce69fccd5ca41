//! Sums of gradients over replicas.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::sharding::anywhere;
use super::{Communicator, KeyGroups};
use crate::backward::Gradients;

/// A gradient of as many values is summed where it lies; smaller ones are summed together.
const LARGE: usize = 1 << 18;

/// Sums each gradient over the ranks that keep the same values of its parameter; see [`all_reduce`].
pub fn over_replicas(
    gradients: &mut Gradients,
    trained: &[(String, usize)],
    replicas: &KeyGroups,
    device: &Device,
) {
    for (group, trained) in replicas.divide(trained.to_vec(), |(key, _)| key) {
        all_reduce(gradients, &trained, group, device);
    }
}

/// Sums gradients over a group, so that every rank holds the same.
///
/// `trained` names the trained parameters with their numbers of values, the same ones on every rank. A gradient that no
/// rank has stays absent.
pub fn all_reduce(
    gradients: &mut Gradients,
    trained: &[(String, usize)],
    group: &Communicator,
    device: &Device,
) {
    if group.size() == 1 {
        return;
    }
    let present: Vec<u8> = trained.iter().map(|(key, _)| u8::from(gradients.get(key).is_some())).collect();
    let present = anywhere(group, &present);
    let present = trained.iter().zip(present).filter(|(_, present)| *present).map(|(entry, _)| entry);
    let (large, small): (Vec<_>, Vec<_>) = present.partition(|(_, elements)| *elements >= LARGE);
    let take = |gradients: &mut Gradients, (key, elements): &(String, usize)| match gradients.remove(key) {
        Some(gradient) => gradient.into_data().try_into_vec::<f32>().expect("gradients are f32"),
        None => vec![0.0; *elements],
    };
    let put = |gradients: &mut Gradients, (key, elements): &(String, usize), values: Vec<f32>| {
        let values = TensorData::new(values, [*elements]);
        gradients.add(key.clone(), Tensor::from_data(values, (device, DType::F32)));
    };
    for entry in large {
        let mut values = take(gradients, entry);
        group.all_reduce_sum(&mut values);
        put(gradients, entry, values);
    }
    let mut together: Vec<f32> = small.iter().flat_map(|entry| take(gradients, entry)).collect();
    group.all_reduce_sum(&mut together);
    let mut rest = &together[..];
    for entry in small {
        let (values, after) = rest.split_at(entry.1);
        put(gradients, entry, values.to_vec());
        rest = after;
    }
}
