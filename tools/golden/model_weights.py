"""Random weights with a healthy scale, and the forms in which a checkpoint stores them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

FP8_LARGEST = 448.0
BLOCK = 128


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """One weight: norms in [0.5, 1.5], routers that choose clearly, everything else by its fan-in."""
    noise = torch.randn(shape, generator=generator)
    if re.search(r"norm\.weight$|layernorm\.weight$|ln_pre\.weight$", name):
        return torch.rand(shape, generator=generator) + 0.5
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name:
        return noise
    fan_in = math.prod(shape[1:]) if "patch_conv" in name else shape[-1]
    gain = 2.0 if re.search(r"lm_head|mlp\.gate\.|q_b_proj|q_proj|kv_a_proj", name) else 1.0
    return gain * noise / math.sqrt(fan_in)


def draw_all(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Every weight of a model, rounded to bfloat16 so that every way to store it is exact."""
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, shapes[name], generator).bfloat16().float() for name in sorted(shapes)}


def stored_key(name: str, style: str) -> str:
    """The key in a checkpoint for a parameter that transformers calls `name`.

    Only the published multimodal form (`style` "hf") differs from transformers' own names.
    """
    if style != "hf":
        return name
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    return re.sub(r"^language_model\.", "language_model.model.", name)


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint quantizes this weight: the linears of the text layers, but no router."""
    if "vision_tower" in name or "multi_modal_projector" in name or ".layers." not in name:
        return False
    return bool(re.search(r"_proj(_with_mqa)?(\.weight)?$", name))


def quantize(weight: torch.Tensor, block_wise: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, their scales, and the float32 values they stand for.

    A matrix has one 0-d scale, or one a block of 128 x 128; fused experts have one an expert.
    """
    amax = weight.abs()
    if weight.dim() == 3:
        scale = amax.amax((1, 2), keepdim=True)
    elif block_wise:
        rows, columns = (math.ceil(side / BLOCK) for side in weight.shape)
        blocks = torch.nn.functional.pad(
            amax, (0, columns * BLOCK - weight.shape[1], 0, rows * BLOCK - weight.shape[0])
        )
        scale = blocks.view(rows, BLOCK, columns, BLOCK).amax((1, 3))
    else:
        scale = amax.amax()
    scale = (scale / FP8_LARGEST).bfloat16().float()
    full = scale
    if block_wise and weight.dim() == 2:
        full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        full = full[: weight.shape[0], : weight.shape[1]]
    values = (weight / full).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    return values, scale, values.float() * full


def store(weights: dict[str, torch.Tensor], storage: str) -> tuple[dict, dict]:
    """The tensors of a checkpoint, and the float32 weights that a reader must get from them."""
    if storage == "f32":
        return dict(weights), dict(weights)
    tensors, values = {}, {}
    for name, weight in weights.items():
        if not (storage.startswith("fp8") and is_quantized(name)):
            tensors[name], values[name] = weight.bfloat16(), weight
            continue
        tensors[name], scale, values[name] = quantize(weight, storage == "fp8-block")
        tensors[f"{name}_scale_inv"] = scale
        if storage == "fp8-tensor":
            activation = f"{name}_activation_scale" if weight.dim() == 3 else name.replace(".weight", ".activation_scale")
            # Read past by every loader; a wild value shows a loader that does not.
            tensors[activation] = torch.full(weight.shape[:1] if weight.dim() == 3 else (), 1e6)
    return tensors, values


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Writes `config.json` and the weights, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {key: value.contiguous() for key, value in sorted(tensors.items())}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {}
    for position, key in enumerate(tensors):
        files.setdefault(f"model-{position * shards // len(tensors) + 1:05}-of-{shards:05}.safetensors", []).append(key)
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {key: file for file, keys in files.items() for key in keys},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
