//! The fused operations on Burn's CPU backend: slices in, kernel, slices out.

mod backward;

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Element as BurnElement, Shape, TensorData};
use half::bf16;
use mistral4_checkpoint::config::Activation;
use mistral4_kernels as kernels;

use super::activation::kernel_activation;
use super::autodiff::BackwardKernels;
use super::extension::FusedOps;
use super::packed::PackedWeight;
use super::saved::MoeInputs;
use super::{AttentionSpec, Deferral, MlaSpec, RopeSpec, TokenLossScale};

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

    fn moe_experts(
        x: F,
        indices: I,
        weights: F,
        gate_up: F,
        down: F,
        activation: Activation,
        deferral: Deferral,
    ) -> F {
        let inputs = MoeInputs { x, indices, weights, gate_up, down, activation, deferral }.contiguous();
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
