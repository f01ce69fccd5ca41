//! Sources of parameters: a checkpoint, or freshly drawn values.

use std::collections::HashMap;
use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use mistral4_checkpoint::adapter::LoraTensors;
use mistral4_checkpoint::config::Config;
use mistral4_checkpoint::init::initial_tensor;
use mistral4_checkpoint::weights;
use mistral4_checkpoint::weights::names::{TensorSpec, tensors};
use mistral4_checkpoint::weights::{Checkpoint, HostData, HostTensor, QuantizedMatrix};

use crate::error::Result;
use crate::model::dropout::Dropout;
use crate::model::lora::{Divided, ExpertLora, Lora};
use crate::model::weight::{ExpertWeight, LinearWeight, Quantized};

/// Gives the values of parameters by their canonical names.
pub trait ParameterSource: Sync {
    /// Values of the tensor `key`, which must have `shape`; `f32` asks for full precision whatever the model's dtype.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor, or one that cannot be read.
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor>;

    /// The weight `key` of a linear map or of all experts, if this source holds it quantised.
    ///
    /// # Errors
    /// As [`ParameterSource::tensor`], or values that cannot be quantised.
    fn quantized(&self, _key: &str, _shape: &[usize]) -> Result<Option<QuantizedMatrix>> {
        Ok(None)
    }

    /// Format of dense parameters, and of what is computed with quantised ones.
    fn dtype(&self) -> weights::DType;

    /// The adapter of the linear map `module`, or of the stack of experts of that name; most sources have none.
    ///
    /// # Errors
    /// A mis-shaped adapter, or one that cannot be read.
    fn adapter(&self, _module: &str, _shape: &[usize]) -> Result<Option<SourceAdapter>> {
        Ok(None)
    }

    /// The shape of what this source gives for a parameter of `shape`; `None`: it gives nothing.
    fn shape(&self, _key: &str, shape: &[usize]) -> Option<Vec<usize>> {
        Some(shape.to_vec())
    }

    /// As [`ParameterSource::tensor`], the values `range` alone, flat.
    ///
    /// # Errors
    /// As [`ParameterSource::tensor`].
    fn part(&self, key: &str, shape: &[usize], f32: bool, range: Range<usize>) -> Result<HostTensor> {
        Ok(self.tensor(key, shape, f32)?.part(range))
    }
}

/// An adapter as a source gives it.
#[derive(Debug, Clone)]
pub struct SourceAdapter {
    /// Its matrices and scale.
    pub tensors: LoraTensors,
    /// Its dropout in training.
    pub dropout: Option<Dropout>,
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

    /// The weight `name` of a linear map, `[out, in]`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor, or one that cannot be quantised.
    pub fn linear_weight(&self, name: &str, shape: [usize; 2]) -> Result<LinearWeight> {
        Ok(match self.quantized(name, &shape)? {
            Some(quantized) => LinearWeight::Quantized(quantized),
            None => LinearWeight::Dense(self.get(name, shape)?),
        })
    }

    /// The weight `name` of all experts, `[E, out, in]`.
    ///
    /// # Errors
    /// As [`Parameters::linear_weight`].
    pub fn expert_weight(&self, name: &str, shape: [usize; 3]) -> Result<ExpertWeight> {
        Ok(match self.quantized(name, &shape)? {
            Some(quantized) => ExpertWeight::Quantized(quantized),
            None => ExpertWeight::Dense(self.get(name, shape)?),
        })
    }

    fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<Quantized>> {
        let Some(weight) = self.source.quantized(&self.key(name), shape)? else { return Ok(None) };
        let dtype = match self.source.dtype() {
            weights::DType::F32 => DType::F32,
            weights::DType::BF16 => DType::BF16,
            weights::DType::F16 => DType::F16,
        };
        // As the names of its parts say; how many matrices there are depends on what this rank holds.
        let parts = if name == "gate_up_proj" { 2 } else { 1 };
        Ok(Some(Quantized { weight: Arc::new(weight), parts, dtype, device: self.device.clone() }))
    }

    /// The adapter of the linear map at this place, whose weight has `shape`.
    ///
    /// # Errors
    /// A mis-shaped adapter, or one that cannot be read.
    pub(crate) fn lora(&self, shape: [usize; 2]) -> Result<Option<Lora>> {
        let Some(adapter) = self.source.adapter(&self.prefix, &shape)? else { return Ok(None) };
        let LoraTensors { a, b, magnitude, scale } = adapter.tensors;
        Ok(Some(Lora {
            a: Param::from_tensor(to_device(a, self.device)),
            b: Param::from_tensor(to_device(b, self.device)),
            magnitude: magnitude.map(|magnitude| Param::from_tensor(to_device(magnitude, self.device))),
            scale,
            dropout: adapter.dropout,
            divided: Divided::default(),
        }))
    }

    /// The adapters of the stack of experts `name`, which has `shape`.
    ///
    /// # Errors
    /// Mis-shaped adapters, or some that cannot be read.
    pub(crate) fn expert_lora(&self, name: &str, shape: [usize; 3]) -> Result<Option<ExpertLora>> {
        let Some(adapter) = self.source.adapter(&self.key(name), &shape)? else { return Ok(None) };
        let LoraTensors { a, b, scale, .. } = adapter.tensors;
        Ok(Some(ExpertLora {
            a: Param::from_tensor(to_device(a, self.device)),
            b: Param::from_tensor(to_device(b, self.device)),
            scale,
            divided: Divided::default(),
        }))
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

    fn dtype(&self) -> weights::DType {
        self.dtype
    }

    fn part(&self, key: &str, _: &[usize], f32: bool, range: Range<usize>) -> Result<HostTensor> {
        let dtype = if f32 { weights::DType::F32 } else { self.dtype };
        Ok(self.checkpoint.read_part(key, range, dtype)?)
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

    fn dtype(&self) -> weights::DType {
        self.dtype
    }
}
