//! What an optimizer remembers of each parameter.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use mistral4_kernels::{BLOCK_8BIT, DynamicMap};

use super::{Group, Values};
use crate::recipe::{OptimizerConfig, StateDtype};

/// What an optimizer remembers.
///
/// A clone shares the tensors; the next step then copies those that are still shared before it changes them.
#[derive(Debug, Clone, Default)]
pub struct OptimizerState {
    /// Steps taken.
    pub step: u64,
    /// What is remembered of each parameter, by canonical key.
    pub parameters: BTreeMap<String, ParameterState>,
}

/// What the optimizer remembers of one parameter, or of a shard of it, flat.
#[derive(Debug, Clone)]
pub struct ParameterState {
    /// Running means of the gradient.
    pub moments: Moments,
    /// The parameter in full precision, where the model holds it in bf16 and `master_weights` is on, `[elements]`.
    pub master: Option<Tensor<1>>,
}

/// Running means of a gradient.
#[allow(clippy::large_enum_variant, reason = "tensors are handles: moving them costs little")]
#[derive(Debug, Clone)]
pub enum Moments {
    /// Adam's two moments, f32 or bf16, `[elements]` each.
    Float {
        /// Running mean of the gradient.
        exp_avg: Tensor<1>,
        /// Running mean of the squared gradient.
        exp_avg_sq: Tensor<1>,
    },
    /// Adam's two moments in 8 bits.
    Int8 {
        /// Running mean of the gradient, in the signed map.
        exp_avg: Quantized,
        /// Running mean of the squared gradient, in the unsigned map.
        exp_avg_sq: Quantized,
    },
    /// Muon's momentum, f32, `[elements]`.
    Momentum(Tensor<1>),
}

/// Numbers in 8 bits by blocks of 256.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// One code a number, u8, `[elements]`.
    pub codes: Tensor<1, Int>,
    /// The largest magnitude of each block, f32, `[blocks]`.
    pub absmax: Tensor<1>,
}

/// A tensor of a state.
#[derive(Debug, Clone)]
pub enum StateTensor {
    /// f32 or bf16.
    Float(Tensor<1>),
    /// u8 codes.
    Codes(Tensor<1, Int>),
}

impl OptimizerState {
    /// Every tensor, with the key of its parameter and its name.
    pub fn tensors(&self) -> Vec<(String, &'static str, StateTensor)> {
        let of_parameter = |(key, state): (&String, &ParameterState)| {
            state.tensors().into_iter().map(|(name, tensor)| (key.clone(), name, tensor)).collect::<Vec<_>>()
        };
        self.parameters.iter().flat_map(of_parameter).collect()
    }
}

impl StateTensor {
    /// Its values in memory.
    pub fn to_data(&self) -> TensorData {
        match self {
            StateTensor::Float(tensor) => tensor.to_data(),
            StateTensor::Codes(tensor) => tensor.to_data(),
        }
    }

    /// Type of its values.
    pub fn dtype(&self) -> DType {
        match self {
            StateTensor::Float(tensor) => tensor.dtype(),
            StateTensor::Codes(tensor) => tensor.dtype(),
        }
    }

    /// How many values it has.
    pub fn len(&self) -> usize {
        match self {
            StateTensor::Float(tensor) => tensor.dims()[0],
            StateTensor::Codes(tensor) => tensor.dims()[0],
        }
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn float(self) -> Option<Tensor<1>> {
        match self {
            StateTensor::Float(tensor) => Some(tensor),
            StateTensor::Codes(_) => None,
        }
    }

    fn codes(self) -> Option<Tensor<1, Int>> {
        match self {
            StateTensor::Codes(tensor) => Some(tensor),
            StateTensor::Float(_) => None,
        }
    }
}

impl ParameterState {
    /// Ends the names of those of these tensors that have a value for each block of 256 of the parameter's.
    pub const OF_BLOCKS: &'static str = "_absmax";

