//! Multi-head latent attention.
//!
//! Keys and values are expanded from one latent of R values a token (`kv_b_proj`), beside one rotated key part that
//! all heads share. The cache holds latents only. A pass that begins a cache, has none, or continues one with many
//! tokens expands keys and values; one with few tokens moves `kv_b_proj` to the query and output side instead (the
//! absorbed form), and attends over the latents themselves.
//!
//! Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1; `Mistral4Attention` in transformers.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Tensor};
use mistral4_checkpoint::config::Config;
use mistral4_kernels::DecodeAttentionDims;

use crate::error::Result;
use crate::model::cache::{CachedMask, LayerCache};
use crate::model::linear::Linear;
use crate::model::norm::{LATENT_NORM_EPS, RmsNorm};
use crate::model::rope::RotaryTables;
use crate::ops::collective::copy_to_group;
use crate::ops::{self, AttentionSpec, Group, MlaSpec, RopeSpec, Segment};
use crate::weights::Parameters;

/// Who sees whom in one forward pass.
#[derive(Debug, Clone)]
pub enum AttentionMask {
    /// Among the tokens of this pass.
    Segments(Arc<[Segment]>),
    /// Over cached and new tokens.
    Cached(CachedMask),
    /// Added to the scores, `[B, 1 or N, S, S]`.
    Explicit(Box<Tensor<4>>),
}

/// Multi-head latent attention.
#[derive(Module, Debug)]
pub struct Mla {
    /// `[N * (nope + rope), D]`, in models without a query latent.
    pub q_proj: Option<Linear>,
    /// `[Rq, D]`
    pub q_a_proj: Option<Linear>,
    /// `[Rq]`
    pub q_a_layernorm: Option<RmsNorm>,
    /// `[N * (nope + rope), Rq]`
    pub q_b_proj: Option<Linear>,
    /// `[R + rope, D]`
    pub kv_a_proj_with_mqa: Linear,
    /// `[R]`
    pub kv_a_layernorm: RmsNorm,
    /// `[N * (nope + v), R]`
    pub kv_b_proj: Linear,
    /// `[D, N * v]`
    pub o_proj: Linear,
    #[module(skip)]
    shape: MlaShape,
    /// Ranks that hold some of the heads each.
    #[module(skip)]
    pub(super) tensor_group: Option<Arc<dyn Group>>,
}

/// Sizes and scale of the attention.
#[derive(Debug, Clone)]
struct MlaShape {
    heads: usize,
    nope: usize,
    rope: usize,
    v: usize,
    rank: usize,
    softmax_scale: f64,
    interleaved: bool,
}

impl MlaShape {
    /// Tokens of a row up to which the absorbed form takes fewer operations. A query meets a slot in `2 R + rope`
    /// products there and in `nope + rope + v` in the expanded form, which first spends `R (nope + v)` on each slot.
    fn most_absorbed(&self) -> usize {
        let more = (2 * self.rank).saturating_sub(self.nope + self.v);
        (self.rank * (self.nope + self.v)).checked_div(more).unwrap_or(usize::MAX)
    }
}

impl Mla {
    /// Takes the projections and norms from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor.
    pub fn new(config: &Config, parameters: &Parameters) -> Result<Self> {
        let c = &config.text;
        let (heads, hidden) = (c.num_attention_heads, c.hidden_size);
        let q_width = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
        let linear = |name, input, output, bias| Linear::new(input, output, bias, &parameters.pp(name));
        let q_norm = |rank| RmsNorm::new(rank, LATENT_NORM_EPS, &parameters.pp("q_a_layernorm"));
        let rank = c.q_lora_rank;
        Ok(Self {
            q_proj: rank.is_none().then(|| linear("q_proj", hidden, q_width, false)).transpose()?,
            q_a_proj: rank.map(|rank| linear("q_a_proj", hidden, rank, c.attention_bias)).transpose()?,
            q_a_layernorm: rank.map(q_norm).transpose()?,
            q_b_proj: rank.map(|rank| linear("q_b_proj", rank, q_width, false)).transpose()?,
            kv_a_proj_with_mqa: linear(
                "kv_a_proj_with_mqa",
                hidden,
                c.kv_lora_rank + c.qk_rope_head_dim,
                c.attention_bias,
            )?,
            kv_a_layernorm: RmsNorm::new(c.kv_lora_rank, LATENT_NORM_EPS, &parameters.pp("kv_a_layernorm"))?,
            kv_b_proj: linear(
                "kv_b_proj",
                c.kv_lora_rank,
                heads * (c.qk_nope_head_dim + c.v_head_dim),
                false,
            )?,
            o_proj: linear("o_proj", heads * c.v_head_dim, hidden, c.attention_bias)?,
            shape: MlaShape {
                heads,
                nope: c.qk_nope_head_dim,
                rope: c.qk_rope_head_dim,
                v: c.v_head_dim,
                rank: c.kv_lora_rank,
                softmax_scale: config.softmax_scale.value,
                interleaved: c.rope_interleave,
            },
            tensor_group: None,
        })
    }

