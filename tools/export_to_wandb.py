"""Writes a run's metrics as an offline run of Weights & Biases.

    python export_to_wandb.py RUN_DIR [--out DIR] [--project NAME] [--name NAME]
    wandb sync DIR/wandb/offline-run-*          # later, from a machine that may

RUN_DIR holds `training.jsonl`, and `validation.jsonl` or `validation_NAME.jsonl`, whose values become `val/...` or
`val/NAME/...`. Nothing is sent. Needs `pip install wandb`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"

import wandb


def lines(path: Path) -> Iterator[dict]:
    with path.open() as file:
        yield from map(json.loads, file)


def numbers(record: dict, prefix: str) -> dict[str, float]:
    """What can be drawn; a loss that was no number is null in the file."""
    left_out = {"step", "timestamp"}
    return {
        prefix + key: value
        for key, value in record.items()
        if isinstance(value, int | float) and key not in left_out
    }


def by_step(run: Path) -> dict[int, dict[str, float]]:
    """All values of each step. W&B takes the values of a step together and only once."""
    steps: dict[int, dict[str, float]] = {}

    def add(record: dict, prefix: str) -> None:
        values = steps.setdefault(record["step"], {})
        values.update(numbers(record, prefix))
        if "timestamp" in record:
            values["_timestamp"] = datetime.fromisoformat(record["timestamp"]).timestamp()

    for record in lines(run / "training.jsonl"):
        add(record, "")
    for path in sorted(run.glob("validation*.jsonl")):
        name = path.stem.removeprefix("validation").removeprefix("_")
        for record in lines(path):
            add(record, f"val/{name}/" if name else "val/")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--project", default="mistral4")
    parser.add_argument("--name")
    args = parser.parse_args()
    steps = by_step(args.run)
    args.out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=args.project, name=args.name or args.run.resolve().name, dir=args.out)
    for step, values in sorted(steps.items()):
        run.log(values, step=step)
    run.finish()
    print(f"{len(steps)} steps in {Path(run.dir).parent}")


if __name__ == "__main__":
    main()