    /// Names of the tensors that a state may have, as files of a checkpoint and fields of torch's optimizers are
    /// called.
    pub const NAMES: [&'static str; 6] =
        ["exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "momentum_buffer", "master"];

    /// A state without history for some or all values of a parameter of `elements` values.
    pub(super) fn of_tensor(config: &OptimizerConfig, elements: usize, values: &Tensor<1>) -> Self {
        let device = values.device();
        let needs_master = config.master_weights && values.dtype() != DType::F32;
        let master = needs_master.then(|| values.clone().cast(DType::F32));
        Self { moments: Moments::zeros(config, elements, values.dims()[0], &device), master }
    }

    /// As [`ParameterState::of_tensor`], for values on the CPU.
    pub(super) fn of_slice(config: &OptimizerConfig, elements: usize, values: &Values<'_>) -> Self {
        let device = Device::default();
        let (count, master) = match values {
            Values::F32(values) => (values.len(), None),
            Values::Bf16(values) if !config.master_weights => (values.len(), None),
            Values::Bf16(values) => {
                let full: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
                let data = TensorData::new(full, [values.len()]);
                (values.len(), Some(Tensor::from_data(data, (&device, DType::F32))))
            }
        };
        Self { moments: Moments::zeros(config, elements, count, &device), master }
    }

    /// Every tensor by its name.
    pub fn tensors(&self) -> Vec<(&'static str, StateTensor)> {
        let float = |name, tensor: &Tensor<1>| (name, StateTensor::Float(tensor.clone()));
        let mut tensors = match &self.moments {
            Moments::Float { exp_avg, exp_avg_sq } => {
                vec![float("exp_avg", exp_avg), float("exp_avg_sq", exp_avg_sq)]
            }
            Moments::Int8 { exp_avg, exp_avg_sq } => vec![
                ("exp_avg", StateTensor::Codes(exp_avg.codes.clone())),
                ("exp_avg_sq", StateTensor::Codes(exp_avg_sq.codes.clone())),
                float("exp_avg_absmax", &exp_avg.absmax),
                float("exp_avg_sq_absmax", &exp_avg_sq.absmax),
            ],
            Moments::Momentum(momentum) => vec![float("momentum_buffer", momentum)],
        };
        tensors.extend(self.master.as_ref().map(|master| float("master", master)));
        tensors
    }

    /// A state from its tensors; `None` when they belong to none.
    pub fn from_tensors(mut tensors: BTreeMap<&'static str, StateTensor>) -> Option<Self> {
        let master = match tensors.remove("master") {
            Some(tensor) => Some(tensor.float()?),
            None => None,
        };
        let moments = if let Some(momentum) = tensors.remove("momentum_buffer") {
            Moments::Momentum(momentum.float()?)
        } else {
            match (tensors.remove("exp_avg")?, tensors.remove("exp_avg_sq")?) {
                (StateTensor::Float(exp_avg), StateTensor::Float(exp_avg_sq)) => {
                    Moments::Float { exp_avg, exp_avg_sq }
                }
                (exp_avg, exp_avg_sq) => {
                    let mut absmax = |name| tensors.remove(name).and_then(StateTensor::float);
                    let exp_avg = Quantized { codes: exp_avg.codes()?, absmax: absmax("exp_avg_absmax")? };
                    let absmax = absmax("exp_avg_sq_absmax")?;
                    Moments::Int8 { exp_avg, exp_avg_sq: Quantized { codes: exp_avg_sq.codes()?, absmax } }
                }
            }
        };
        tensors.is_empty().then_some(Self { moments, master })
    }

    /// The number of values of the parameter, as each of its states says.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        let whole = self.tensors().into_iter().filter(|(name, _)| !name.ends_with(Self::OF_BLOCKS));
        whole.map(|(_, tensor)| tensor.len())
    }

    /// Whether this configuration keeps Adam's moments of a parameter of this whole shape in f32 or bf16.
    pub(super) fn has_float_moments(config: &OptimizerConfig, key: &str, shape: &[usize]) -> bool {
        matches!(Kind::of(config, key, shape), Kind::F32 | Kind::Bf16)
    }

    /// What [`ParameterState::kind`] says of a state that this configuration makes for a parameter of this whole shape.
    pub fn expected_kind(config: &OptimizerConfig, key: &str, shape: &[usize]) -> &'static str {
        Kind::of(config, key, shape).words()
    }

