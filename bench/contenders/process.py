"""The processes of contenders, seen from the script that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


class Missing(Exception):
    """A contender that cannot take part here, with the reason."""


class Worker:
    """A running `contenders.worker`."""

    def __init__(self, spec: dict, extra_path: Path | None):
        paths = [str(path) for path in [HERE, extra_path] if path]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(spec["threads"]),
            "PYTHONPATH": os.pathsep.join(paths + [os.environ.get("PYTHONPATH", "")]),
        }
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "contenders.worker", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
        )  # fmt: skip
        try:
            first = self._answer()
        except BaseException:
            self.close()
            raise
        if "missing" in first:
            self.close()
            raise Missing(first["missing"])
        self.versions: dict[str, str] = first["versions"]

    def measure(self, variant: str, repetitions: int) -> dict:
        """Tokens a second of every repetition, and the largest memory so far."""
        print(json.dumps({"variant": variant, "repetitions": repetitions}), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends it, and gives its memory back."""
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"a contender ended with status {status}:\n{self.errors.read()[-3000:]}")


def run_ours(binary: Path, arguments: list[object]) -> dict:
    """What `mistral4 bench --json` prints."""
    command = [str(part) for part in [binary, "bench", "--json", *arguments]]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {run.returncode}:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout)


def available_bytes() -> float:
    """Memory that a new process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
