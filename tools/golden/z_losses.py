"""Writes tests/golden/training/z_losses.safetensors: gradients of the loss with both z-losses, by transformers.

    python z_losses.py [--out FOLDER]

The loss of a model fixture (tests/golden/model) is the mean over its label tokens of cross entropy plus `Z_LOSS` times the
squared log-sum-exp of the token's logits, plus, of each router, `ROUTER_Z_LOSS` times the mean over its tokens of the squared
log-sum-exp of its logits, padding left out. Names: `<case>/z_loss` and `<case>/router_z_loss`, coefficients included, and
`<case>/grad.<key>`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.models.mistral4 import modeling_mistral4 as mistral4

import model_reference as reference
from model_weights import stored_key

CASES = ["labels_ignored", "right_padding"]
Z_LOSS, ROUTER_Z_LOSS = 0.03, 0.07


def squared_log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().logsumexp(-1).square()


def losses(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cross entropy and both z-losses."""
    router_logits = []
    routers = [module for module in model.modules() if isinstance(module, mistral4.Mistral4TopkRouter)]
    handles = [router.register_forward_hook(lambda _, __, output: router_logits.append(output[0])) for router in routers]
    logits = reference.forward(model, inputs)[0]
    for handle in handles:
        handle.remove()
    is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten().bool()
    is_label = inputs["labels"][:, 1:].flatten() != -100
    return {
        "cross_entropy": reference.token_mean_loss(logits, inputs),
        "z_loss": Z_LOSS * squared_log_sum_exp(logits[:, :-1].flatten(0, 1)[is_label]).mean(),
        "router_z_loss": ROUTER_Z_LOSS * sum(squared_log_sum_exp(each)[is_token].mean() for each in router_logits),
    }


def main() -> None:
    golden = Path(__file__).resolve().parents[2] / "tests" / "golden"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=golden / "training")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    for case in CASES:
        folder = golden / "model" / case
        model = reference.load(folder / "model", "standard", {})
        parts = losses(model, load_file(folder / "inputs.safetensors"))
        sum(parts.values()).backward()
        tensors |= {f"{case}/{name}": part.detach() for name, part in parts.items() if name != "cross_entropy"}
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            tensors[f"{case}/grad.{stored_key(name, 'text')}"] = gradient.contiguous()
    metadata = {"torch": torch.__version__, "z_loss": str(Z_LOSS), "router_z_loss": str(ROUTER_Z_LOSS)}
    save_file(tensors, out / "z_losses.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
