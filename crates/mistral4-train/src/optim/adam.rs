//! Adam and AdamW: one pass over parameter, gradient and states on the CPU, tensor operations elsewhere.

use burn::tensor::{DType, Element as BurnElement, Int, Tensor, TensorData};
use half::bf16;
use mistral4::ops::DeferredGradient;
use mistral4_kernels::{
    self as kernels, AdamW, AdamW8bitState, AdamWState, AdamWWeight, Element, Quantized8bit,
};

use super::{Moments, ParameterState, Quantized, Values};

/// Steps a parameter, or a shard of it, in place.
///
/// The states' memory is taken out of their tensors and put back: nothing is copied unless it is shared.
///
/// Source: `torch.optim.Adam` and `torch.optim.AdamW`; bitsandbytes for 8-bit moments.
pub(super) fn fused<G: Element>(
    hyper: &AdamW,
    step: u64,
    state: ParameterState,
    values: Values<'_>,
    gradient: &[G],
) -> ParameterState {
    let ParameterState { moments, master } = state;
    let mut master = master.map(Tensor::into_data);
    let param = Param::of(values, master.as_mut());
    let moments = match moments {
        Moments::Float { exp_avg, exp_avg_sq } => {
            let (dtype, device) = (exp_avg.dtype(), exp_avg.device());
            let mut data = [exp_avg.into_data(), exp_avg_sq.into_data()];
            match dtype {
                DType::BF16 => float::<bf16, G>(hyper, step, param, gradient, &mut data),
                _ => float::<f32, G>(hyper, step, param, gradient, &mut data),
            }
            let [exp_avg, exp_avg_sq] = data.map(|data| Tensor::from_data(data, (&device, dtype)));
            Moments::Float { exp_avg, exp_avg_sq }
        }
        Moments::Int8 { exp_avg, exp_avg_sq } => {
            let device = exp_avg.absmax.device();
            let mut data = [exp_avg, exp_avg_sq].map(|q| (q.codes.into_data(), q.absmax.into_data()));
            let [exp_avg, exp_avg_sq] = &mut data;
            let moments = [quantized(exp_avg), quantized(exp_avg_sq)];
            match param {
                Param::F32(param) => int8(hyper, step, (param, None), gradient, moments),
                Param::Bf16(param) => int8(hyper, step, (param, None), gradient, moments),
                Param::Master(master, rounded) => {
                    int8(hyper, step, (master, Some(rounded)), gradient, moments);
                }
            }
            let [exp_avg, exp_avg_sq] = data.map(|(codes, absmax)| Quantized {
                codes: Tensor::<1, Int>::from_data(codes, (&device, DType::U8)),
                absmax: Tensor::from_data(absmax, (&device, DType::F32)),
            });
            Moments::Int8 { exp_avg, exp_avg_sq }
        }
        Moments::Momentum(_) => unreachable!("a resumed run's states are checked against its optimizer"),
    };
    let master = master.map(|data| Tensor::from_data(data, (&burn::tensor::Device::default(), DType::F32)));
    ParameterState { moments, master }
}

/// As [`fused`], with a gradient that is multiplied out meanwhile.
pub(super) fn deferred(
    hyper: &AdamW,
    step: u64,
    state: ParameterState,
    values: Values<'_>,
    gradient: &DeferredGradient,
) -> ParameterState {
    let ParameterState { moments: Moments::Float { exp_avg, exp_avg_sq }, master } = state else {
        unreachable!("other moments are not stepped by products")
    };
    let (dtype, device) = (exp_avg.dtype(), exp_avg.device());
    let (mut moments, mut master) =
        ([exp_avg.into_data(), exp_avg_sq.into_data()], master.map(Tensor::into_data));
    let param = Param::of(values, master.as_mut());
    match dtype {
        DType::BF16 => deferred_float::<bf16>(hyper, step, param, gradient, &mut moments),
        _ => deferred_float::<f32>(hyper, step, param, gradient, &mut moments),
    }
    let [exp_avg, exp_avg_sq] = moments.map(|data| Tensor::from_data(data, (&device, dtype)));
    let master = master.map(|data| Tensor::from_data(data, (&device, DType::F32)));
    ParameterState { moments: Moments::Float { exp_avg, exp_avg_sq }, master }
}

