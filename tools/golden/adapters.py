"""Writes the golden fixtures of adapters: LoRA and DoRA made by the `peft` library over transformers' model.

    python adapters.py [NAME ...]

`tests/golden/adapter/<case>/`: a checkpoint, an adapter as peft saves it, inputs, and what transformers with peft
computes: logits, loss, and the gradient of every adapter tensor under its key in the adapter's file.
`tests/golden/training/<case>/`: 50 steps of torch's AdamW on batches in `steps.safetensors` (`<step>.input_ids`, ...),
of all weights (`images`) or of an adapter (`text_lora`, `images_lora`), with one loss and gradient norm a step.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import model_inputs
import model_reference as reference
from model import FORMAT_VERSION, ROUTING_MARGIN, parameter_shapes
from model_cases import Case
from model_weights import draw_all, store, stored_key, write_checkpoint

ROOT = Path(__file__).resolve().parents[2] / "tests/golden"
RANK, ALPHA = 6, 12
STEPS, LR, BETAS, EPS, MAX_NORM = 50, 3e-3, (0.9, 0.95), 1e-8, 1.0
# A run is taken when float64 stays this close to it at every step, a tenth of what is asked of ours.
LARGEST_DEVIATION = 1e-4
TRIES = 200

TEXT = Case("text", text={"first_k_dense_replace": 1, "attention_bias": True})
IMAGES = Case("multimodal", wrapper={}, prompt="images_across_rows")
IMAGES_PLAIN_QUERY = Case("dora", wrapper={}, text={"q_lora_rank": None}, prompt="images_across_rows")


def lora_config(model, dora: bool = False) -> LoraConfig:
    """An adapter on every linear map, and, without DoRA, on every stack of experts at half the rank and its own scale."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    stacks = [name for name, _ in model.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    if dora:
        return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linear, use_dora=True)
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=linear,
        target_parameters=stacks,
        rank_pattern={name: RANK // 2 for name in stacks},
        alpha_pattern={name: ALPHA + 3 for name in stacks},
    )


def adapted(model, seed: int, dora: bool = False, trained: bool = False):
    """The model with a new adapter, or with one that looks as if it had been trained."""
    torch.manual_seed(seed)
    model = get_peft_model(model, lora_config(model, dora))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            if "magnitude" in name:
                with torch.no_grad():
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return model


def checkpoint(folder: Path, case: Case, seed: int) -> None:
    """Writes the checkpoint of a case."""
    config = case.config()
    key_style = case.keys if case.multimodal else "text"
    write_checkpoint(folder, config, {}, shards=1)
    tensors, _ = store(draw_all(parameter_shapes(folder), seed), "bf16")
    tensors = {stored_key(name, key_style): tensor for name, tensor in tensors.items()}
    write_checkpoint(folder, config, tensors, shards=1)


