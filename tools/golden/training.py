"""Writes the golden fixtures of the trainer: a short fine-tuning run with transformers and torch.

    python training.py [--out FOLDER]

Each fixture is a checkpoint, rows `unshifted.jsonl`, and the `training.jsonl` that the recipe
`recipe.yaml` beside the fixtures must give. The schedule is that of NeMo AutoModel's
`OptimizerParamScheduler`: step s is taken with the rate after s increments, linear from `init_lr`
to `max_lr` over `lr_warmup_steps`. NeMo logs `lr` after the increment, that is the rate of the next
step; the fixture has it as `lr`, and the one that was applied as `lr_applied`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import safetensors
import torch
import transformers
import yaml

import model_reference as reference
from model import FORMAT_VERSION, parameter_shapes
from model_cases import Case
from model_inputs import FIRST_WORD, PAD
from model_weights import draw_all, store, stored_key, write_checkpoint

ROWS = 200
CASES = [
    Case("text"),
    Case("multimodal", wrapper={}, text={"first_k_dense_replace": 1, "attention_bias": True}),
]
# Rounding grows along a run; a seed is taken when another precision stays this close.
LARGEST_DEVIATION = 2e-5
TRIES = 50


def make_rows(seed: int, vocab: int) -> list[dict[str, list[int]]]:
    """Rows of 6 to 24 tokens after a learnable rule, with a prompt that has no labels."""
    generator = torch.Generator().manual_seed(seed)
    words = vocab - FIRST_WORD
    rows = []
    for _ in range(ROWS):
        length, prompt = (int(torch.randint(*bounds, (), generator=generator)) for bounds in ((6, 25), (1, 5)))
        word = int(torch.randint(words, (), generator=generator))
        ids = [1]
        for _ in range(length - 1):
            ids.append(FIRST_WORD + word)
            surprise = torch.rand((), generator=generator) < 0.1
            word = int(torch.randint(words, (), generator=generator)) if surprise else (3 * word + 7) % words
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the longest."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(key, value):
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", PAD), "labels": padded("labels", -100), "attention_mask": mask}


def learning_rate(schedule: dict, increments: int) -> float:
    """The rate after `increments` of the scheduler, for `lr_decay_style: constant`."""
    assert schedule["lr_decay_style"] == "constant"
    if increments > schedule["lr_warmup_steps"]:
        return schedule["max_lr"]
    progress = increments / schedule["lr_warmup_steps"]
    return schedule["init_lr"] + (schedule["max_lr"] - schedule["init_lr"]) * progress


def train(model, rows, recipe: dict, local_batch_size: int) -> list[dict[str, float]]:
    """One line a step: the exact token mean over the global batch, and the gradient norm before clipping."""
    settings = recipe["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    scheduler, schedule = recipe["step_scheduler"], recipe["lr_scheduler"]
    global_batch_size = scheduler["global_batch_size"]
    lines = []
    for step in range(scheduler["max_steps"]):
        batch = rows[step * global_batch_size : (step + 1) * global_batch_size]
        micro_batches = [
            collate(batch[start : start + local_batch_size]) for start in range(0, len(batch), local_batch_size)
        ]
        label_tokens = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micro_batches)
        loss = 0.0
        for micro in micro_batches:
            inputs = {key: micro[key] for key in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            share = (
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum"
                )
                / label_tokens
            )
            share.backward()
            loss += float(share.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad_norm"]["max_norm"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        optimizer.step()
        optimizer.zero_grad()
        lines.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": float(norm),
                "lr": learning_rate(schedule, step + 1),
                "lr_applied": learning_rate(schedule, step),
                "num_label_tokens": label_tokens,
            }
        )
    return lines


def deviation(lines, others) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(lines, others) for key in ("loss", "grad_norm"))


def write_case(case: Case, recipe: dict, root: Path) -> None:
    """Writes one fixture, with the first seed whose run does not depend on rounding."""
    config = case.config()
    key_style = case.keys if case.multimodal else "text"
    policy = recipe["model"]["softmax_scale"]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_checkpoint(scratch, config, {}, shards=1)
        shapes = parameter_shapes(scratch)
        for seed in range(TRIES):
            tensors, _ = store(draw_all(shapes, seed), "bf16")
            tensors = {stored_key(name, key_style): tensor for name, tensor in tensors.items()}
            write_checkpoint(scratch, config, tensors, shards=1)
            rows = make_rows(seed, config.get("text_config", config)["vocab_size"])
            model = reference.load(scratch, policy, case.reference).train()
            exact = copy.deepcopy(model).double()
            accumulated = copy.deepcopy(model)
            lines = train(model, rows, recipe, recipe["step_scheduler"]["local_batch_size"])
            lines_accumulated = train(accumulated, rows, recipe, 2)
            deviations = {
                "local_batch_size 2": deviation(lines, lines_accumulated),
                "float64": deviation(lines, train(exact, rows, recipe, 4)),
            }
            print(case.name, seed, deviations, flush=True)
            if max(deviations.values()) < LARGEST_DEVIATION:
                break
        else:
            raise RuntimeError(f"{case.name}: no seed below {TRIES} is robust")
    folder = root / case.name
    write_checkpoint(folder / "model", config, tensors, shards=1)
    for name, content in (
        ("unshifted", rows),
        ("training", lines),
        ("training_local_batch_size_2", lines_accumulated),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    description = {
        "format_version": FORMAT_VERSION,
        "case": case.name,
        "policy": policy,
        "seed": seed,
        "deviations": deviations,
        "attn_implementation": reference.ATTENTION,
        "experts_implementation": reference.EXPERTS,
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    (folder / "case.json").write_text(json.dumps(description, indent=2) + "\n")
    print(f"{case.name}: loss {lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests/golden/training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    recipe = yaml.safe_load((arguments.out / "recipe.yaml").read_text())
    for case in CASES:
        write_case(case, recipe, arguments.out)


if __name__ == "__main__":
    main()
