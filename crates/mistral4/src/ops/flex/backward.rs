//! The backward kernels, and the forward ones that keep something for them.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;
use half::bf16;
use mistral4_checkpoint::config::Activation;
use mistral4_kernels as kernels;

use super::{
    F, I, attention_inputs, by_dtype, contiguous, elements, grouped_dims, linear_dims, mla_inputs, output,
    rope_dims, slice, tensor, with_contiguous_rows, with_ints,
};
use crate::ops::activation::kernel_activation;
use crate::ops::autodiff::{BackwardKernels, LossAndGradients};
use crate::ops::saved::{AttentionSaved, MlaSaved, MoeInputs, MoeSaved, RmsNormSaved};
use crate::ops::{AttentionSpec, ExpertGradients, MlaSpec, RopeSpec, TokenLossScale};

impl BackwardKernels for Flex {
    fn scaled(gradient: F, factor: F) -> F {
        let factor = slice::<f32>(&factor)[0];
        if factor == 1.0 {
            return gradient;
        }
        <Flex as FloatTensorOps<Flex>>::float_mul_scalar(gradient, factor.into())
    }

    fn linear_backward_input(dy: F, weight: F) -> F {
        let [rows, outputs] = dy.shape().dims();
        let [_, inputs] = weight.shape().dims();
        let dims = kernels::LinearDims { rows, inputs, outputs };
        let [dy, weight] = [dy, weight].map(contiguous);
        by_dtype!(dy, T => {
            let mut dx = output::<T>(rows * inputs);
            kernels::linear_backward_input(dims, slice::<T>(&dy), slice::<T>(&weight), &mut dx, false);
            tensor(dx, [rows, inputs])
        })
    }

    fn linear_backward_weight(dy: F, x: F) -> F {
        let [rows, outputs] = dy.shape().dims();
        let [_, inputs] = x.shape().dims();
        let dims = kernels::LinearDims { rows, inputs, outputs };
        let [dy, x] = [dy, x].map(contiguous);
        by_dtype!(dy, T => {
            let mut dweight = output::<T>(outputs * inputs);
            kernels::linear_backward_weight(dims, slice::<T>(&dy), slice::<T>(&x), &mut dweight, false);
            tensor(dweight, [outputs, inputs])
        })
    }

    fn linear_f32_backward_input(dy: F, weight: F, x: &F) -> F {
        let dims = linear_dims(x, &weight);
        let [dy, weight] = [dy, weight].map(contiguous);
        by_dtype!(x, X => by_dtype!(weight, W => {
            let mut dx = output::<X>(dims.rows * dims.inputs);
            kernels::linear_backward_input(dims, slice::<f32>(&dy), slice::<W>(&weight), &mut dx, false);
            tensor(dx, [dims.rows, dims.inputs])
        }))
    }

    fn linear_f32_backward_weight(dy: F, x: F, weight: &F) -> F {
        let dims = linear_dims(&x, weight);
        let [dy, x] = [dy, x].map(contiguous);
        by_dtype!(x, X => by_dtype!(weight, W => {
            let mut dweight = output::<W>(dims.outputs * dims.inputs);
            kernels::linear_backward_weight(dims, slice::<f32>(&dy), slice::<X>(&x), &mut dweight, false);
            tensor(dweight, [dims.outputs, dims.inputs])
        }))
    }

    fn routing_weights_backward(logits: F, indices: I, dweights: F, dims: kernels::RouterDims) -> F {
        let [logits, dweights] = [logits, dweights].map(contiguous);
        with_ints!(indices, indices => {
            let mut dlogits = output::<f32>(dims.tokens * dims.experts);
            let (of_logits, of_weights) = (slice(&logits), slice(&dweights));
            kernels::routing_weights_backward(dims, of_logits, indices, of_weights, &mut dlogits);
            tensor(dlogits, [dims.tokens, dims.experts])
        })
    }

