//! `model`, `freeze_config`, `distributed`.

use super::reader::Section;
use super::report::Effect;
use crate::error::Result;

/// Where the weights come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A checkpoint: a folder or a hub id.
    Pretrained(String),
    /// Fresh weights for a configuration: a file, a folder, a hub id or a preset.
    FromConfig(String),
}

/// Storage type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TorchDtype {
    /// What the checkpoint's configuration says.
    Auto,
    /// 32-bit floats.
    Float32,
    /// Brain floats.
    Bfloat16,
}

/// An override of the softmax scale's policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftmaxScaleOverride {
    /// `qk_head_dim ^ -0.5`.
    Standard,
    /// The same times YaRN's `mscale ^ 2`.
    YarnMscale,
}

/// `model`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Checkpoint or configuration.
    pub source: ModelSource,
    /// Whether the multimodal model is asked for (vision tower and projector).
    pub multimodal: bool,
    /// Storage type of the weights.
    pub torch_dtype: TorchDtype,
    /// Override of the softmax scale's policy.
    pub softmax_scale: Option<SoftmaxScaleOverride>,
    /// Step of the gate-bias update: 0 when fine-tuning a checkpoint or adapters, 1e-3 from scratch, unless set.
    pub gate_bias_update_factor: f64,
    /// Weight of the auxiliary load-balance loss.
    pub aux_loss_coeff: f64,
    /// Weight of the mean squared log-sum-exp of the routers' logits.
    pub router_z_loss_coeff: f64,
    /// Whether routing is replaced by a balanced one, for benchmarks.
    pub fake_balanced_gate: bool,
}

impl ModelConfig {
    /// Reads the section; without a `_target_`, `multimodal` says which model is meant.
    pub(crate) fn read(root: &mut Section<'_>, multimodal: bool) -> Result<Self> {
        // (from a configuration, multimodal)
        const NAMES: [(&str, (bool, bool)); 8] = [
            ("nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained", (false, false)),
            ("nemo_automodel.NeMoAutoModelForCausalLM.from_config", (true, false)),
            ("nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained", (false, true)),
            ("nemo_automodel.NeMoAutoModelForImageTextToText.from_config", (true, true)),
            ("NeMoAutoModelForCausalLM.from_pretrained", (false, false)),
            ("NeMoAutoModelForCausalLM.from_config", (true, false)),
            ("NeMoAutoModelForImageTextToText.from_pretrained", (false, true)),
            ("NeMoAutoModelForImageTextToText.from_config", (true, true)),
        ];
        const DTYPES: [(&str, TorchDtype); 9] = [
            ("auto", TorchDtype::Auto),
            ("float32", TorchDtype::Float32),
            ("torch.float32", TorchDtype::Float32),
            ("fp32", TorchDtype::Float32),
            ("f32", TorchDtype::Float32),
            ("bfloat16", TorchDtype::Bfloat16),
            ("torch.bfloat16", TorchDtype::Bfloat16),
            ("bf16", TorchDtype::Bfloat16),
            ("BF16", TorchDtype::Bfloat16),
        ];
        const SCALES: [(&str, SoftmaxScaleOverride); 3] = [
            ("standard", SoftmaxScaleOverride::Standard),
            ("yarn-mscale", SoftmaxScaleOverride::YarnMscale),
            ("yarn_mscale", SoftmaxScaleOverride::YarnMscale),
        ];
        let Some(mut s) = root.optional_section("model")? else {
            return Err(root.missing("model", "which checkpoint or configuration to train"));
        };
        let target = s.name("_target_", "the Mistral 4 model", &NAMES)?;
        let pretrained =
            s.text("pretrained_model_name_or_path", "the checkpoint to start from: a folder or a hub id")?;
        let config = read_config(&mut s)?;
        let (from_config, multimodal) = target.unwrap_or((pretrained.is_none(), multimodal));
        let source = match (from_config, pretrained, config) {
            (false, Some(path), None) => ModelSource::Pretrained(path),
            (true, None, Some(config)) => ModelSource::FromConfig(config),
            (false, None, _) => {
                let purpose = "the checkpoint to start from (`from_config` starts from fresh weights)";
                return Err(s.missing("pretrained_model_name_or_path", purpose));
            }
            (false, Some(_), Some(_)) => {
                return Err(s.refuse("config", "no `config` beside a checkpoint, which has its own"));
            }
            (true, Some(_), _) => {
                let expected = "`config` in its place: `from_config` starts from fresh weights";
                return Err(s.refuse("pretrained_model_name_or_path", expected));
            }
            (true, None, None) => {
                return Err(
                    s.missing("config", "a config.json, a folder, a hub id or a preset for fresh weights")
                );
            }
        };
        let dtype = s.name("torch_dtype", "storage type of the weights", &DTYPES)?;
        let dtype = dtype.or(s.name("dtype", "storage type of the weights", &DTYPES)?);
        let softmax_scale = s.name("softmax_scale", "policy of the softmax scale", &SCALES)?;
        let bias_factor =
            s.non_negative("gate_bias_update_factor", "step of the aux-loss-free balancing of experts")?;
        let aux_loss_coeff = s.non_negative("aux_loss_coeff", "weight of the load-balance loss")?;
        let router_z_loss_coeff = s.non_negative(
            "router_z_loss_coeff",
            "weight of the mean squared log-sum-exp of each router's logits",
        )?;
        let fake = s.bool("fake_balanced_gate", "routes tokens evenly, ignoring the router (benchmarks)")?;
        let backend_fake = read_backend(&mut s)?;
        s.none_of_effect(
            &["trust_remote_code", "force_hf", "use_liger_kernel", "use_sdpa_patching", "sdpa_method"],
            "no foreign code is run",
        );
        s.no_effect("attn_implementation", "there is one attention");
        s.unsupported("output_hidden_states", "training needs the loss only");
        s.unsupported("quantization_config", "training from quantised weights is not supported yet");
        s.unsupported("num_labels", "the model predicts tokens");
        s.unsupported("text_config", "change the checkpoint's config.json instead");
        s.finish()?;
        let scratch = matches!(source, ModelSource::FromConfig(_)) && !root.has("peft");
        Ok(Self {
            source,
            multimodal,
            torch_dtype: dtype.unwrap_or(TorchDtype::Auto),
            softmax_scale,
            gate_bias_update_factor: bias_factor.unwrap_or(if scratch { 1e-3 } else { 0.0 }),
            aux_loss_coeff: aux_loss_coeff.unwrap_or(0.0),
            router_z_loss_coeff: router_z_loss_coeff.unwrap_or(0.0),
            fake_balanced_gate: fake.or(backend_fake).unwrap_or(false),
        })
    }
}

