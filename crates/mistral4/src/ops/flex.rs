//! The fused operations on Burn's CPU backend: slices in, kernel, slices out.

use std::sync::Arc;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Element as BurnElement, Shape, TensorData};
use half::bf16;
use mistral4_checkpoint::config::Activation;
use mistral4_kernels as kernels;

use super::activation::kernel_activation;
use super::autodiff::{
    AttentionSaved, BackwardKernels, LossAndGradients, MlaSaved, MoeInputs, MoeSaved, RmsNormSaved,
};
use super::extension::FusedOps;
use super::packed::PackedWeight;
use super::{AttentionSpec, MlaSpec, RopeSpec, TokenLossScale};

type F = FloatTensor<Flex>;
type I = IntTensor<Flex>;

/// Runs `$body` with `$T` standing for the element type of `$tensor`.
macro_rules! by_dtype {
    ($tensor:expr, $T:ident => $body:expr) => {
        match $tensor.dtype() {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            other => panic!("the CPU kernels compute in f32 and bf16, not in {other:?}"),
        }
    };
}

pub(super) use by_dtype;

/// Runs `$body` with `$slice` bound to the integers of `$tensor`.
macro_rules! with_ints {
    ($tensor:expr, $slice:ident => $body:expr) => {{
        let tensor = $crate::ops::flex::contiguous($tensor);
        match tensor.dtype() {
            DType::I32 => {
                let $slice: &[i32] = tensor.as_slice().expect("a contiguous tensor of this dtype");
                $body
            }
            DType::I64 => {
                let $slice: &[i64] = tensor.as_slice().expect("a contiguous tensor of this dtype");
                $body
            }
            other => panic!("indices are i32 or i64, not {other:?}"),
        }
    }};
}

pub(super) use with_ints;

pub(super) fn slice<T: BurnElement + bytemuck::Pod>(tensor: &F) -> &[T] {
    tensor.as_slice().expect("a contiguous tensor of this dtype")
}

pub(super) fn tensor<T: BurnElement>(data: Vec<T>, shape: impl Into<Shape>) -> F {
    F::from_data(TensorData::new(data, shape.into()))
}

/// Memory for what a kernel writes, holding what was there before: clearing it would take one thread as long as a
/// kernel of two threads takes to fill it.
pub(super) fn output<T: kernels::Element>(len: usize) -> Vec<T> {
    let values = Box::<[T]>::new_uninit_slice(len);
    // SAFETY: a float has no invalid bits, and every kernel writes its whole output before it reads any of it, which its
    // tests check by filling outputs with NaN beforehand.
    unsafe { values.assume_init() }.into_vec()
}

/// A tensor whose values lie side by side, for [`slice`]. Burn's own `to_contiguous` copies a part of a larger buffer as
/// well, such as the filled slots of a cache.
pub(super) fn contiguous(t: F) -> F {
    if t.layout().is_contiguous() { t } else { t.to_contiguous() }
}

fn elements(t: &F) -> usize {
    t.shape().num_elements()
}

fn linear_dims(x: &F, weight: &F) -> kernels::LinearDims {
    let [rows, inputs] = x.shape().dims();
    let [outputs, _] = weight.shape().dims();
    kernels::LinearDims { rows, inputs, outputs }
}

fn grouped_dims(weight: &F) -> kernels::GroupedLinearDims {
    let [experts, outputs, inputs] = weight.shape().dims();
    kernels::GroupedLinearDims { experts, inputs, outputs }
}

fn rope_dims(x: &F, cos: &F, spec: &RopeSpec) -> kernels::RopeDims {
    let [tokens, heads, head_dim] = x.shape().dims();
    let [_, pairs] = cos.shape().dims();
    let (offset, interleaved) = (spec.offset, spec.interleaved);
    kernels::RopeDims { tokens, heads, head_dim, offset, rope_dim: 2 * pairs, interleaved }
}

/// A tensor whose rows `[N, H]` are contiguous; the rows themselves may lie apart, as in a slice of a cache.
fn with_contiguous_rows(t: F) -> F {
    let [_, heads, width] = t.shape().dims();
    let strides = t.layout().strides();
    let rows_ok = strides[2] == 1 && (heads == 1 || strides[1] == width as isize) && strides[0] >= 0;
    if rows_ok { t } else { contiguous(t) }
}

/// The values from the first row on, and the distance between rows.
fn strided<T: BurnElement + bytemuck::Pod>(t: &F) -> (&[T], usize) {
    let layout = t.layout();
    (&t.storage::<T>()[layout.start_offset()..], layout.strides()[0] as usize)
}