fn deferred_float<S: Element + BurnElement>(
    hyper: &AdamW,
    step: u64,
    param: Param<'_>,
    gradient: &DeferredGradient,
    [exp_avg, exp_avg_sq]: &mut [TensorData; 2],
) {
    let (exp_avg, exp_avg_sq) = (slice::<S>(exp_avg), slice::<S>(exp_avg_sq));
    match param {
        Param::F32(param) => {
            gradient.step(hyper, step, AdamWWeight { param, rounded: None, exp_avg, exp_avg_sq });
        }
        Param::Bf16(param) => {
            gradient.step(hyper, step, AdamWWeight { param, rounded: None, exp_avg, exp_avg_sq });
        }
        Param::Master(param, rounded) => {
            gradient.step(hyper, step, AdamWWeight { param, rounded: Some(rounded), exp_avg, exp_avg_sq });
        }
    }
}

/// A parameter as the step changes it.
enum Param<'a> {
    F32(&'a mut [f32]),
    /// Rounded at random.
    Bf16(&'a mut [bf16]),
    /// The master, and the parameter that is rounded from it.
    Master(&'a mut [f32], &'a mut [bf16]),
}

impl<'a> Param<'a> {
    fn of(values: Values<'a>, master: Option<&'a mut TensorData>) -> Self {
        match (values, master) {
            (Values::F32(values), _) => Param::F32(values),
            (Values::Bf16(rounded), Some(master)) => Param::Master(slice(master), rounded),
            (Values::Bf16(values), None) => Param::Bf16(values),
        }
    }
}

fn float<S: Element + BurnElement, G: Element>(
    hyper: &AdamW,
    step: u64,
    param: Param<'_>,
    grad: &[G],
    [exp_avg, exp_avg_sq]: &mut [TensorData; 2],
) {
    let (exp_avg, exp_avg_sq) = (slice::<S>(exp_avg), slice::<S>(exp_avg_sq));
    match param {
        Param::F32(param) => {
            kernels::adamw_step(hyper, step, AdamWState { param, grad, exp_avg, exp_avg_sq });
        }
        Param::Bf16(param) => {
            kernels::adamw_step(hyper, step, AdamWState { param, grad, exp_avg, exp_avg_sq });
        }
        Param::Master(param, rounded) => {
            let state = AdamWState { param, grad, exp_avg, exp_avg_sq };
            kernels::adamw_step_master(hyper, step, rounded, state);
        }
    }
}

fn int8<P: Element, G: Element>(
    hyper: &AdamW,
    step: u64,
    (param, rounded): (&mut [P], Option<&mut [bf16]>),
    grad: &[G],
    [exp_avg, exp_avg_sq]: [Quantized8bit<'_>; 2],
) {
    kernels::adamw_step_8bit(hyper, step, AdamW8bitState { param, rounded, grad, exp_avg, exp_avg_sq });
}

fn quantized((codes, absmax): &mut (TensorData, TensorData)) -> Quantized8bit<'_> {
    Quantized8bit { codes: slice(codes), absmax: slice(absmax) }
}

fn slice<T: BurnElement>(data: &mut TensorData) -> &mut [T] {
    data.as_mut_slice().expect("the data has the tensor's dtype")
}

/// Steps a parameter with tensor operations; moments in bf16 are rounded to nearest.
pub(super) fn composite(
    hyper: &AdamW,
    step: u64,
    state: ParameterState,
    values: Tensor<1>,
    gradient: Tensor<1>,
) -> (ParameterState, Tensor<1>) {
    let ParameterState { moments: Moments::Float { exp_avg, exp_avg_sq }, master } = state else {
        unreachable!("8-bit moments are refused on this device, and resumed states are checked")
    };
    let (dtype, moments) = (values.dtype(), exp_avg.dtype());
    let full = master.unwrap_or(values);
    let mut gradient = gradient * hyper.grad_scale;
    let mut keep = 1.0;
    if hyper.decoupled_weight_decay {
        keep -= hyper.lr * hyper.weight_decay;
    } else if hyper.weight_decay > 0.0 {
        gradient = gradient + full.clone() * hyper.weight_decay;
    }
    let exp_avg = exp_avg.cast(DType::F32) * hyper.beta1 + gradient.clone() * (1.0 - hyper.beta1);
    let exp_avg_sq = exp_avg_sq.cast(DType::F32) * hyper.beta2 + gradient.square() * (1.0 - hyper.beta2);
    let unbias = |beta: f64| 1.0 - beta.powf(step as f64);
    let root = exp_avg_sq.clone().sqrt() / unbias(hyper.beta2).sqrt() + hyper.eps;
    let change = exp_avg.clone() / root * (hyper.lr / unbias(hyper.beta1));
    let full = full * keep - change;
    let moments = Moments::Float { exp_avg: exp_avg.cast(moments), exp_avg_sq: exp_avg_sq.cast(moments) };
    match dtype {
        DType::F32 => (ParameterState { moments, master: None }, full),
        _ => (ParameterState { moments, master: Some(full.clone()) }, full.cast(dtype)),
    }
}