/// `model.config`: a text, or NeMo AutoModel's `AutoConfig.from_pretrained` mapping.
fn read_config(s: &mut Section<'_>) -> Result<Option<String>> {
    const NAMES: [(&str, ()); 2] =
        [("transformers.AutoConfig.from_pretrained", ()), ("AutoConfig.from_pretrained", ())];
    if !s.is_section("config") {
        return s
            .text("config", "the configuration for fresh weights: a file, a folder, a hub id or a preset");
    }
    let mut c = s.section("config")?;
    c.name("_target_", "reads a configuration", &NAMES)?;
    let what = "the configuration for fresh weights: a file, a folder, a hub id or a preset";
    let Some(path) = c.text("pretrained_model_name_or_path", what)? else {
        return Err(c.missing("pretrained_model_name_or_path", "the configuration for fresh weights"));
    };
    c.no_effect("trust_remote_code", "no foreign code is run");
    c.finish()?;
    Ok(Some(path))
}

/// `model.backend`: only the balanced gate matters here.
fn read_backend(s: &mut Section<'_>) -> Result<Option<bool>> {
    const NAMES: [(&str, ()); 2] =
        [("nemo_automodel.components.models.common.BackendConfig", ()), ("BackendConfig", ())];
    let mut b = s.section("backend")?;
    b.name("_target_", "choices of implementation", &NAMES)?;
    b.none_of_effect(
        &["attn", "linear", "rms_norm", "rope", "rope_fusion", "experts", "compile_attn", "cuda_graph"],
        "this build has its own kernels; the result is the same",
    );
    b.none_of_effect(
        &[
            "dispatcher",
            "dispatcher_num_sms",
            "dispatcher_share_token_dispatcher",
            "dispatcher_async_dispatch",
            "mok",
            "enable_deepep",
        ],
        "rows travel to experts by one exchange; the result is the same",
    );
    b.no_effect("enable_hf_state_dict_adapter", "the checkpoint's names are the model's names");
    b.no_effect("enable_fsdp_optimizations", "one implementation of sharding");
    let fake = b.bool("fake_balanced_gate", "routes tokens evenly, ignoring the router (benchmarks)")?;
    b.unsupported("fake_gate_noise", "the balanced gate has no noise");
    b.unsupported("te_fp8", "FP8 compute is not supported");
    b.unsupported_unless("gate_precision", "the router is always computed in float32", |node| {
        ["float32", "torch.float32", "fp32"].contains(&node.to_string().as_str())
    });
    b.finish()?;
    Ok(fake)
}