fn attention_inputs<'a, T: kernels::Element + BurnElement + bytemuck::Pod>(
    [q, k, v]: [&'a F; 3],
    spec: &'a AttentionSpec,
) -> kernels::Attention<'a, T> {
    let [_, heads, head_dim] = q.shape().dims();
    let [_, kv_heads, value_dim] = v.shape().dims();
    let ((q, q_stride), (k, k_stride), (v, v_stride)) = (strided(q), strided(k), strided(v));
    let dims = kernels::AttentionDims {
        heads,
        kv_heads,
        head_dim,
        value_dim,
        q_stride,
        k_stride,
        v_stride,
        v_head_stride: value_dim,
    };
    kernels::Attention { dims, q, k, v, segments: &spec.segments, scale: spec.scale as f32 }
}

fn mla_inputs<'a, T: kernels::Element + BurnElement + bytemuck::Pod>(
    [q, kv, k_pe]: [&'a F; 3],
    spec: &'a MlaSpec,
) -> kernels::MlaAttention<'a, T> {
    let [_, heads, head_dim] = q.shape().dims();
    let (nope, value_dim) = (spec.nope, spec.value_dim);
    kernels::MlaAttention {
        dims: kernels::MlaDims { heads, nope, rope: head_dim - nope, value_dim },
        q: slice(q),
        kv: slice(kv),
        k_pe: slice(k_pe),
        segments: &spec.attention.segments,
        scale: spec.attention.scale as f32,
    }
}

impl MoeInputs<Flex> {
    fn contiguous(self) -> Self {
        let [x, weights, gate_up, down] = [self.x, self.weights, self.gate_up, self.down].map(contiguous);
        Self { x, weights, gate_up, down, ..self }
    }

    /// As the kernels take them; `indices` are the values of `self.indices`.
    fn experts<'a, T, I>(&'a self, indices: &'a [I]) -> kernels::Experts<'a, T, T, I>
    where
        T: BurnElement + bytemuck::Pod,
    {
        let [tokens, hidden] = self.x.shape().dims();
        let [_, top_k] = self.indices.shape().dims();
        let [experts, both, _] = self.gate_up.shape().dims();
        kernels::Experts {
            dims: kernels::ExpertDims { tokens, top_k, experts, hidden, inter: both / 2 },
            activation: kernel_activation(self.activation),
            x: slice(&self.x),
            indices,
            weights: slice(&self.weights),
            gate_up: slice(&self.gate_up),
            down: slice(&self.down),
        }
    }
}

impl FusedOps for Flex {
    fn linear(x: F, weight: F) -> F {
        let dims = linear_dims(&x, &weight);
        let [x, weight] = [x, weight].map(contiguous);
        by_dtype!(x, T => {
            let mut y = output::<T>(dims.rows * dims.outputs);
            kernels::linear(dims, slice::<T>(&x), slice::<T>(&weight), &mut y);
            tensor(y, [dims.rows, dims.outputs])
        })
    }

    fn linear_f32(x: F, weight: F) -> F {
        let dims = linear_dims(&x, &weight);
        let [x, weight] = [x, weight].map(contiguous);
        by_dtype!(x, X => by_dtype!(weight, W => {
            let mut y = output::<f32>(dims.rows * dims.outputs);
            kernels::linear(dims, slice::<X>(&x), slice::<W>(&weight), &mut y);
            tensor(y, [dims.rows, dims.outputs])
        }))
    }

    fn packed_linear(x: F, weight: PackedWeight) -> F {
        let [rows, _] = x.shape().dims();
        let outputs = weight.dims().rows;
        let x = contiguous(x);
        by_dtype!(x, T => {
            let mut y = output::<T>(rows * outputs);
            kernels::packed_linear(rows, slice::<T>(&x), &weight, &mut y);
            tensor(y, [rows, outputs])
        })
    }

    fn packed_experts(
        x: F,
        indices: I,
        weights: F,
        [gate_up, down]: [PackedWeight; 2],
        activation: Activation,
    ) -> F {
        let [tokens, hidden] = x.shape().dims();
        let [_, top_k] = indices.shape().dims();
        let kernels::StackDims { matrices: experts, columns: inter, .. } = down.dims();
        let [x, weights] = [x, weights].map(contiguous);
        by_dtype!(x, T => with_ints!(indices, indices => {
            let mut out = output::<T>(elements(&x));
            let experts = kernels::PackedExperts {
                dims: kernels::ExpertDims { tokens, top_k, experts, hidden, inter },
                activation: kernel_activation(activation),
                x: slice::<T>(&x),
                indices,
                weights: slice(&weights),
                gate_up: &gate_up,
                down: &down,
            };
            kernels::packed_experts(&experts, &mut out);
            tensor(out, x.shape())
        }))
    }