    /// Packs dense weights for inference, except `kv_b_proj`, which decoding multiplies with from both sides.
    pub(crate) fn pack(&mut self) {
        let projections = [&mut self.q_proj, &mut self.q_a_proj, &mut self.q_b_proj];
        let always = [&mut self.kv_a_proj_with_mqa, &mut self.o_proj];
        projections.into_iter().flatten().chain(always).for_each(|linear| linear.weight.pack());
    }

    pub(super) fn decode_dims(&self) -> DecodeAttentionDims {
        let MlaShape { heads, nope, rope, v: value_dim, rank, softmax_scale, interleaved } = self.shape;
        DecodeAttentionDims { heads, nope, rope, rank, value_dim, interleaved, scale: softmax_scale as f32 }
    }

    /// Leaves each rank of `group` its part of the heads.
    pub(crate) fn set_tensor_group(&mut self, group: Arc<dyn Group>) {
        self.shape.heads /= group.size();
        self.tensor_group = Some(group);
        let by_head = [self.q_proj.as_mut(), self.q_b_proj.as_mut(), Some(&mut self.kv_b_proj)];
        by_head.into_iter().flatten().for_each(|linear| linear.divide_outputs(&self.tensor_group));
        self.o_proj.divide_inputs(&self.tensor_group);
    }

    /// # Shapes
    /// - `x`: `[T, D]`, output: `[T, D]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        rotary: &RotaryTables,
        mask: &AttentionMask,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let tokens = x.dims()[0];
        let s = &self.shape;
        let q = self.query(x.clone(), rotary);
        let (latent, k_pe) = self.latent(x, rotary);

