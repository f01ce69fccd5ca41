"""Shows that llama.cpp computes from a file of `gguf_of_shape.py` what transformers does with the same weights.

    python check_gguf.py

Prints the largest difference of logits on a tiny shape in f32, and fails where it exceeds what llama.cpp's f16 cache of
latents explains. Packages: requirements.txt.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import gguf
import gguf_of_shape
import llama_cpp
import numpy as np
import torch
import transformers
from contenders.llama_cpp import Runner

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "intermediate_size": 64, "kv_lora_rank": 64, "q_lora_rank": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Logits spread by about 1.6.
TOLERANCE = 0.03


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an f32 file, outermost axis first."""
    found = gguf.GGUFReader(path).tensors
    return {each.name: torch.tensor(np.array(each.data)).reshape(*reversed(each.shape.tolist())) for each in found}


def find(name: str, file: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that transformers knows by `name`."""
    name = name.removesuffix(".weight")
    if name in OUTER:
        return file[f"{OUTER[name]}.weight"]
    _, _, layer, inner = name.split(".", 3)
    if inner != "self_attn.kv_b_proj":
        return file[f"blk.{layer}.{NAMES[inner]}.weight"]
    keys, values = file[f"blk.{layer}.attn_k_b.weight"], file[f"blk.{layer}.attn_v_b.weight"]
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


def main() -> None:
    settings = json.loads((Path(__file__).resolve().parent / "configs/small.json").read_text()) | SIZES
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tiny.json"
        config.write_text(json.dumps(settings))
        spec = {
            "config": str(config), "cache": folder, "format": "f32", "head_format": "f32",
            "tokens": 40, "new_tokens": 1, "threads": 1,
        }  # fmt: skip
        # Weights as small as usual would leave experts and attention without influence on the logits.
        gguf_of_shape.WEIGHT_SCALE = 0.2
        for flash in ["on", "off"]:
            runner = Runner(spec | {"flash": flash})
            runner.run("decode", "")
            logits = llama_cpp.llama_get_logits_ith(runner.context, -1)
            got = torch.tensor(np.ctypeslib.as_array(logits, (settings["vocab_size"],)).copy())
            file = tensors(next(Path(folder).glob("*.gguf")))
            model = transformers.Mistral4ForCausalLM(transformers.Mistral4Config.from_json_file(config)).eval()
            model.load_state_dict({name: find(name, file) for name in model.state_dict()})
            with torch.inference_mode():
                want = model(torch.tensor([runner.ids])).logits[0, -1]
            difference = (got - want).abs().max().item()
            print(f"flash attention {flash}: largest difference {difference:.4f}, logits spread by {want.std():.2f}")
            if not difference < TOLERANCE:
                raise SystemExit("llama.cpp computes something else than transformers")


if __name__ == "__main__":
    main()