/// `freeze_config`: which parts keep their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FreezeConfig {
    /// The embedding table.
    pub freeze_embeddings: bool,
    /// The vision tower.
    pub freeze_vision_tower: bool,
    /// The decoder, its head and its embedding table.
    pub freeze_language_model: bool,
    /// The projector between them.
    pub freeze_multi_modal_projector: bool,
}

impl FreezeConfig {
    /// Reads the section. Without one, nothing is frozen; with one, the tower is frozen unless it says otherwise.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        let Some(mut s) = root.optional_section("freeze_config")? else { return Ok(Self::default()) };
        let kept = "whether this part keeps its weights";
        let config = Self {
            freeze_embeddings: s.bool("freeze_embeddings", kept)?.unwrap_or(false),
            freeze_vision_tower: s.bool("freeze_vision_tower", kept)?.unwrap_or(true),
            freeze_language_model: s.bool("freeze_language_model", kept)?.unwrap_or(false),
            freeze_multi_modal_projector: s.bool("freeze_multi_modal_projector", kept)?.unwrap_or(false),
        };
        s.none_of_effect(&["freeze_audio_tower", "freeze_video_embedder"], "the model has no such part");
        s.finish()?;
        Ok(config)
    }
}

/// How parameters are kept on the data-parallel ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// Each rank of a replica keeps its part of every parameter, gradient and optimizer state.
    #[default]
    FullyShard,
    /// Every rank keeps everything.
    Replicate,
}

/// `distributed.pipeline`: how micro-batches flow through the stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PipelineConfig {
    /// Whether each rank has several runs of layers, so that less time is idle.
    pub interleaved: bool,
    /// Layers of a run, when interleaved; `None`: two runs a rank.
    pub layers_per_stage: Option<usize>,
}

impl PipelineConfig {
    /// Runs of layers a rank.
    pub fn chunks(self, layers: usize, ranks: usize) -> usize {
        match self.layers_per_stage {
            _ if !self.interleaved || ranks == 1 => 1,
            // NeMo AutoModel's `round_virtual_stages_to_pp_multiple: down`.
            Some(each) => (layers.div_ceil(each) / ranks).max(1),
            None => 2,
        }
    }
}

/// `distributed`: how ranks share the work, and activation checkpointing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DistributedConfig {
    /// How parameters are kept on the data-parallel ranks.
    pub strategy: Strategy,
    /// Data-parallel ranks; `None`: those that the other sizes leave.
    pub dp_size: Option<usize>,
    /// Groups of data-parallel ranks that each hold the whole model.
    pub dp_replicate_size: usize,
    /// Ranks that share each linear.
    pub tp_size: usize,
    /// Ranks that share a sequence.
    pub cp_size: usize,
    /// Pipeline stages.
    pub pp_size: usize,
    /// Ranks over which experts are spread.
    pub ep_size: usize,
    /// How micro-batches flow through pipeline stages.
    pub pipeline: PipelineConfig,
    /// Whether shards are summed over ranks only after the last micro-batch of a step.
    pub defer_fsdp_grad_sync: bool,
    /// Whether a sharded layer's parameters are freed after its forward pass, and not only at the end of the step.
    pub reshard_after_forward: bool,
    /// Whether each layer's activations are recomputed in the backward pass.
    pub activation_checkpointing: bool,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self {
            strategy: Strategy::default(),
            dp_size: None,
            dp_replicate_size: 1,
            tp_size: 1,
            cp_size: 1,
            pp_size: 1,
            ep_size: 1,
            pipeline: PipelineConfig::default(),
            defer_fsdp_grad_sync: true,
            reshard_after_forward: true,
            activation_checkpointing: false,
        }
    }
}

impl DistributedConfig {
    /// Whether activations are recomputed, of a model that is sharded or is not. The graph of a layer holds its parameters,
    /// so where these are freed after the forward pass, the layer is run again.
    pub fn recomputes(&self, is_sharded: bool) -> bool {
        self.activation_checkpointing || is_sharded && self.reshard_after_forward
    }

