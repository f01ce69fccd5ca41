"""Writes tests/golden/training/muon.safetensors: ten steps of Muon on made-up gradients (torch 2.15, CPU).

    python tools/golden/muon.py [--out FOLDER]

The update is that of `dion.Muon` as NeMo AutoModel calls it: momentum `M <- mu M + G`, Newton-Schulz on each matrix,
decoupled weight decay, a rate that depends on the shape. It is written out here, since the package is not published.
AdamW (torch's own) takes what is no matrix. Stacked experts are one matrix each; gate and up projections, which lie one
after the other, are two. Names: `<variant>/<key>/gradient<step>`, `<variant>/<key>/initial`, `<variant>/<key>/final`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 7
STEPS = 10
LR, WEIGHT_DECAY, MU, EPSILON = 2e-2, 0.1, 0.95, 1e-8
COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
SHAPES = {
    "model.embed_tokens.weight": (12, 6),
    "lm_head.weight": (12, 6),
    "model.norm.weight": (6,),
    "model.layers.0.self_attn.o_proj.weight": (6, 10),
    "model.layers.0.self_attn.kv_b_proj.weight": (14, 5),
    "model.layers.0.mlp.gate.weight": (3, 6),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 8, 6),
    "model.layers.0.mlp.experts.down_proj": (3, 6, 4),
}
# (nesterov, adjust_lr, dtype of Newton-Schulz)
VARIANTS = {
    "spectral": (False, "spectral_norm", torch.float32),
    "nesterov_rms": (True, "rms_norm", torch.float32),
    "bf16": (False, "spectral_norm", torch.bfloat16),
}


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = matrix.to(dtype)
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + EPSILON)
    for a, b, c in COEFFICIENTS:
        squared = x @ x.mT
        x = a * x + (b * squared + c * squared @ squared) @ x
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).float()


def matrices(key: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a parameter, as views."""
    if key.endswith("gate_up_proj"):
        half = tensor.shape[1] // 2
        return [part for expert in tensor for part in (expert[:half], expert[half:])]
    return list(tensor) if tensor.ndim == 3 else [tensor]


def is_matrix(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not key.endswith(("embed_tokens.weight", "lm_head.weight", ".gate.weight"))


def run(variant: str, tensors: dict[str, torch.Tensor]) -> None:
    nesterov, adjust_lr, dtype = VARIANTS[variant]
    generator = torch.Generator().manual_seed(SEED)
    for key, shape in SHAPES.items():
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.3)
        tensors[f"{variant}/{key}/initial"] = parameter.detach().clone()
        undecayed = key.endswith(("embed_tokens.weight", "lm_head.weight"))
        lr = LR / math.sqrt(shape[-1]) if key.startswith("lm_head") else LR
        adamw = torch.optim.AdamW(
            [parameter], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0 if undecayed else WEIGHT_DECAY
        )
        momentum = torch.zeros(shape)
        for step in range(STEPS):
            gradient = torch.randn(shape, generator=generator)
            tensors[f"{variant}/{key}/gradient{step}"] = gradient
            if not is_matrix(key, shape):
                parameter.grad = gradient.clone()
                adamw.step()
                continue
            momentum = MU * momentum + gradient
            direction = MU * momentum + gradient if nesterov else momentum
            with torch.no_grad():
                for weight, update in zip(matrices(key, parameter), matrices(key, direction)):
                    rows, columns = weight.shape
                    ratio = math.sqrt(rows / columns) if adjust_lr == "spectral_norm" else 0.2 * math.sqrt(max(rows, columns))
                    weight.mul_(1 - LR * WEIGHT_DECAY).sub_(LR * ratio * orthogonalize(update, dtype))
        tensors[f"{variant}/{key}/final"] = parameter.detach().clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[2] / "tests" / "golden" / "training"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    tensors: dict[str, torch.Tensor] = {}
    for variant in VARIANTS:
        run(variant, tensors)
    metadata = {"torch": torch.__version__, "seed": str(SEED), "steps": str(STEPS)}
    save_file(tensors, out / "muon.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
