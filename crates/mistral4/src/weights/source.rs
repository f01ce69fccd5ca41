//! Sources of parameters: a checkpoint, or freshly drawn values.

use std::collections::HashMap;
use std::fmt::Display;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use mistral4_checkpoint::config::Config;
use mistral4_checkpoint::init::initial_tensor;
use mistral4_checkpoint::weights;
use mistral4_checkpoint::weights::names::{TensorSpec, tensors};
use mistral4_checkpoint::weights::{Checkpoint, HostData, HostTensor};

use crate::error::Result;

/// Gives the values of parameters by their canonical names.
pub trait ParameterSource: Sync {
    /// Values of the tensor `key`, which must have `shape`; `f32` asks for full precision whatever the model's dtype.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor, or one that cannot be read.
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor>;
}

/// A place in the tree of names, with the source behind it.
#[derive(Clone)]
pub struct Parameters<'a> {
    source: &'a dyn ParameterSource,
    device: &'a Device,
    prefix: String,
}

impl<'a> Parameters<'a> {
    /// The root of the tree.
    pub fn new(source: &'a dyn ParameterSource, device: &'a Device) -> Self {
        Self { source, device, prefix: String::new() }
    }

    /// The branch `name`.
    pub fn pp(&self, name: impl Display) -> Self {
        Self { prefix: self.key(name), ..self.clone() }
    }

    fn key(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// The parameter `name`, in the source's dtype.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn get<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Param<Tensor<D>>> {
        self.read(name, shape, false)
    }

    /// The parameter `name`, in f32.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn get_f32<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Param<Tensor<D>>> {
        self.read(name, shape, true)
    }

    fn read<const D: usize>(&self, name: &str, shape: [usize; D], f32: bool) -> Result<Param<Tensor<D>>> {
        let host = self.source.tensor(&self.key(name), &shape, f32)?;
        Ok(Param::from_tensor(to_device(host, self.device)))
    }
}

/// Moves a tensor to the device, keeping its dtype.
pub(crate) fn to_device<const D: usize>(host: HostTensor, device: &Device) -> Tensor<D> {
    let shape: [usize; D] = host.shape.try_into().expect("the source checked the shape");
    match host.data {
        HostData::F32(data) => Tensor::from_data(TensorData::new(data, shape), (device, DType::F32)),
        HostData::BF16(data) => Tensor::from_data(TensorData::new(data, shape), (device, DType::BF16)),
        HostData::F16(data) => Tensor::from_data(TensorData::new(data, shape), (device, DType::F16)),
    }
}

/// Parameters of a checkpoint, converted to one dtype.
pub struct CheckpointSource<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Dtype of the parameters; the router's bias stays f32.
    pub dtype: weights::DType,
}

impl ParameterSource for CheckpointSource<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor> {
        let dtype = if f32 { weights::DType::F32 } else { self.dtype };
        let tensor = self.checkpoint.read(key, dtype)?;
        assert_eq!(tensor.shape, shape, "{key}: Checkpoint::check() compares shapes before tensors are read");
        Ok(tensor)
    }
}

/// Freshly drawn parameters.
pub struct InitialSource<'a> {
    config: &'a Config,
    seed: u64,
    dtype: weights::DType,
    specs: HashMap<String, TensorSpec>,
}

impl<'a> InitialSource<'a> {
    /// Parameters drawn from `seed`, rounded to `dtype`; the router's bias stays f32.
    pub fn new(config: &'a Config, seed: u64, dtype: weights::DType) -> Self {
        let specs = tensors(config).into_iter().map(|spec| (spec.key.clone(), spec)).collect();
        Self { config, seed, dtype, specs }
    }
}

impl ParameterSource for InitialSource<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor> {
        let spec = self.specs.get(key).unwrap_or_else(|| panic!("{key} is missing from the table of names"));
        assert_eq!(spec.shape, shape, "{key}: the table of names and the model differ");
        let dtype = if f32 { weights::DType::F32 } else { self.dtype };
        Ok(HostTensor::f32(shape, initial_tensor(spec, self.config, self.seed)).cast(dtype))
    }
}