    fn rms_norm_with_rstd(x: F, weight: F, eps: f64) -> (F, F) {
        let [rows, _] = x.shape().dims();
        let [x, weight] = [x, weight].map(contiguous);
        by_dtype!(x, T => {
            let (mut y, mut rstd) = (output::<T>(elements(&x)), output::<f32>(rows));
            kernels::rms_norm(slice::<T>(&x), slice::<T>(&weight), eps as f32, &mut y, &mut rstd);
            (tensor(y, x.shape()), tensor(rstd, [rows]))
        })
    }

    fn rms_norm_backward(saved: RmsNormSaved<Flex>, dy: F, want_weight: bool) -> (F, Option<F>) {
        let RmsNormSaved { x, weight, rstd } = saved;
        let [x, weight, rstd, dy] = [x, weight, rstd, dy].map(contiguous);
        by_dtype!(x, T => {
            let mut dx = output::<T>(elements(&x));
            let mut dweight = want_weight.then(|| output::<T>(elements(&weight)));
            let saved =
                kernels::RmsNormSaved { x: slice::<T>(&x), weight: slice::<T>(&weight), rstd: slice(&rstd) };
            kernels::rms_norm_backward(saved, slice::<T>(&dy), &mut dx, dweight.as_deref_mut());
            (tensor(dx, x.shape()), dweight.map(|d| tensor(d, weight.shape())))
        })
    }

    fn rope_backward(dy: F, cos: F, sin: F, spec: RopeSpec) -> F {
        let dims = rope_dims(&dy, &cos, &spec);
        let [dy, cos, sin] = [dy, cos, sin].map(contiguous);
        by_dtype!(dy, T => {
            let mut dx = output::<T>(elements(&dy));
            let scale = spec.scale.as_deref();
            kernels::rope_backward(dims, slice::<T>(&dy), slice(&cos), slice(&sin), scale, &mut dx);
            tensor(dx, dy.shape())
        })
    }

    fn attention_with_lse(q: F, k: F, v: F, spec: &AttentionSpec) -> (F, F) {
        let [rows, heads, _] = q.shape().dims();
        let [_, _, value_dim] = v.shape().dims();
        let [q, k, v] = [q, k, v].map(with_contiguous_rows);
        by_dtype!(q, T => {
            let (mut out, mut lse) = (output::<T>(rows * heads * value_dim), output::<f32>(rows * heads));
            kernels::attention(&attention_inputs::<T>([&q, &k, &v], spec), &mut out, &mut lse);
            (tensor(out, [rows, heads, value_dim]), tensor(lse, [rows, heads]))
        })
    }