    /// Bytes that a state of this configuration takes for each value of a parameter of this whole shape.
    pub fn expected_bytes(config: &OptimizerConfig, key: &str, shape: &[usize], is_bf16: bool) -> f64 {
        let moments = match Kind::of(config, key, shape) {
            Kind::Momentum | Kind::Bf16 => 4.0,
            Kind::Int8 => 2.0 * (1.0 + 4.0 / BLOCK_8BIT as f64),
            Kind::F32 => 8.0,
        };
        moments + if is_bf16 && config.master_weights { 4.0 } else { 0.0 }
    }

    /// What kind of state this is, in words, to compare with another.
    pub fn kind(&self) -> &'static str {
        let kind = match &self.moments {
            Moments::Float { exp_avg, .. } if exp_avg.dtype() == DType::BF16 => Kind::Bf16,
            Moments::Float { .. } => Kind::F32,
            Moments::Int8 { .. } => Kind::Int8,
            Moments::Momentum(_) => Kind::Momentum,
        };
        kind.words()
    }
}

/// What is remembered of a gradient.
#[derive(Debug, Clone, Copy)]
enum Kind {
    F32,
    Bf16,
    Int8,
    Momentum,
}

impl Kind {
    /// Of a parameter of this whole shape.
    fn of(config: &OptimizerConfig, key: &str, shape: &[usize]) -> Self {
        if config.muon.is_some() && Group::of(key, shape) == Group::Matrix {
            return Kind::Momentum;
        }
        Self::of_adam(config, shape.iter().product())
    }

    /// Under Adam, of a parameter of `elements` values.
    fn of_adam(config: &OptimizerConfig, elements: usize) -> Self {
        match config.state_dtype {
            StateDtype::Bf16 => Kind::Bf16,
            StateDtype::Int8 if elements >= config.min_8bit_size => Kind::Int8,
            StateDtype::F32 | StateDtype::Int8 => Kind::F32,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Kind::F32 => "f32 moments",
            Kind::Bf16 => "bf16 moments",
            Kind::Int8 => "8-bit moments",
            Kind::Momentum => "Muon's momentum",
        }
    }
}

impl Moments {
    /// Those of `count` values of a parameter of `elements` values.
    fn zeros(config: &OptimizerConfig, elements: usize, count: usize, device: &Device) -> Self {
        let dtype = match Kind::of_adam(config, elements) {
            Kind::Int8 => {
                let (exp_avg, exp_avg_sq) = (
                    Quantized::zeros(DynamicMap::Signed, count, device),
                    Quantized::zeros(DynamicMap::Unsigned, count, device),
                );
                return Moments::Int8 { exp_avg, exp_avg_sq };
            }
            Kind::Bf16 => DType::BF16,
            Kind::F32 | Kind::Momentum => DType::F32,
        };
        let zeros = || Tensor::zeros([count], (device, dtype));
        Moments::Float { exp_avg: zeros(), exp_avg_sq: zeros() }
    }
}

impl Quantized {
    fn zeros(map: DynamicMap, count: usize, device: &Device) -> Self {
        let codes = TensorData::new(vec![map.zero(); count], [count]);
        Self {
            codes: Tensor::from_data(codes, (device, DType::U8)),
            absmax: Tensor::zeros([count.div_ceil(BLOCK_8BIT)], (device, DType::F32)),
        }
    }
}