    fn routing_weights(logits: F, indices: I, dims: kernels::RouterDims) -> F {
        let logits = contiguous(logits);
        with_ints!(indices, indices => {
            let mut weights = output::<f32>(dims.tokens * dims.top_k);
            kernels::routing_weights(dims, slice(&logits), indices, &mut weights);
            tensor(weights, [dims.tokens, dims.top_k])
        })
    }

    fn rms_norm(x: F, weight: F, eps: f64) -> F {
        Flex::rms_norm_with_rstd(x, weight, eps).0
    }

    fn rope(x: F, cos: F, sin: F, spec: RopeSpec) -> F {
        let dims = rope_dims(&x, &cos, &spec);
        let [x, cos, sin] = [x, cos, sin].map(contiguous);
        by_dtype!(x, T => {
            let mut y = output::<T>(elements(&x));
            kernels::rope(dims, slice::<T>(&x), slice(&cos), slice(&sin), spec.scale.as_deref(), &mut y);
            tensor(y, x.shape())
        })
    }

    fn attention(q: F, k: F, v: F, spec: AttentionSpec) -> F {
        Flex::attention_with_lse(q, k, v, &spec).0
    }

    fn mla_attention(q: F, kv: F, k_pe: F, spec: MlaSpec) -> F {
        Flex::mla_attention_with_lse(q, kv, k_pe, &spec).0
    }

    fn latent_attention(q: F, latents: F, kv_b: F, spec: MlaSpec) -> F {
        let [tokens, heads, head_dim] = q.shape().dims();
        let [_, rank] = kv_b.shape().dims();
        let (nope, value_dim) = (spec.nope, spec.value_dim);
        let [q, kv_b] = [q, kv_b].map(contiguous);
        let latents = if latents.layout().strides()[1] == 1 { latents } else { contiguous(latents) };
        by_dtype!(q, T => {
            let mut out = output::<T>(tokens * heads * value_dim);
            let (latents, latent_stride) = strided::<T>(&latents);
            let input = kernels::LatentAttention {
                dims: kernels::LatentDims { heads, nope, rope: head_dim - nope, rank, value_dim, latent_stride },
                q: slice::<T>(&q),
                latents,
                kv_b: slice::<T>(&kv_b),
                segments: &spec.attention.segments,
                scale: spec.attention.scale as f32,
            };
            kernels::latent_attention(&input, &mut out);
            tensor(out, [tokens, heads, value_dim])
        })
    }

    fn gated(gate: F, up: F, activation: Activation) -> F {
        let [gate, up] = [gate, up].map(contiguous);
        by_dtype!(gate, T => {
            let mut out = output::<T>(elements(&gate));
            kernels::gated(kernel_activation(activation), slice::<T>(&gate), slice::<T>(&up), &mut out);
            tensor(out, gate.shape())
        })
    }

    fn add(a: F, b: F) -> F {
        let [a, b] = [a, b].map(contiguous);
        by_dtype!(a, T => {
            let mut out = output::<T>(elements(&a));
            kernels::add(slice::<T>(&a), slice::<T>(&b), &mut out);
            tensor(out, a.shape())
        })
    }

    fn moe_experts(x: F, indices: I, weights: F, gate_up: F, down: F, activation: Activation) -> F {
        let inputs = MoeInputs { x, indices, weights, gate_up, down, activation }.contiguous();
        by_dtype!(inputs.x, T => with_ints!(inputs.indices.clone(), indices => {
            let mut out = output::<T>(elements(&inputs.x));
            kernels::moe_experts(&inputs.experts::<T, _>(indices), &mut out);
            tensor(out, inputs.x.shape())
        }))
    }

    fn grouped_linear(x: F, weight: F, offsets: Arc<[usize]>) -> F {
        let dims = grouped_dims(&weight);
        let [rows, _] = x.shape().dims();
        let [x, weight] = [x, weight].map(contiguous);
        by_dtype!(x, T => {
            let mut y = output::<T>(rows * dims.outputs);
            kernels::grouped_linear(dims, &offsets, slice::<T>(&x), slice::<T>(&weight), &mut y);
            tensor(y, [rows, dims.outputs])
        })
    }

    fn linear_cross_entropy(h: F, lm_head: F, labels: I, scale: TokenLossScale, _want: (bool, bool)) -> F {
        Flex::linear_cross_entropy_with_gradients(h, lm_head, labels, scale, (false, false)).0
    }

    fn zero_with_gradient(_x: F, _gradient: F) -> F {
        tensor(vec![0.0f32], [1])
    }
}

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
