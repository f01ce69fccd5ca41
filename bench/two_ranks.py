"""What a training step on two ranks costs against one rank with one thread, in turns.

    python bench/two_ranks.py path/to/mistral4 [--rounds 3]         # from the repository's root; built with --features mpi

Prints for each layout the median over steps after the second of tokens a second, against twice those of one thread, and of
the processor time of all ranks, against that of one. The latter counts neither what other programs take nor the idle waits of
a rank for the other. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).with_name("configs") / "two_ranks.yaml"
ONE = ["--threads", "1"]
LAYOUTS = {
    "ddp": ["--nproc", "2", "--distributed.strategy", "ddp"],
    "fsdp2, weights stay": ["--nproc", "2", "--distributed.reshard_after_forward", "false"],
    "fsdp2": ["--nproc", "2"],
}
SKIPPED = 2


def ranks(mark: str) -> list[Path]:
    """The processes that compute for a run, which are those whose arguments hold `mark` but for their launchers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        is_launcher = "mpirun" in arguments[0] or "--nproc" in arguments
        if mark in arguments and not is_launcher and arguments[0] != "":
            found.append(process)
    return found


def processor_seconds(processes: list[Path]) -> float:
    fields = [(process / "stat").read_text().rsplit(")", 1)[1].split() for process in processes]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def run(binary: str, more: list[str]) -> tuple[list[float], list[float]]:
    """Tokens a second and processor seconds of each step after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "train", str(RECIPE), "--checkpoint.checkpoint_dir", folder, *more]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics, marks = Path(folder) / "training.jsonl", []
        computing: list[Path] = []
        while process.poll() is None:
            time.sleep(0.01)
            steps = metrics.read_text().count("\n") if metrics.exists() else 0
            if steps > len(marks):
                computing = computing or ranks(folder)
                try:
                    marks.append(processor_seconds(computing))
                except OSError:
                    break
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} failed")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [after - before for before, after in zip(marks, marks[1:])]
    return [line["tps"] for line in lines[SKIPPED:]], seconds[SKIPPED - 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    measured: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(arguments.rounds):
        for name, more in {"one thread": ONE, **LAYOUTS}.items():
            rates, seconds = measured.setdefault(name, ([], []))
            more_rates, more_seconds = run(arguments.binary, more)
            rates.extend(more_rates)
            seconds.extend(more_seconds)
    rate, cost = (statistics.median(values) for values in measured["one thread"])
    print(f"{'one thread':20s} {rate:6.0f} tokens/s {'':6s} {cost:6.2f} s of processor time a step")
    for name in LAYOUTS:
        rates, seconds = map(statistics.median, measured[name])
        print(f"{name:20s} {rates:6.0f} tokens/s {rates / rate / 2:6.0%} {seconds:6.2f} s of processor time a step {cost / seconds:6.0%}")


if __name__ == "__main__":
    main()