        let out = match (mask, cache) {
            (AttentionMask::Cached(cached), Some(cache)) => {
                let sequence = tokens / cached.batch;
                let new = Tensor::cat(vec![latent.clone(), k_pe.clone()], 1);
                cache.append(new.reshape([cached.batch, sequence, s.rank + s.rope]));
                if cache.len() == sequence {
                    self.attend_expanded(q, latent, k_pe, mask)
                } else if sequence > s.most_absorbed() {
                    let all = cache.dense();
                    let latent = all.clone().slice_dim(1, 0..s.rank);
                    self.attend_expanded(q, latent, all.slice_dim(1, s.rank..s.rank + s.rope), mask)
                } else {
                    self.attend_absorbed(q, cache.in_place(), &cached.in_place)
                }
            }
            _ => self.attend_expanded(q, latent, k_pe, mask),
        };
        self.o_proj.forward_row_parallel(out.reshape([tokens, s.heads * s.v]), &self.tensor_group)
    }

    /// Rotated and scaled query, `[T, N, nope + rope]`.
    fn query(&self, x: Tensor<2>, rotary: &RotaryTables) -> Tensor<3> {
        let s = &self.shape;
        let tokens = x.dims()[0];
        let q = match (&self.q_proj, &self.q_a_proj, &self.q_a_layernorm, &self.q_b_proj) {
            (Some(q_proj), ..) => q_proj.forward(copy_to_group(x, &self.tensor_group)),
            (None, Some(a), Some(norm), Some(b)) => {
                b.forward(copy_to_group(norm.forward(a.forward(x)), &self.tensor_group))
            }
            _ => unreachable!("new() builds either q_proj or the low-rank pair"),
        };
        let q = q.reshape([tokens, s.heads, s.nope + s.rope]);
        let spec = RopeSpec { offset: s.nope, interleaved: s.interleaved, scale: rotary.query_scale.clone() };
        ops::rope(q, rotary.cos.clone(), rotary.sin.clone(), spec)
    }

    /// Normed latent `[T, R]` and rotated key part `[T, rope]`.
    fn latent(&self, x: Tensor<2>, rotary: &RotaryTables) -> (Tensor<2>, Tensor<2>) {
        let s = &self.shape;
        let both = self.kv_a_proj_with_mqa.forward(x);
        let tokens = both.dims()[0];
        let latent = self.kv_a_layernorm.forward(both.clone().slice_dim(1, 0..s.rank));
        let k_pe = both.slice_dim(1, s.rank..s.rank + s.rope).reshape([tokens, 1, s.rope]);
        let spec = RopeSpec { offset: 0, interleaved: s.interleaved, scale: None };
        let k_pe = ops::rope(k_pe, rotary.cos.clone(), rotary.sin.clone(), spec);
        // Every rank's heads use all of both.
        let k_pe = k_pe.reshape([tokens, s.rope]);
        (copy_to_group(latent, &self.tensor_group), copy_to_group(k_pe, &self.tensor_group))
    }

    /// Attention with keys and values expanded from latents: those of this pass, or all that are cached.
    fn attend_expanded(
        &self,
        q: Tensor<3>,
        latent: Tensor<2>,
        k_pe: Tensor<2>,
        mask: &AttentionMask,
    ) -> Tensor<3> {
        let s = &self.shape;
        let slots = latent.dims()[0];
        let kv = self.kv_b_proj.forward(latent).reshape([slots, s.heads, s.nope + s.v]);
        match mask {
            AttentionMask::Segments(segments) | AttentionMask::Cached(CachedMask { dense: segments, .. }) => {
                ops::mla_attention(q, kv, k_pe, self.spec(segments))
            }
            AttentionMask::Explicit(mask) => {
                let (k, v) = ops::composite::expand(kv, k_pe, s.nope);
                ops::composite::attention_with_mask(q, k, v, mask.as_ref().clone(), s.softmax_scale)
            }
        }
    }

    /// Attention over cached latents, `[B * capacity, R + rope]`.
    fn attend_absorbed(&self, q: Tensor<3>, all: Tensor<2>, segments: &Arc<[Segment]>) -> Tensor<3> {
        ops::latent_attention(q, all, self.kv_b_proj.merged_weight(), self.spec(segments))
    }

    fn spec(&self, segments: &Arc<[Segment]>) -> MlaSpec {
        let s = &self.shape;
        let attention = AttentionSpec { scale: s.softmax_scale, segments: segments.clone() };
        MlaSpec { attention, nope: s.nope, value_dim: s.v }
    }
}

/// A mask in which padding has holes, as one that is added to the scores: causal, padding unseen.
///
/// # Shapes
/// - `attention_mask`: `[B * S]`, output: `[B, 1, S, S]`
pub(crate) fn dense_causal_mask(
    attention_mask: &[bool],
    batch: usize,
    sequence: usize,
    device: &burn::tensor::Device,
) -> Tensor<4> {
    let mut mask = vec![0.0f32; batch * sequence * sequence];
    for (index, value) in mask.iter_mut().enumerate() {
        let (row, query, key) =
            (index / (sequence * sequence), index / sequence % sequence, index % sequence);
        // A padded query that sees no token at all keeps its own key, so that its softmax stays finite.
        if key > query || (!attention_mask[row * sequence + key] && key != query) {
            *value = f32::NEG_INFINITY;
        }
        if key == query && !attention_mask[row * sequence + key] {
            let sees_token = (0..query).any(|k| attention_mask[row * sequence + k]);
            *value = if sees_token { f32::NEG_INFINITY } else { 0.0 };
        }
    }
    let data = burn::tensor::TensorData::new(mask, [batch, 1, sequence, sequence]);
    Tensor::from_data(data, (device, DType::F32))
}
