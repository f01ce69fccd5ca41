"""Writes the golden fixtures of the model with transformers; see README.md.

    python model.py [--out FOLDER] [CASE ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file

import model_reference as reference
from model_cases import Case, all_cases
from model_inputs import make_inputs
from model_weights import draw_all, store, stored_key, write_checkpoint

FORMAT_VERSION = 1
LARGEST_FILE = 2_000_000
ROUTING_MARGIN = {"f32": 1e-3, "bf16": 2e-2}
GREEDY_LEAD = 1e-2
TRIES = 2000


def parameter_shapes(folder: Path) -> dict[str, torch.Size]:
    """Every parameter of the model that `config.json` describes, under transformers' names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = reference.family_of(config)._from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def flags(case: Case) -> list[str]:
    """What to add to `mistral4 forward --model M --inputs I --outputs O`."""
    result = ["--dtype", case.dtype, "--hidden-states"]
    if not case.policy_from_config:
        result += ["--softmax-scale", case.policy]
    if case.gradients:
        result.append("--grads")
    if case.greedy:
        result += ["--greedy", str(case.greedy)]
    return result


def deviation_from_f32(folder: Path, case: Case, inputs, key_of, expected) -> dict[str, float]:
    """How far bfloat16 itself takes transformers from its float32 result, a relative error a tensor."""
    model = reference.load(folder, case.policy, case.reference)
    exact, _ = reference.outputs(model, inputs, key_of, case.gradients, 0)
    return {
        key: round(float((expected[key] - value).norm() / value.norm().clamp(min=1e-9)), 5)
        for key, value in exact.items()
        if key != "compare_mask"
    }


@dataclass
class Fixture:
    """What is written of one case."""

    config: dict
    stored: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    seed: int
    routing_margin: float
    greedy_lead: float
    deviation_from_f32: dict[str, float]


def make_fixture(case: Case, scratch: Path) -> Fixture:
    """The fixture of the first seed that leaves no choice of experts or tokens open."""
    config = case.config()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    write_checkpoint(scratch, plain, {}, shards=1)
    shapes = parameter_shapes(scratch)
    if case.keys == "transformers5":
        config = plain = json.loads(transformers.AutoConfig.from_pretrained(scratch).to_json_string())

    def key_of(name):
        return stored_key(name, case.keys if case.multimodal else "text")

    for seed in range(TRIES):
        tensors, values = store(draw_all(shapes, seed), case.storage)
        write_checkpoint(scratch, plain, {key_of(name): value for name, value in values.items()}, shards=1)
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
        model = reference.load(scratch, case.policy, case.reference, dtype)
        inputs = make_inputs(case.prompt, config, seed)
        margin = reference.routing_margin(model, inputs)
        if margin < ROUTING_MARGIN[case.dtype]:
            continue
        reference.expectations_hold(model, inputs)
        expected, lead = reference.outputs(model, inputs, key_of, case.gradients, case.greedy)
        if lead < GREEDY_LEAD:
            continue
        deviation = deviation_from_f32(scratch, case, inputs, key_of, expected) if case.dtype == "bf16" else {}
        stored = {key_of(name): tensor for name, tensor in tensors.items()}
        return Fixture(config, stored, inputs, expected, seed, margin, lead, deviation)
    raise RuntimeError(f"{case.name}: no seed below {TRIES} is robust")


def write_case(case: Case, root: Path) -> None:
    """Writes one fixture folder."""
    with tempfile.TemporaryDirectory() as scratch:
        fixture = make_fixture(case, Path(scratch))
    folder = root / case.name
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder / "model", fixture.config, fixture.stored, case.shards)
    save_file(fixture.inputs, folder / "inputs.safetensors")
    save_file(fixture.expected, folder / "expected.safetensors")
    description = {
        "format_version": FORMAT_VERSION,
        "case": case.name,
        "note": case.note,
        "policy": case.policy,
        "flags": flags(case),
        "dtype": case.dtype,
        "storage": case.storage,
        "seed": fixture.seed,
        "routing_margin": fixture.routing_margin,
        "greedy_lead": fixture.greedy_lead if case.greedy else None,
        "reference": case.reference,
        "deviation_from_f32": fixture.deviation_from_f32,
        "attn_implementation": reference.ATTENTION,
        "experts_implementation": reference.EXPERTS,
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    (folder / "case.json").write_text(json.dumps(description, indent=2) + "\n")
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert max(sizes.values()) < LARGEST_FILE, sizes
    print(f"{case.name}: seed {fixture.seed}, margin {fixture.routing_margin:.1e}, {sum(sizes.values()) / 1e3:.0f} kB", flush=True)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=here.parents[1] / "tests/golden/model")
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = {case.name: case for case in all_cases()}
    unknown = set(arguments.cases) - set(known)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known are {list(known)}")
    for name in arguments.cases or known:
        write_case(known[name], arguments.out)


if __name__ == "__main__":
    main()
