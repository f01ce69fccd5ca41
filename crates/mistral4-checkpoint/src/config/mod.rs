//! Model configuration, validated once, so that the model holds no `Option` it has to unwrap.
//!
//! Field names are the keys of Hugging Face's `config.json`.

mod fields;
mod file;
mod hf;
mod native;
mod preset;
mod quantization;
mod rope;
mod softmax_scale;
mod vision;
mod write;
mod write_native;

pub use file::{ConfigFile, ConfigForm};
pub use hf::supports_config;
pub use preset::preset_names;
pub(crate) use quantization::packed_json;
pub use quantization::{ActivationScheme, Fp8Quantization, PackedGroup, Quantization};
pub use softmax_scale::{ConfigOptions, yarn_get_mscale};

/// What a checkpoint is: a text model, or a text model behind a vision tower and a projector.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The decoder.
    pub text: TextConfig,
    /// The Pixtral tower and projector of a `mistral3` wrapper; `None` for a text-only model.
    pub vision: Option<MultimodalConfig>,
    /// Softmax scale with the policy that chose it.
    pub softmax_scale: SoftmaxScale,
}

impl Config {
    /// The decoder alone.
    pub fn text_only(&self) -> Config {
        Config { vision: None, ..self.clone() }
    }
}

/// The `mistral4` decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Entries of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Width of the dense feed-forward of the first `first_k_dense_replace` layers.
    pub intermediate_size: usize,
    /// Width of one expert, F.
    pub moe_intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Attention heads, N.
    pub num_attention_heads: usize,
    /// Shared experts; they form one feed-forward of `moe_intermediate_size * n_shared_experts`.
    pub n_shared_experts: usize,
    /// Routed experts, E.
    pub n_routed_experts: usize,
    /// Experts a token is sent to, K.
    pub num_experts_per_tok: usize,
    /// Factor on the routing weights.
    pub routed_scaling_factor: f64,
    /// Rank of the key and value latent, R.
    pub kv_lora_rank: usize,
    /// Rank of the query latent; `None`: one full `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Rotated part of a query or key head.
    pub qk_rope_head_dim: usize,
    /// Unrotated part of a query or key head.
    pub qk_nope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Expert groups.
    pub n_group: usize,
    /// Groups a token may choose from.
    pub topk_group: usize,
    /// Leading layers with a dense feed-forward.
    pub first_k_dense_replace: usize,
    /// Whether the K routing weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// Activation of every feed-forward.
    pub hidden_act: Activation,
    /// Longest position the model is meant for.
    pub max_position_embeddings: usize,
    /// Standard deviation of freshly drawn linear weights.
    pub initializer_range: f64,
    /// Epsilon of the layer norms (the latent norms always use 1e-6).
    pub rms_norm_eps: f64,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_id: Vec<u32>,
    /// Rotary embedding.
    pub rope: RopeParameters,
    /// Whether rotary pairs are interleaved `(x0, x1), (x2, x3)` or split in halves.
    pub rope_interleave: bool,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` carry a bias.
    pub attention_bias: bool,
}

impl TextConfig {
    /// Width of a query or key head.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Whether a layer has experts, or the dense feed-forward of the first layers.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace
    }
}

/// `rope_parameters`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// YaRN extension; `None` for `rope_type: default`.
    pub yarn: Option<YarnParameters>,
    /// Llama-4 query scaling `(beta, original_max_position_embeddings)`; `None`: no scaling.
    pub llama_4_scaling: Option<(f64, usize)>,
}

/// YaRN, with every default resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct YarnParameters {
    /// Context extension factor.
    pub factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
    /// Rotations above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is interpolated.
    pub beta_slow: f64,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub truncate: bool,
    /// `mscale`, if given.
    pub mscale: Option<f64>,
    /// `mscale_all_dim`, if given.
    pub mscale_all_dim: Option<f64>,
    /// Factor on cos and sin, resolved (semantics: explicit, else the mscale ratio, else 0.1 ln(factor) + 1).
    pub attention_factor: f64,
}

/// The scale of attention scores, with the policy that chose it.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxScale {
    /// Factor on `q . k`.
    pub value: f64,
    /// Which of the two published answers it is.
    pub policy: SoftmaxScalePolicy,
    /// Why that one, in one sentence.
    pub reason: String,
}

/// The two published answers for the softmax scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftmaxScalePolicy {
    /// `qk_head_dim ^ -0.5`.
    Standard,
    /// `qk_head_dim ^ -0.5 * mscale(factor, mscale_all_dim) ^ 2`.
    YarnMscale,
}

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// Exact GELU.
    Gelu,
    /// GELU by the tanh formula (`gelu_pytorch_tanh`, `gelu_new`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The activation of a name in transformers.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu" | "gelu_python" => Some(Activation::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_python_tanh" => Some(Activation::GeluTanh),
            "relu" => Some(Activation::Relu),
            _ => None,
        }
    }

    /// The name in transformers.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
            Activation::Relu => "relu",
        }
    }
}

/// What a `mistral3` wrapper adds to the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct MultimodalConfig {
    /// The Pixtral tower.
    pub vision_config: VisionConfig,
    /// Token that stands for one merged patch.
    pub image_token_index: u32,
    /// Activation of the projector.
    pub projector_hidden_act: Activation,
    /// Which hidden state of the tower feeds the projector: an index into `0..=num_hidden_layers`, resolved.
    pub vision_feature_layer: usize,
    /// Whether `linear_1` and `linear_2` carry a bias.
    pub multimodal_projector_bias: bool,
    /// Patches merged along each side.
    pub spatial_merge_size: usize,
}

/// The Pixtral vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Width of the tower.
    pub hidden_size: usize,
    /// Width of its feed-forward.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Image channels.
    pub num_channels: usize,
    /// Longest image side, in pixels.
    pub image_size: usize,
    /// Side of one patch, in pixels.
    pub patch_size: usize,
    /// Activation of the feed-forward.
    pub hidden_act: Activation,
    /// Base of the two-dimensional rotary frequencies.
    pub rope_theta: f64,
    /// Standard deviation of freshly drawn weights.
    pub initializer_range: f64,
}
