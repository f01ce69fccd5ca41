"""The table of model cases: what each fixture's checkpoint and prompt look like."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

TEXT = {
    "model_type": "mistral4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
    "first_k_dense_replace": 0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "rope_parameters": {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": 0.5,
    },
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "v_head_dim": 12,
    "vocab_size": 128,
}

VISION = {
    "model_type": "pixtral",
    "attention_dropout": 0.0,
    "head_dim": 16,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}

WRAPPER = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
    "vision_feature_layer": -1,
}

QUANTIZATION = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "weight_block_size": None,
}


@dataclass
class Case:
    """One fixture.

    `text` and `rope` change single keys of the tiny text configuration (`None` in `rope` removes
    the key), `wrapper` and `vision` those of a multimodal one, which `wrapper is not None` asks
    for. `prompt` names a function of `model_inputs.py`. `reference` holds what must differ
    in transformers so that it computes what the fixture means, see README.md.
    """

    name: str
    text: dict = field(default_factory=dict)
    rope: dict = field(default_factory=dict)
    wrapper: dict | None = None
    vision: dict = field(default_factory=dict)
    prompt: str = "two_rows"
    policy: str = "standard"
    policy_from_config: bool = False
    reference: dict = field(default_factory=dict)
    storage: str = "bf16"
    dtype: str = "f32"
    keys: str = "hf"
    shards: int = 1
    greedy: int = 0
    gradients: bool = True
    note: str = ""

    @property
    def multimodal(self) -> bool:
        return self.wrapper is not None

    def config(self) -> dict:
        """The `config.json` of the fixture."""
        text = copy.deepcopy(TEXT) | copy.deepcopy(self.text)
        rope = text["rope_parameters"]
        text["qk_head_dim"] = text["head_dim"] = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
        rope["partial_rotary_factor"] = text["qk_rope_head_dim"] / text["head_dim"]
        for key, value in self.rope.items():
            rope.pop(key, None)
            if value is not None:
                rope[key] = value
        dtype = {"dtype": {"f32": "float32"}.get(self.storage, "bfloat16")}
        if self.multimodal:
            vision = copy.deepcopy(VISION) | self.vision
            vision["head_dim"] = vision["hidden_size"] // vision["num_attention_heads"]
            config = WRAPPER | self.wrapper | dtype | {"text_config": text, "vision_config": vision}
        else:
            config = {"architectures": ["Mistral4ForCausalLM"]} | text | dtype
        if self.storage.startswith("fp8"):
            block = [128, 128] if self.storage == "fp8-block" else None
            config["quantization_config"] = QUANTIZATION | {"weight_block_size": block}
        return config


def text_cases() -> list[Case]:
    """Text-only cases, the ones that everything else builds on first."""
    yarn = "yarn-mscale"
    block = dict(hidden_size=144, n_routed_experts=4, num_hidden_layers=1, vocab_size=64)
    return [
        Case("base_text", storage="f32"),
        Case("base_text_yarn_mscale", policy=yarn),
        Case("q_lora_rank_null", text={"q_lora_rank": None}),
        Case("first_k_dense_replace_1", text={"first_k_dense_replace": 1}),
        Case("groups_4_of_2", text={"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
        Case("norm_topk_prob_false", text={"norm_topk_prob": False}),
        Case("routed_scaling_factor_2_5", text={"routed_scaling_factor": 2.5}),
        Case("attention_bias", text={"attention_bias": True}),
        Case("rope_interleave_false", text={"rope_interleave": False}),
        Case(
            "rope_type_default",
            rope=dict.fromkeys(
                ["type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "max_position_embeddings"]
            )
            | {"rope_type": "default"},
            reference={"rotate_rope_part_only": True},
            note="transformers sizes the default frequencies by the whole head; the reference uses qk_rope_head_dim",
        ),
        Case("yarn_mscale_unequal", rope={"mscale": 1.3, "mscale_all_dim": 0.7}),
        Case("yarn_mscale_unequal_yarn_mscale", rope={"mscale": 1.3, "mscale_all_dim": 0.7}, policy=yarn),
        Case("yarn_attention_factor", rope={"attention_factor": 0.8}),
        Case("yarn_no_mscale", rope={"mscale": None, "mscale_all_dim": None}),
        Case(
            "yarn_truncate_false",
            text={"qk_rope_head_dim": 16, "max_position_embeddings": 32768},
            rope={"truncate": False, "original_max_position_embeddings": 4096, "max_position_embeddings": 32768},
            prompt="spread_positions",
        ),
        Case(
            "yarn_truncate_true",
            text={"qk_rope_head_dim": 16, "max_position_embeddings": 32768},
            rope={"truncate": True, "original_max_position_embeddings": 4096, "max_position_embeddings": 32768},
            prompt="spread_positions",
        ),
        Case(
            "apply_yarn_scaling_true",
            rope={"apply_yarn_scaling": True},
            policy=yarn,
            policy_from_config=True,
            note="no --softmax-scale flag: the key in rope_parameters decides",
        ),
        Case(
            "apply_yarn_scaling_false",
            rope={"apply_yarn_scaling": False, "mscale": None, "mscale_all_dim": None},
            policy_from_config=True,
            reference={"rope_attention_scaling": 1.0},
            note="no --softmax-scale flag: the key decides, and the factor on cos and sin is 1",
        ),
        Case(
            "llama_4_scaling",
            text={"max_position_embeddings": 64},
            rope={"original_max_position_embeddings": 8, "max_position_embeddings": 64, "llama_4_scaling_beta": 0.5},
            prompt="long_row",
        ),
        Case(
            "llama_4_scaling_absent",
            text={"max_position_embeddings": 64},
            rope={"original_max_position_embeddings": 8, "max_position_embeddings": 64, "llama_4_scaling_beta": None},
            prompt="long_row",
            reference={"llama_4_scaling_beta": 0.0},
            note="transformers fails without the key; the reference sets it to 0",
        ),
        Case("rms_norm_eps_1e-2", text={"rms_norm_eps": 1e-2}),
        Case("top_k_1", text={"num_experts_per_tok": 1}),
        Case("top_k_1_norm_topk_prob_false", text={"num_experts_per_tok": 1, "norm_topk_prob": False}),
        Case("n_shared_experts_2", text={"n_shared_experts": 2}),
        Case("odd_head_dims", text={"qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 40}),
        Case("hidden_act_gelu", text={"hidden_act": "gelu"}),
        Case("left_padding", prompt="left_padding"),
        Case("right_padding", prompt="right_padding"),
        Case("position_ids", prompt="spread_positions"),
        Case("labels_ignored", prompt="labels_ignored"),
        Case("packed", prompt="packed"),
        Case(
            "greedy_text",
            text={"max_position_embeddings": 64},
            rope={"original_max_position_embeddings": 8, "max_position_embeddings": 64, "llama_4_scaling_beta": 0.5},
            prompt="one_row",
            greedy=12,
            gradients=False,
        ),
        Case("greedy_text_left_padding", prompt="left_padding", greedy=12, gradients=False),
        Case("bf16_text", prompt="short_row", dtype="bf16"),
        Case("fp8_per_tensor", storage="fp8-tensor"),
        Case("fp8_block_wise", storage="fp8-block", text=block, prompt="one_row"),
        Case("sharded", shards=3, gradients=False),
    ]


def multimodal_cases() -> list[Case]:
    """Cases with a vision tower and a projector."""
    return [
        Case("multimodal_two_images", wrapper={}, prompt="two_images"),
        Case("multimodal_two_rows", wrapper={}, prompt="images_across_rows"),
        Case("multimodal_text_only", wrapper={}, prompt="two_rows"),
        Case("vision_feature_layer_-2", wrapper={"vision_feature_layer": -2}, prompt="two_images"),
        Case("vision_feature_layer_list", wrapper={"vision_feature_layer": [-2]}, prompt="two_images", gradients=False),
        Case(
            "projector_hidden_act_gelu_pytorch_tanh",
            wrapper={"projector_hidden_act": "gelu_pytorch_tanh"},
            prompt="two_images",
            gradients=False,
        ),
        Case("multimodal_projector_bias", wrapper={"multimodal_projector_bias": True}, prompt="two_images"),
        Case("spatial_merge_size_1", wrapper={"spatial_merge_size": 1}, prompt="two_images"),
        Case("vision_hidden_act_silu", wrapper={}, vision={"hidden_act": "silu"}, prompt="two_images"),
        Case("greedy_multimodal", wrapper={}, prompt="two_images", greedy=8, gradients=False),
        Case("greedy_multimodal_left_padding", wrapper={}, prompt="images_left_padding", greedy=8, gradients=False),
        Case(
            "keys_of_transformers_5",
            wrapper={},
            keys="transformers5",
            prompt="two_images",
            note="keys and config.json as transformers 5 itself writes them",
        ),
        Case("fp8_multimodal", wrapper={}, storage="fp8-tensor", prompt="two_images"),
    ]


def all_cases() -> list[Case]:
    """Every case, in the order in which they are written."""
    return text_cases() + multimodal_cases()
