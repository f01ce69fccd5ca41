//! Adam, AdamW and Muon over a model's parameters, in place.

mod adam;
mod muon;
mod spread;
mod state;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::bf16;
use mistral4::model::Mistral4;
use mistral4::ops::{self, DeferredGradient};
use mistral4::weights::is_adapter;
use mistral4_kernels::AdamW;

use crate::backward::Gradients;
use crate::error::{Error, Result};
use crate::recipe::{OptimizerConfig, OptimizerKind, StateDtype};
pub use spread::Spread;
pub use state::{Moments, OptimizerState, ParameterState, Quantized, StateTensor};

/// The optimizer of a run.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    state: OptimizerState,
    /// How parameters are spread over ranks; `None`: they are all here.
    spread: Option<Spread>,
}

/// Factors of one step.
#[derive(Debug, Clone, Copy)]
pub struct StepFactors {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Factor on the gradients, such as a clipping coefficient.
    pub grad_scale: f64,
}

/// The values of a parameter, or of a shard of it, that a step changes in place.
#[derive(Debug)]
pub enum Values<'a> {
    /// In full precision.
    F32(&'a mut [f32]),
    /// Rounded from the full precision that the optimizer remembers.
    Bf16(&'a mut [bf16]),
}

impl<'a> Values<'a> {
    /// Those of a parameter's tensor.
    fn of(data: &'a mut TensorData) -> Self {
        match data.dtype() {
            DType::F32 => Values::F32(data.as_mut_slice().expect("the data has the tensor's dtype")),
            DType::BF16 => Values::Bf16(data.as_mut_slice().expect("the data has the tensor's dtype")),
            other => panic!("parameters are f32 or bf16, not {other:?}"),
        }
    }
}

/// What a parameter is to the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    /// One matrix, or a stack of them: what Muon is for.
    Matrix,
    /// Norms, biases, the router, adapters, and whatever else is not one of the others.
    Vector,
    /// The table of token embeddings.
    Embedding,
    /// The output projection.
    LmHead,
}

impl Group {
    fn of(key: &str, shape: &[usize]) -> Self {
        let is_stack = shape.len() == 3 && key.contains(".experts.");
        if key.ends_with("embed_tokens.weight") {
            Group::Embedding
        } else if key.ends_with("lm_head.weight") {
            Group::LmHead
        } else if (shape.len() == 2 || is_stack) && !key.ends_with(".gate.weight") && !is_adapter(key) {
            Group::Matrix
        } else {
            Group::Vector
        }
    }
}

impl Optimizer {
    /// An optimizer without history.
    pub fn new(config: OptimizerConfig) -> Self {
        Self::resume(config, OptimizerState::default())
    }

    /// An optimizer that goes on from `state`.
    pub fn resume(config: OptimizerConfig, state: OptimizerState) -> Self {
        Self { config, state, spread: None }
    }

    /// The same over parameters of which this rank keeps a part.
    pub fn on_ranks(self, spread: Spread) -> Self {
        Self { spread: Some(spread), ..self }
    }

    /// Refuses states that a device has no operations for.
    ///
    /// # Errors
    /// 8-bit states, or bf16 parameters without masters, on another device than the CPU.
    pub fn check_device(config: &OptimizerConfig, device: &Device) -> Result<()> {
        let refused = |value: &str, message: &str| {
            let (key, value, message) = ("optimizer".to_owned(), value.to_owned(), message.to_owned());
            Err(Error::Inconsistent { key, value, message })
        };
        if ops::is_fused(device) {
            return Ok(());
        }
        if config.state_dtype == StateDtype::Int8 {
            return refused(
                "8-bit states",
                "are updated by a kernel of the CPU only; choose exp_avg_dtype: torch.bfloat16 on this device",
            );
        }
        if !config.master_weights {
            return refused(
                "master_weights: false",
                "rounds parameters at random, which a kernel of the CPU only does; leave it out on this device",
            );
        }
        Ok(())
    }

    /// What is remembered.
    pub fn state(&self) -> &OptimizerState {
        &self.state
    }

    /// Counts a step; [`Optimizer::step`] does so itself.
    pub fn begin_step(&mut self) {
        self.state.step += 1;
    }

    /// Moves every parameter that has a gradient.
    pub fn step(&mut self, model: Mistral4, mut gradients: Gradients, factors: StepFactors) -> Mistral4 {
        self.begin_step();
        self.apply(model, &mut gradients, factors)
    }

    /// Moves the parameters that have a gradient in the step that was begun, and uses these gradients up.
    pub fn apply(&mut self, model: Mistral4, gradients: &mut Gradients, factors: StepFactors) -> Mistral4 {
        model.map_parameters(|key, shape, values| {
            if let Some(gradient) = gradients.take(key) {
                self.update(key, shape, values, gradient, factors)
            } else if let Some(gradient) = gradients.take_deferred(key) {
                self.update_deferred(key, shape, values, &gradient, factors)
            } else {
                values
            }
        })
    }

    /// Moves one parameter while its gradient is multiplied out.
    fn update_deferred(
        &mut self,
        key: &str,
        shape: &[usize],
        values: Tensor<1>,
        gradient: &DeferredGradient,
        factors: StepFactors,
    ) -> Tensor<1> {
        let hyper = self.hyper(Group::of(key, shape), shape, factors);
        let state = self.take(key, values.dims()[0], &values);
        let (device, dtype) = (values.device(), values.dtype());
        let mut data = values.into_data();
        let state = adam::deferred(&hyper, self.state.step, state, Values::of(&mut data), gradient);
        self.state.parameters.insert(key.to_owned(), state);
        Tensor::from_data(data, (&device, dtype))
    }