def described(folder: Path, case: Case, seed: int, more: dict) -> None:
    description = {
        "format_version": FORMAT_VERSION,
        "case": folder.name,
        "policy": case.policy,
        "seed": seed,
        **more,
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    (folder / "case.json").write_text(json.dumps(description, indent=2) + "\n")
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 2_000_000, sizes
    print(f"{folder.name}: seed {seed}, {more}, {sum(sizes.values()) / 1e3:.0f} kB", flush=True)


def save_adapter(model, folder: Path) -> None:
    """The adapter as peft saves it, without its card, its settings in one order."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings |= {"base_model_name_or_path": "model", "target_modules": sorted(settings["target_modules"])}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def gradients_by_key(model) -> dict[str, torch.Tensor]:
    """The gradient of every adapter tensor, under the key that peft saves it with."""
    values = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    gradients = {key: value.clone() for key, value in get_peft_model_state_dict(model).items() if "lora_" in key}
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name]
    return gradients


def one_pass(case: Case, dora: bool) -> None:
    """A fixture of one forward and backward pass."""
    folder = ROOT / "adapter" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(TRIES):
        checkpoint(folder / "model", case, seed)
        inputs = model_inputs.make_inputs(case.prompt, case.config(), seed)
        model = adapted(reference.load(folder / "model", case.policy, case.reference), seed, dora, trained=True).eval()
        margin = reference.routing_margin(model, inputs)
        if margin >= ROUTING_MARGIN["f32"]:
            break
    else:
        raise RuntimeError(f"{case.name}: no seed below {TRIES} is robust")
    base, _ = reference.forward(reference.load(folder / "model", case.policy, case.reference), inputs)
    logits, _ = reference.forward(model, inputs)
    loss = reference.token_mean_loss(logits, inputs)
    loss.backward()
    expected = {"logits": logits, "loss": loss}
    expected |= {f"grad.{key}": gradient for key, gradient in gradients_by_key(model).items()}
    expected = {key: value.detach().float().contiguous() for key, value in expected.items()}
    if "attention_mask" in inputs:
        expected["compare_mask"] = inputs["attention_mask"].clone()
    save_adapter(model, folder / "adapter")
    save_file(inputs, folder / "inputs.safetensors")
    save_file(expected, folder / "expected.safetensors")
    change = float((logits - base).norm() / base.norm())
    flags = ["--dtype", "f32", "--softmax-scale", case.policy, "--grads"]
    more = {"flags": flags, "dtype": "f32", "deviation_from_f32": {}, "routing_margin": margin}
    described(folder, case, seed, more | {"relative_change_of_logits": change})


def text_batch(generator: torch.Generator, config: dict) -> dict[str, torch.Tensor]:
    """Rows after a learnable rule, padded on the right, with a prompt that has no labels."""
    vocab = config["vocab_size"] - model_inputs.FIRST_WORD
    rows = []
    for _ in range(4):
        length, prompt = (int(torch.randint(*bounds, (), generator=generator)) for bounds in ((6, 25), (1, 5)))
        word, row = int(torch.randint(vocab, (), generator=generator)), [1]
        for _ in range(length - 1):
            row.append(model_inputs.FIRST_WORD + word)
            word = (3 * word + 7) % vocab
        rows.append((row, [-100] * prompt + row[prompt:]))
    longest = max(len(row) for row, _ in rows)
    pad = lambda row, value: row + [value] * (longest - len(row))
    return {
        "input_ids": torch.tensor([pad(row, model_inputs.PAD) for row, _ in rows]),
        "labels": torch.tensor([pad(labels, -100) for _, labels in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row, _ in rows]),
    }


def image_batch(generator: torch.Generator, config: dict) -> dict[str, torch.Tensor]:
    """Two rows, one with two images, whose words tell how bright the first image of the row is."""
    inputs = model_inputs.with_images(generator, config, [[2, (8, 16), 6], [(16, 8), 3, (8, 8), 5]])
    ids = inputs["input_ids"]
    brightness = torch.randint(4, (3,), generator=generator)
    for image in range(3):
        inputs["pixel_values"][image] *= 0.3
        inputs["pixel_values"][image] += brightness[image] - 1.5
    for image, (height, width) in enumerate(inputs["image_sizes"].tolist()):
        inputs["pixel_values"][image, :, height:] = 0
        inputs["pixel_values"][image, :, :, width:] = 0
    for row, image in ((0, 0), (1, 1)):
        words = (ids[row] >= model_inputs.FIRST_WORD).nonzero().flatten()[-5:]
        ids[row, words] = model_inputs.FIRST_WORD + 5 * brightness[image] + torch.arange(5)
    control = (ids >= model_inputs.IMG) & (ids <= model_inputs.IMG_END)
    inputs["labels"] = torch.where(control, -100, ids)
    return inputs


def train(model, batches) -> list[dict[str, float]]:
    """One line a step: token mean of the loss, and the gradient norm before clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.01)
    dtype = parameters[0].dtype
    lines = []
    for step, batch in enumerate(batches):
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"step": step, "loss": float(loss.detach()), "grad_norm": float(norm)})
    return lines


def many_steps(name: str, case: Case, make_batch, lora: bool) -> None:
    """A fixture of a training run, with the first seed whose run does not depend on rounding."""
    folder = ROOT / "training" / name
    shutil.rmtree(folder, ignore_errors=True)
    flat = case.config()
    flat = flat.get("text_config", flat) | {
        "spatial_merge_size": flat.get("spatial_merge_size"),
        "patch_size": flat.get("vision_config", {}).get("patch_size"),
    }
    for seed in range(TRIES):
        checkpoint(folder / "model", case, seed)
        generator = torch.Generator().manual_seed(seed)
        batches = [make_batch(generator, flat) for _ in range(STEPS)]
        model = reference.load(folder / "model", case.policy, case.reference)
        if lora:
            model = adapted(model, seed)
            save_adapter(model, folder / "adapter")
        model.train()
        exact = copy.deepcopy(model).double()
        lines = train(model, batches)
        deviation = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(lines, train(exact, batches)))
        print(name, seed, f"float64 {deviation:.1e}, loss {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f}", flush=True)
        if deviation < LARGEST_DEVIATION:
            break
    else:
        raise RuntimeError(f"{name}: no seed below {TRIES} is robust")
    tensors = {f"{step}.{key}": value for step, batch in enumerate(batches) for key, value in batch.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "steps.safetensors")
    (folder / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    optimizer = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.01, "max_norm": MAX_NORM}
    described(folder, case, seed, {"float64_deviation": deviation, "optimizer": optimizer})


FIXTURES = {
    "text": lambda: one_pass(TEXT, dora=False),
    "multimodal": lambda: one_pass(IMAGES, dora=False),
    "dora": lambda: one_pass(IMAGES_PLAIN_QUERY, dora=True),
    "images": lambda: many_steps("images", IMAGES, image_batch, lora=False),
    "text_lora": lambda: many_steps("text_lora", TEXT, text_batch, lora=True),
    "images_lora": lambda: many_steps("images_lora", IMAGES, image_batch, lora=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*FIXTURES, []])
    names = parser.parse_args().names or FIXTURES
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names:
        FIXTURES[name]()


if __name__ == "__main__":
    main()