    fn attention_backward(saved: AttentionSaved<Flex>, dout: F) -> [F; 3] {
        let AttentionSaved { q, k, v, out, lse, spec } = saved;
        let shapes = [&q, &k, &v].map(|t| t.shape());
        let [q, k, v] = [q, k, v].map(with_contiguous_rows);
        let [out, lse, dout] = [out, lse, dout].map(contiguous);
        by_dtype!(q, T => {
            let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|t| output::<T>(elements(t)));
            let saved = kernels::AttentionSaved { out: slice::<T>(&out), lse: slice(&lse) };
            let grads = kernels::AttentionGrads { q: &mut dq, k: &mut dk, v: &mut dv };
            kernels::attention_backward(
                &attention_inputs::<T>([&q, &k, &v], &spec),
                saved,
                slice::<T>(&dout),
                grads,
            );
            let [q, k, v] = shapes;
            [tensor(dq, q), tensor(dk, k), tensor(dv, v)]
        })
    }

    fn mla_attention_with_lse(q: F, kv: F, k_pe: F, spec: &MlaSpec) -> (F, F) {
        let [rows, heads, _] = q.shape().dims();
        let [q, kv, k_pe] = [q, kv, k_pe].map(contiguous);
        by_dtype!(q, T => {
            let (mut out, mut lse) =
                (output::<T>(rows * heads * spec.value_dim), output::<f32>(rows * heads));
            kernels::mla_attention(&mla_inputs::<T>([&q, &kv, &k_pe], spec), &mut out, &mut lse);
            (tensor(out, [rows, heads, spec.value_dim]), tensor(lse, [rows, heads]))
        })
    }

    fn mla_attention_backward(saved: MlaSaved<Flex>, dout: F) -> [F; 3] {
        let MlaSaved { q, kv, k_pe, out, lse, spec } = saved;
        let [q, kv, k_pe, out, lse, dout] = [q, kv, k_pe, out, lse, dout].map(contiguous);
        by_dtype!(q, T => {
            let [mut dq, mut dkv, mut dk_pe] = [&q, &kv, &k_pe].map(|t| output::<T>(elements(t)));
            let saved = kernels::AttentionSaved { out: slice::<T>(&out), lse: slice(&lse) };
            let grads = kernels::MlaGrads { q: &mut dq, kv: &mut dkv, k_pe: &mut dk_pe };
            let inputs = mla_inputs::<T>([&q, &kv, &k_pe], &spec);
            kernels::mla_attention_backward(&inputs, saved, slice::<T>(&dout), grads);
            [tensor(dq, q.shape()), tensor(dkv, kv.shape()), tensor(dk_pe, k_pe.shape())]
        })
    }

    fn gated_backward([gate, up, dout]: [F; 3], activation: Activation) -> [F; 2] {
        let [gate, up, dout] = [gate, up, dout].map(contiguous);
        by_dtype!(gate, T => {
            let [mut dgate, mut dup] = [&gate, &up].map(|t| output::<T>(elements(t)));
            let inputs = [slice::<T>(&gate), slice::<T>(&up), slice::<T>(&dout)];
            kernels::gated_backward(kernel_activation(activation), inputs, [&mut dgate, &mut dup]);
            [dgate, dup].map(|d| tensor(d, gate.shape()))
        })
    }

    fn moe_experts_keeping(inputs: MoeInputs<Flex>) -> (F, MoeSaved<Flex>) {
        let inputs = inputs.contiguous();
        let (out, kept) = by_dtype!(inputs.x, T => with_ints!(inputs.indices.clone(), indices => {
            let mut out = output::<T>(elements(&inputs.x));
            let experts = inputs.experts::<T, _>(indices);
            let shape = [indices.len(), 2 * experts.dims.inter];
            let mut kept = output::<T>(shape[0] * shape[1]);
            kernels::moe_experts_keeping(&experts, &mut kept, &mut out);
            (tensor(out, inputs.x.shape()), tensor(kept, shape))
        }));
        (out, MoeSaved { inputs, kept })
    }

    fn moe_experts_backward(saved: MoeSaved<Flex>, dout: F, want: [bool; 4]) -> [Option<F>; 4] {
        let MoeSaved { inputs, kept } = saved;
        let dout = contiguous(dout);
        let [want_x, want_weights, want_gate_up, want_down] = want;
        by_dtype!(inputs.x, T => with_ints!(inputs.indices.clone(), indices => {
            let mut dx = want_x.then(|| output::<T>(elements(&inputs.x)));
            let mut dweights = want_weights.then(|| output::<f32>(elements(&inputs.weights)));
            let mut dgate_up = want_gate_up.then(|| output::<T>(elements(&inputs.gate_up)));
            let mut ddown = want_down.then(|| output::<T>(elements(&inputs.down)));
            let grads = kernels::ExpertGrads {
                x: dx.as_deref_mut(),
                weights: dweights.as_deref_mut(),
                gate_up: dgate_up.as_deref_mut(),
                down: ddown.as_deref_mut(),
            };
            let experts = inputs.experts::<T, _>(indices);
            kernels::moe_experts_backward(&experts, slice::<T>(&kept), slice::<T>(&dout), grads);
            [
                dx.map(|d| tensor(d, inputs.x.shape())),
                dweights.map(|d| tensor(d, inputs.weights.shape())),
                dgate_up.map(|d| tensor(d, inputs.gate_up.shape())),
                ddown.map(|d| tensor(d, inputs.down.shape())),
            ]
        }))
    }

    fn moe_experts_backward_deferring(saved: MoeSaved<Flex>, dout: F, want: [bool; 2]) -> [Option<F>; 2] {
        let MoeSaved { inputs, kept } = saved;
        let dout = contiguous(dout);
        let [want_x, want_weights] = want;
        by_dtype!(inputs.x, T => with_ints!(inputs.indices.clone(), indices => {
            let mut dx = want_x.then(|| output::<T>(elements(&inputs.x)));
            let mut dweights = want_weights.then(|| output::<f32>(elements(&inputs.weights)));
            let [gate_up, down] = kernels::moe_experts_backward_deferring(
                &inputs.experts::<T, _>(indices),
                slice::<T>(&kept),
                slice::<T>(&dout),
                dx.as_deref_mut(),
                dweights.as_deref_mut(),
            );
            inputs.deferral.fill(ExpertGradients { gate_up: gate_up.into(), down: down.into() });
            [
                dx.map(|d| tensor(d, inputs.x.shape())),
                dweights.map(|d| tensor(d, inputs.weights.shape())),
            ]
        }))
    }

    fn grouped_linear_backward_input(dy: F, weight: F, offsets: &[usize]) -> F {
        let dims = grouped_dims(&weight);
        let [rows, _] = dy.shape().dims();
        let [dy, weight] = [dy, weight].map(contiguous);
        by_dtype!(dy, T => {
            let mut dx = output::<T>(rows * dims.inputs);
            let (dy, weight) = (slice::<T>(&dy), slice::<T>(&weight));
            kernels::grouped_linear_backward_input(dims, offsets, dy, weight, &mut dx);
            tensor(dx, [rows, dims.inputs])
        })
    }

    fn grouped_linear_backward_weight(dy: F, x: F, offsets: &[usize]) -> F {
        let [_, outputs] = dy.shape().dims();
        let [_, inputs] = x.shape().dims();
        let dims = kernels::GroupedLinearDims { experts: offsets.len() - 1, inputs, outputs };
        let [dy, x] = [dy, x].map(contiguous);
        by_dtype!(dy, T => {
            let mut dweight = output::<T>(dims.experts * outputs * inputs);
            let (dy, x) = (slice::<T>(&dy), slice::<T>(&x));
            kernels::grouped_linear_backward_weight(dims, offsets, dy, x, &mut dweight);
            tensor(dweight, [dims.experts, outputs, inputs])
        })
    }

    fn linear_cross_entropy_with_gradients(
        h: F,
        lm_head: F,
        labels: I,
        scale: TokenLossScale,
        want: (bool, bool),
    ) -> LossAndGradients<Flex> {
        let [vocab, width] = lm_head.shape().dims();
        let [h, lm_head] = [h, lm_head].map(contiguous);
        by_dtype!(h, T => with_ints!(labels, labels => {
            let mut dh = want.0.then(|| output::<T>(elements(&h)));
            let mut dlm_head = want.1.then(|| output::<T>(elements(&lm_head)));
            let input = kernels::LinearCrossEntropy {
                hidden: slice::<T>(&h),
                lm_head: slice::<T>(&lm_head),
                labels,
                vocab,
                width,
                z_loss: scale.z_loss as f32,
                grad_scale: scale.per_token as f32,
            };
            let grads = kernels::LinearCrossEntropyGrads {
                hidden: dh.as_deref_mut(),
                lm_head: dlm_head.as_deref_mut(),
            };
            let sum = kernels::linear_cross_entropy(&input, grads);
            let total = (sum.loss + sum.z_loss) * scale.per_token;
            (
                tensor(vec![total as f32, sum.loss as f32, sum.z_loss as f32], [3]),
                dh.map(|d| tensor(d, h.shape())),
                dlm_head.map(|d| tensor(d, lm_head.shape())),
            )
        }))
    }
}
