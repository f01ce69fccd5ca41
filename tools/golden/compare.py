"""Compares what `mistral4 forward` wrote with a fixture, tensor by tensor.

    python compare.py FIXTURE OUT.safetensors
    python compare.py --run MISTRAL4_BINARY [CASE ...]

The second form runs the binary over all cases (or the named ones) and prints one line a case.
Exits with 1 when a tensor is over the tolerance, missing, or of another shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).resolve().parents[2] / "tests/golden/model"
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}
# A gradient that is zero in theory (the router's with one expert a token) is rounding noise, 4e-9 in the reference;
# below this norm only its size counts.
SMALLEST_NORM = 1e-4


@dataclass
class Row:
    """The verdict on one tensor."""

    key: str
    error: float
    tolerance: float
    norm: float
    problem: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.problem) or not self.error <= self.tolerance


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """norm(ours - expected) / norm(expected), and norm(expected)."""
    norm = float(expected.double().norm())
    return float((ours.double() - expected.double()).norm()) / max(norm, SMALLEST_NORM), norm


def compare(fixture: Path, output: Path) -> list[Row]:
    """One row for every tensor that is expected or was written."""
    case = json.loads((fixture / "case.json").read_text())
    expected, ours = load_file(fixture / "expected.safetensors"), load_file(output)
    mask = expected.pop("compare_mask", None)
    rows = [Row(key, float("nan"), 0.0, 0.0, "not expected") for key in ours.keys() - expected.keys()]
    for key, reference in expected.items():
        tolerance = max(TOLERANCE[case["dtype"]], 2 * case["deviation_from_f32"].get(key, 0.0))
        if key not in ours:
            rows.append(Row(key, float("nan"), tolerance, 0.0, "missing"))
            continue
        tensor = ours[key]
        if tensor.shape != reference.shape:
            problem = f"shape {list(tensor.shape)}, expected {list(reference.shape)}"
            rows.append(Row(key, float("nan"), tolerance, 0.0, problem))
            continue
        if key == "greedy":
            rows.append(Row(key, float((tensor != reference).sum()), 0.0, 0.0))
            continue
        if mask is not None and (key == "logits" or key.startswith("hidden_states.")):
            tensor, reference = tensor[mask.bool()], reference[mask.bool()]
        error, norm = relative_error(tensor, reference)
        rows.append(Row(key, error, tolerance, norm))
    return sorted(rows, key=lambda row: (not row.failed, -row.error))


def print_table(rows: list[Row]) -> None:
    """Every tensor, the worst first."""
    for row in rows:
        verdict = "FAIL" if row.failed else "ok"
        print(f"{verdict:4} {row.error:10.2e} (at most {row.tolerance:.0e}, norm {row.norm:9.3e})  {row.key} {row.problem}")


def run_case(binary: Path, fixture: Path) -> bool:
    """Runs the binary on one fixture, and prints its worst tensor or why there is none."""
    flags = json.loads((fixture / "case.json").read_text())["flags"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.safetensors"
        command = [binary, "forward", "--model", fixture / "model", "--inputs", fixture / "inputs.safetensors"]
        run = subprocess.run([*command, "--outputs", output, *flags], capture_output=True, text=True)
        if run.returncode != 0:
            print(f"FAIL {fixture.name:34} exit {run.returncode}: {run.stderr.strip()}")
            return False
        rows = compare(fixture, output)
    failed = [row for row in rows if row.failed]
    worst = rows[0]
    print(
        f"{'FAIL' if failed else 'ok':4} {fixture.name:34} {len(rows)} tensors, {len(failed)} over; "
        f"worst {worst.error:.2e} {worst.key} {worst.problem}",
        flush=True,
    )
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="BINARY")
    parser.add_argument("arguments", nargs="*", metavar="FIXTURE OUT, or CASE")
    options = parser.parse_args()
    if options.run:
        names = options.arguments or sorted(path.parent.name for path in FIXTURES.glob("*/case.json"))
        passed = [run_case(options.run.resolve(), FIXTURES / name) for name in names]
        print(f"{sum(passed)} of {len(passed)} cases pass")
        sys.exit(not all(passed))
    if len(options.arguments) != 2:
        parser.error("give a fixture folder and the OUT file, or --run BINARY")
    rows = compare(*map(Path, options.arguments))
    print_table(rows)
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
