"""Writes tests/golden/checkpoint: how transformers resolves configurations, and how PyTorch rounds FP8.

Versions: see requirements.txt. Deterministic; `python tools/golden/checkpoint.py` writes the same bytes each time.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import Mistral3Config, Mistral4Config
from transformers.models.mistral4.modeling_mistral4 import Mistral4RotaryEmbedding, yarn_apply_mscale

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "checkpoint"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 24}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 16.0, "original_max_position_embeddings": 512, "llama_4_scaling_beta": 0.2}

TEXT = [
    {},
    {"num_key_value_heads": None, "num_attention_heads": 8},
    {"n_routed_experts": 16, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    {"num_local_experts": 24},
    {"q_lora_rank": None, "norm_topk_prob": None, "rope_interleave": None},
    {"eos_token_id": [2, 4], "pad_token_id": None},
    SIZES,
    SIZES | {"max_position_embeddings": 4096},
    SIZES | {"rope_parameters": YARN},
    SIZES | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    SIZES | {"rope_parameters": YARN | {"mscale": 0.7}},
    SIZES | {"rope_parameters": YARN | {"mscale": 0.0, "mscale_all_dim": 2.0}},
    SIZES | {"rope_parameters": YARN | {"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.5}},
    SIZES | {"rope_parameters": YARN | {"beta_fast": None, "beta_slow": 0, "truncate": False}},
    SIZES | {"rope_parameters": YARN | {"factor": None}, "max_position_embeddings": 2048},
    SIZES | {"rope_parameters": {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}, "max_position_embeddings": 8192},
    SIZES | {"rope_parameters": YARN | {"factor": 0.5, "mscale_all_dim": 1.0}},
    # Older forms.
    SIZES | {"rope_parameters": {k: v for k, v in YARN.items() if k != "rope_theta"}, "rope_theta": 777.0},
    SIZES | {"rope_scaling": YARN | {"partial_rotary_factor": 0.75}, "rope_theta": 777.0},
    SIZES | {"rope_scaling": {"type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.75}, "rope_theta": 777.0},
    SIZES | {"rope_parameters": YARN, "original_max_position_embeddings": 1024},
]

TEXT_OF_WRAPPER = {"model_type": "mistral4"} | SIZES
WRAPPERS = [
    {"text_config": TEXT_OF_WRAPPER, "tie_word_embeddings": False},
    {"text_config": TEXT_OF_WRAPPER, "tie_word_embeddings": False, "vision_config": {"model_type": "pixtral"}},
    {
        "text_config": TEXT_OF_WRAPPER,
        "tie_word_embeddings": False,
        "image_token_id": 12,
        "projector_hidden_act": "relu",
        "multimodal_projector_bias": True,
        "spatial_merge_size": 1,
        "vision_config": {"model_type": "pixtral", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 99.0},
    },
    {
        "text_config": TEXT_OF_WRAPPER,
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "pixtral", "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    },
]


def text_case(raw):
    config = Mistral4Config(**json.loads(json.dumps(raw)))
    # Building the embedding moves keys of older forms into rope_parameters, where the model then reads them.
    attention_factor = float(Mistral4RotaryEmbedding(config).attention_scaling)
    plain = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    resolved = json.loads(config.to_json_string(use_diff=False))
    return {
        "raw": {"model_type": "mistral4"} | raw,
        "attention_factor": attention_factor,
        "softmax_scale_yarn_mscale": float(yarn_apply_mscale(config.rope_parameters, plain)),
        "resolved": resolved,
    }


def configurations():
    wrappers = []
    for raw in WRAPPERS:
        config = Mistral3Config(**json.loads(json.dumps(raw)))
        resolved = json.loads(config.to_json_string(use_diff=False))
        wrappers.append({"raw": {"model_type": "mistral3"} | raw, "resolved": resolved})
    facts = {
        "format_version": 1,
        "versions": {"transformers": transformers.__version__},
        "text": [text_case(raw) for raw in TEXT],
        "wrappers": wrappers,
    }
    (OUT / "configurations.json").write_text(json.dumps(facts, indent=1) + "\n")


def fp8():
    generator = torch.Generator().manual_seed(8)
    codes = torch.arange(256, dtype=torch.uint8)
    # All magnitudes up to the largest finite value, subnormal numbers and ties among them.
    exponents = torch.rand(4096, generator=generator) * 22 - 14
    signs = torch.where(torch.rand(4096, generator=generator) < 0.5, -1.0, 1.0)
    finite = codes.view(torch.float8_e4m3fn).float()[:127]
    values = torch.cat([(signs * 2.0**exponents).clamp(-448, 448), finite, (finite[1:] + finite[:-1]) / 2])
    # Sizes that the block does not divide.
    weight = torch.randn(2, 130, 300, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 3, generator=generator) + 0.01
    spread = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :130, :300]
    dequantised = weight.float() * spread
    save_file(
        {
            "codes.decoded": codes.view(torch.float8_e4m3fn).float(),
            "values": values,
            "values.encoded": values.to(torch.float8_e4m3fn).view(torch.uint8),
            "weight": weight,
            "weight_scale_inv": scale,
            "weight.f32": dequantised,
            "weight.bf16": dequantised.to(torch.bfloat16),
            "weight.f16": dequantised.to(torch.float16),
        },
        OUT / "fp8.safetensors",
        metadata={"format": "pt", "format_version": "1", "torch": torch.__version__},
    )


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    configurations()
    fp8()