    /// Whether a parameter of this shape on `device` moves while its gradient is multiplied out: under Adam with float moments,
    /// if it is all here.
    pub fn takes_deferred(&self, key: &str, shape: &[usize], device: &Device) -> bool {
        ops::is_fused(device)
            && self.spread.is_none()
            && ParameterState::has_float_moments(&self.config, key, shape)
    }

    /// Moves one parameter, or what this rank keeps of it, in the step that was begun; `values` and `gradient` are flat,
    /// the gradient f32 or bf16.
    ///
    /// Under Muon, ranks that keep a matrix together all call this in the same order.
    pub fn update(
        &mut self,
        key: &str,
        shape: &[usize],
        values: Tensor<1>,
        gradient: Tensor<1>,
        factors: StepFactors,
    ) -> Tensor<1> {
        let whole = self.spread.as_ref().map_or(shape, |spread| spread.whole_shape(key)).to_vec();
        let group = Group::of(key, &whole);
        if let (Some(muon), Group::Matrix) = (&self.config.muon, group) {
            let state = self.state.parameters.remove(key);
            let matrices = match &self.spread {
                Some(spread) => spread.matrices(key),
                None => muon::Matrices::whole(key, shape),
            };
            let (state, values) =
                muon::step(muon, state, values, gradient.cast(DType::F32), &matrices, factors);
            self.state.parameters.insert(key.to_owned(), state);
            return values;
        }
        let hyper = self.hyper(group, &whole, factors);
        let elements = whole.iter().product();
        if !ops::is_fused(&values.device()) {
            let state = self.take(key, elements, &values);
            let (state, values) =
                adam::composite(&hyper, self.state.step, state, values, gradient.cast(DType::F32));
            self.state.parameters.insert(key.to_owned(), state);
            return values;
        }
        let (device, dtype) = (values.device(), values.dtype());
        let state = self.take(key, elements, &values);
        let gradient = gradient.into_data();
        let mut data: TensorData = values.into_data();
        let in_place = Values::of(&mut data);
        let step = self.state.step;
        let state = match gradient.dtype() {
            DType::BF16 => adam::fused::<bf16>(&hyper, step, state, in_place, slice(&gradient)),
            _ => adam::fused::<f32>(&hyper, step, state, in_place, slice(&gradient)),
        };
        self.state.parameters.insert(key.to_owned(), state);
        Tensor::from_data(data, (&device, dtype))
    }

    /// Moves a flat shard of a parameter in the step that was begun, on the CPU: what is remembered under `key` has the
    /// shard's length. `shape` is that of the whole parameter.
    ///
    /// 8-bit states are equal to those of the whole parameter when the shard begins at a multiple of 256 elements.
    /// bf16 values need the full precision that is remembered from the first step on; shards in f32 need none.
    ///
    /// # Panics
    /// When lengths differ, and for a matrix under Muon, which needs whole matrices ([`Optimizer::needs_whole`]).
    pub fn update_slice(
        &mut self,
        key: &str,
        shape: &[usize],
        values: Values<'_>,
        gradient: &[f32],
        factors: StepFactors,
    ) {
        assert!(!self.needs_whole(key, shape), "{key}: Muon needs the whole matrix");
        let hyper = self.hyper(Group::of(key, shape), shape, factors);
        let state = match self.state.parameters.remove(key) {
            Some(state) => state,
            None => ParameterState::of_slice(&self.config, shape.iter().product(), &values),
        };
        let state = adam::fused(&hyper, self.state.step, state, values, gradient);
        self.state.parameters.insert(key.to_owned(), state);
    }

    /// Whether the update of a parameter depends on all of it at once, so that a shard cannot be updated alone.
    pub fn needs_whole(&self, key: &str, shape: &[usize]) -> bool {
        self.config.muon.is_some() && Group::of(key, shape) == Group::Matrix
    }

    /// What is remembered of a parameter that has `elements` values over all ranks.
    fn take(&mut self, key: &str, elements: usize, values: &Tensor<1>) -> ParameterState {
        let state = self.state.parameters.remove(key);
        state.unwrap_or_else(|| ParameterState::of_tensor(&self.config, elements, values))
    }

    fn hyper(&self, group: Group, shape: &[usize], factors: StepFactors) -> AdamW {
        let StepFactors { mut lr, mut weight_decay, grad_scale } = factors;
        if let Some(muon) = &self.config.muon {
            lr *= muon.scalar_rate(group, shape, self.config.lr);
            if matches!(group, Group::Embedding | Group::LmHead) {
                weight_decay = 0.0;
            }
        }
        let [beta1, beta2] = self.config.betas;
        let decoupled_weight_decay = self.config.kind == OptimizerKind::AdamW;
        AdamW { lr, beta1, beta2, eps: self.config.eps, weight_decay, decoupled_weight_decay, grad_scale }
    }
}

fn slice<T: burn::tensor::Element>(data: &TensorData) -> &[T] {
    data.as_slice().expect("the data has the tensor's dtype")
}
