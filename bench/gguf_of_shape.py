"""Writes a GGUF file with random weights in the shape of a Mistral 4 configuration, for llama.cpp to be measured with.

    python gguf_of_shape.py configs/small.json small-q4_0.gguf --type q4_0 [--head-type q8_0]

Architecture `mistral4`, tensors and keys as llama.cpp's own conversion writes them: experts' gates and ups fused,
`kv_b_proj` cut into its two halves for attention on latents. Norms and routers stay f32. There is no tokenizer:
llama.cpp then counts dummy tokens, and takes ids.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import gguf
import numpy as np

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
# Prime, so that no two experts get the same piece of the pool.
POOL_BLOCKS = 131_071
WEIGHT_SCALE = 0.02


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, outermost axis first."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, q_rank, kv_rank = config["v_head_dim"], config["q_lora_rank"], config["kv_lora_rank"]
    experts, expert = config["n_routed_experts"], config["moe_intermediate_size"]
    shared = expert * config["n_shared_experts"]
    if config["first_k_dense_replace"]:
        raise ValueError("first_k_dense_replace: leading dense layers are not written")
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "attn_norm": (hidden,),
            "attn_q_a": (q_rank, hidden),
            "attn_q_a_norm": (q_rank,),
            "attn_q_b": (heads * (nope + rope), q_rank),
            "attn_kv_a_mqa": (kv_rank + rope, hidden),
            "attn_kv_a_norm": (kv_rank,),
            "attn_k_b": (heads, kv_rank, nope),
            "attn_v_b": (heads, value, kv_rank),
            "attn_output": (hidden, heads * value),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_up_exps": (experts, 2 * expert, hidden),
            "ffn_down_exps": (experts, hidden, expert),
            "ffn_gate_shexp": (shared, hidden),
            "ffn_up_shexp": (shared, hidden),
            "ffn_down_shexp": (hidden, shared),
        }
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return tensors | {"output_norm.weight": (hidden,), "output.weight": (vocabulary, hidden)}


def parameters(config: dict) -> int:
    """Values of all tensors."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def add_keys(writer: gguf.GGUFWriter, config: dict) -> None:
    """The hyperparameters."""
    rope = config["rope_parameters"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(0)
    writer.add_head_count(config["num_attention_heads"])
    # Attention on latents has one key head, as wide as a latent and its rotary part.
    writer.add_head_count_kv(1)
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    # llama.cpp divides by 0.1 again.
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    writer.add_attn_temperature_length(rope["original_max_position_embeddings"])
    writer.add_tokenizer_model("none")


def write(config: dict, path: Path, type_name: str, head_type: str | None = None, seed: int = 0) -> None:
    """Writes the file; matrices repeat one pool of random values, which is quantised once a type."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(POOL_BLOCKS * 32, dtype=np.float32) * WEIGHT_SCALE
    pools: dict[str, np.ndarray] = {}

    def type_of(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return "f32"
        return (head_type or type_name) if name == "output.weight" else type_name

    def content(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        kind = type_of(name, shape)
        if kind == "f32":
            return random.standard_normal(shape, dtype=np.float32) * WEIGHT_SCALE
        if kind not in pools:
            pools[kind] = gguf.quants.quantize(values.reshape(POOL_BLOCKS, 32), TYPES[kind]).view(np.uint8)
        row_blocks = math.prod(shape) // 32
        start = random.integers(POOL_BLOCKS)
        return np.take(pools[kind], np.arange(start, start + row_blocks), axis=0, mode="wrap")

    tensors = shapes(config)
    writer = gguf.GGUFWriter(path, "mistral4")
    add_keys(writer, config)
    for name, shape in tensors.items():
        kind = TYPES[type_of(name, shape)]
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * bytes_of_block
        if kind == TYPES["f32"]:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        else:
            bytes_shape = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors.items():
        writer.write_tensor_data(content(name, shape))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=["bf16", "q8_0", "q4_0"], default="bf16")
    parser.add_argument("--head-type", choices=["bf16", "q8_0", "q4_0"], help="of the output projection")
    options = parser.parse_args()
    write(json.loads(options.config.read_text()), options.out, options.type, options.head_type)


if __name__ == "__main__":
    main()