    /// Reads the section.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Self> {
        use Strategy::{FullyShard, Replicate};
        const STRATEGIES: [(&str, Strategy); 4] =
            [("fsdp2", FullyShard), ("megatron_fsdp", FullyShard), ("ddp", Replicate), ("none", Replicate)];
        let mut s = root.section("distributed")?;
        let strategy = s.name("strategy", "what each data-parallel rank keeps", &STRATEGIES)?;
        s.no_effect("_target_", "distributed.strategy says what each rank keeps");
        let dp_size = s.count("dp_size", "data-parallel ranks")?;
        let mut size = |key, what| s.count(key, what).map(|size| size.unwrap_or(1));
        let mut config = Self {
            strategy: strategy.unwrap_or_default(),
            dp_size,
            dp_replicate_size: size("dp_replicate_size", "groups of ranks that hold the whole model")?,
            tp_size: size("tp_size", "ranks that share each linear")?,
            cp_size: size("cp_size", "ranks that share a sequence")?,
            pp_size: size("pp_size", "pipeline stages")?,
            ep_size: size("ep_size", "ranks over which experts are spread")?,
            ..Self::default()
        };
        if config.cp_size > 1 {
            s.mark("cp_size", Effect::Unsupported("context parallelism is not supported".to_owned()));
        }
        config.defer_fsdp_grad_sync = s
            .bool("defer_fsdp_grad_sync", "gradients are summed over ranks after the last micro-batch only")?
            .unwrap_or(true);
        config.reshard_after_forward = s
            .bool(
                "reshard_after_forward",
                "a layer's parameters are freed after its forward pass, and its activations recomputed",
            )?
            .unwrap_or(true);
        config.activation_checkpointing = s
            .bool("activation_checkpointing", "each layer's activations are recomputed in the backward pass")?
            .unwrap_or(false);
        s.no_effect("sequence_parallel", "hidden states between layers are whole on every rank of tp_size");
        s.none_of_effect(&["tp_plan", "use_hf_tp_plan"], "heads and inner widths are divided over tp_size");
        s.none_of_effect(
            &["activation_checkpointing_scope", "offload_policy", "cpu_offload"],
            "changes where memory is spent, not the result",
        );
        s.no_effect("enable_fsdp2_prefetch", "a layer's parameters are always gathered ahead");
        s.no_effect("enable_async_tensor_parallel", "sums over tp_size are not overlapped");
        s.none_of_effect(&["patch_is_packed_sequence", "enable_compile", "multimodal"], "one implementation");
        s.unsupported("mp_policy", "set model.torch_dtype instead");
        s.unsupported("autocast_dtype", "set model.torch_dtype instead");
        let mut pipeline = s.section("pipeline")?;
        const SCHEDULES: [(&str, bool); 4] =
            [("1f1b", false), ("1F1B", false), ("interleaved1f1b", true), ("Interleaved1F1B", true)];
        let schedule = pipeline.name("pp_schedule", "order of the micro-batches' passes", &SCHEDULES)?;
        config.pipeline = PipelineConfig {
            interleaved: schedule.unwrap_or(false),
            layers_per_stage: pipeline.count("layers_per_stage", "layers of a run, when interleaved")?,
        };
        pipeline.none_of_effect(
            &["pp_microbatch_size", "pp_batch_size"],
            "micro-batches are those of step_scheduler.local_batch_size",
        );
        pipeline.none_of_effect(
            &["round_virtual_stages_to_pp_multiple"],
            "layers_per_stage is rounded up, to a whole number of runs a rank",
        );
        pipeline.unsupported("pp_schedule_csv", "choose pp_schedule");
        pipeline.unsupported("module_fqns_per_model_part", "layers are divided evenly");
        pipeline.none_of_effect(
            &[
                "patch_inner_model",
                "patch_causal_lm_model",
                "patch_stage_backward_maybe_with_nosync",
                "dtype",
                "scale_grads_in_schedule",
                "loss_fn",
                "pp_seq_len",
            ],
            "one implementation",
        );
        pipeline.finish()?;
        let mut moe = s.section("moe")?;
        moe.none_of_effect(
            &["ignore_router_for_ac", "reshard_after_forward", "wrap_outer_model", "_target_"],
            "experts are kept as the layer they belong to",
        );
        moe.unsupported("lm_head_precision", "set model.torch_dtype instead");
        moe.unsupported("mp_policy", "set model.torch_dtype instead");
        moe.finish()?;
        s.finish()?;
        Ok(config)
    }
}
