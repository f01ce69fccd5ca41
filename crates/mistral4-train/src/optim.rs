//! Adam and AdamW over a model's parameters, with f32 states.

use std::collections::BTreeMap;

use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;
use mistral4::model::Mistral4;
use mistral4::ops;
use mistral4_kernels as kernels;

use crate::backward::Gradients;
use crate::recipe::{OptimizerConfig, OptimizerKind};

/// The optimizer of a run.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    state: OptimizerState,
}

/// What an optimizer remembers.
#[derive(Debug, Clone, Default)]
pub struct OptimizerState {
    /// Steps taken.
    pub step: u64,
    /// What is remembered of each parameter, by canonical key.
    pub parameters: BTreeMap<String, ParameterState>,
}

/// What the optimizer remembers of one parameter, flat, f32.
#[derive(Debug, Clone)]
pub struct ParameterState {
    /// Running mean of the gradient, `[elements]`.
    pub exp_avg: Tensor<1>,
    /// Running mean of the squared gradient, `[elements]`.
    pub exp_avg_sq: Tensor<1>,
    /// The parameter in full precision, where the model holds it in bf16, `[elements]`.
    pub master: Option<Tensor<1>>,
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

impl Optimizer {
    /// An optimizer without history.
    pub fn new(config: OptimizerConfig) -> Self {
        Self::resume(config, OptimizerState::default())
    }

    /// An optimizer that goes on from `state`.
    pub fn resume(config: OptimizerConfig, state: OptimizerState) -> Self {
        Self { config, state }
    }

    /// What is remembered.
    pub fn state(&self) -> &OptimizerState {
        &self.state
    }

    /// Moves every parameter that has a gradient.
    ///
    /// Source: `torch.optim.AdamW`; with [`OptimizerKind::Adam`] weight decay is added to the gradient instead.
    pub fn step(&mut self, model: Mistral4, mut gradients: Gradients, factors: StepFactors) -> Mistral4 {
        self.state.step += 1;
        model.map_parameters(|key, param| {
            let gradient = gradients.remove(key)?;
            Some(self.update(key, param, gradient, factors))
        })
    }

    fn update(
        &mut self,
        key: &str,
        param: Tensor<1>,
        gradient: Tensor<1>,
        factors: StepFactors,
    ) -> Tensor<1> {
        let gradient = match self.config.kind {
            OptimizerKind::Adam if factors.weight_decay > 0.0 => {
                gradient * factors.grad_scale + param.clone().cast(DType::F32) * factors.weight_decay
            }
            _ => gradient,
        };
        let [beta1, beta2] = self.config.betas;
        let decays_gradient = self.config.kind == OptimizerKind::Adam && factors.weight_decay > 0.0;
        let hyper = kernels::AdamW {
            lr: factors.lr,
            beta1,
            beta2,
            eps: self.config.eps,
            weight_decay: if self.config.kind == OptimizerKind::AdamW { factors.weight_decay } else { 0.0 },
            grad_scale: if decays_gradient { 1.0 } else { factors.grad_scale },
        };
        let step = self.state.step;
        let entry = self.state.parameters.entry(key.to_owned());
        let state = entry.or_insert_with(|| ParameterState::new(&param));
        if ops::is_fused(&param.device()) {
            state.update_fused(&hyper, step, param, gradient)
        } else {
            state.update_composite(&hyper, step, param, gradient)
        }
    }
}

impl ParameterState {
    fn new(param: &Tensor<1>) -> Self {
        let zeros = || Tensor::zeros(param.shape(), (&param.device(), DType::F32));
        let master = (param.dtype() != DType::F32).then(|| param.clone().cast(DType::F32));
        Self { exp_avg: zeros(), exp_avg_sq: zeros(), master }
    }

    fn update_fused(
        &mut self,
        hyper: &kernels::AdamW,
        step: u64,
        param: Tensor<1>,
        gradient: Tensor<1>,
    ) -> Tensor<1> {
        let (device, dtype) = (param.device(), param.dtype());
        let [count] = param.dims();
        let gradient = gradient.into_data();
        let gradient = gradient.as_slice::<f32>().expect("gradients are f32");
        let placeholder = Tensor::<1>::zeros([0], &device);
        let mut exp_avg = std::mem::replace(&mut self.exp_avg, placeholder.clone()).into_data();
        let mut exp_avg_sq = std::mem::replace(&mut self.exp_avg_sq, placeholder).into_data();
        let full = match self.master.take() {
            Some(master) => master,
            None => param,
        };
        let mut full = full.into_data();
        let values = full.as_mut_slice::<f32>().expect("full precision is f32");
        kernels::adamw_step(
            hyper,
            step,
            kernels::AdamWState {
                param: values,
                grad: gradient,
                exp_avg: exp_avg.as_mut_slice::<f32>().expect("states are f32"),
                exp_avg_sq: exp_avg_sq.as_mut_slice::<f32>().expect("states are f32"),
            },
        );
        self.exp_avg = Tensor::from_data(exp_avg, (&device, DType::F32));
        self.exp_avg_sq = Tensor::from_data(exp_avg_sq, (&device, DType::F32));
        if dtype == DType::F32 {
            return Tensor::from_data(full, (&device, DType::F32));
        }
        let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let rounded = Tensor::<1>::from_data(TensorData::new(rounded, [count]), (&device, DType::BF16));
        self.master = Some(Tensor::from_data(full, (&device, DType::F32)));
        rounded.cast(dtype)
    }

    fn update_composite(
        &mut self,
        hyper: &kernels::AdamW,
        step: u64,
        param: Tensor<1>,
        gradient: Tensor<1>,
    ) -> Tensor<1> {
        let dtype = param.dtype();
        let gradient = gradient * hyper.grad_scale;
        let full = self.master.take().unwrap_or(param);
        self.exp_avg = self.exp_avg.clone() * hyper.beta1 + gradient.clone() * (1.0 - hyper.beta1);
        self.exp_avg_sq = self.exp_avg_sq.clone() * hyper.beta2 + gradient.square() * (1.0 - hyper.beta2);
        let unbias = |beta: f64| 1.0 - beta.powf(step as f64);
        let root = self.exp_avg_sq.clone().sqrt() / unbias(hyper.beta2).sqrt() + hyper.eps;
        let change = self.exp_avg.clone() / root * (hyper.lr / unbias(hyper.beta1));
        let full = full * (1.0 - hyper.lr * hyper.weight_decay) - change;
        if dtype == DType::F32 {
            return full;
        }
        self.master = Some(full.clone());
        full.cast(dtype)
    }
}
