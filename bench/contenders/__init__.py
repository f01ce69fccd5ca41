"""Who takes part in a mode, what memory that takes, and how each is measured."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import gguf_of_shape

from .process import Missing, Worker, available_bytes, run_ours

__all__ = ["MODES", "OURS", "Contender", "Field", "Missing", "contenders"]

OURS = "mistral4"
MODES = ["prefill", "decode", "train", "train-f32"]
# `batched_mm` copies the experts of every token: 50 times slower than the others on whole prompts.
TRANSFORMERS_EXPERTS = {"decode": ["eager", "grouped_mm", "batched_mm"]}
NEMO_EXPERTS = ["torch", "torch_mm"]
# Formats of llama.cpp, and which of ours is set beside each.
LLAMA_FORMATS = {"bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}
BYTES_OF_VALUE = {"f32": 4.0, "bf16": 2.0, "int8": 1.1, "q8_0": 1.1, "int4": 0.6, "q4_0": 0.6}
# What torch and its libraries take, and what any process works in beside its weights.
TORCH_BYTES, WORK_BYTES = 0.6e9, 1.5e9


@dataclass(frozen=True)
class Contender:
    """Something to be measured in a mode."""

    family: str
    mode: str
    # Number format of weights.
    format: str
    # A way to compute that the family offers.
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(part for part in [self.family, self.format, self.variant] if part)

    @property
    def rival_format(self) -> str:
        """Our format that it is compared with."""
        return LLAMA_FORMATS.get(self.format, self.format)

    @property
    def process(self) -> tuple[str, ...]:
        """Contenders that share a process have this in common; where memory is compared, none do."""
        shared = self.family == "transformers" and not self.mode.startswith("train")
        return (self.family, self.format) if shared else (self.family, self.format, self.variant)


def contenders(mode: str, with_ours: bool) -> list[Contender]:
    """All of a mode."""
    formats = {"decode": ["bf16", "int8", "int4"], "train-f32": ["f32"]}.get(mode, ["bf16"])
    # The others' number format where they have one.
    float_format = formats[0]
    everyone = [Contender(OURS, mode, each) for each in formats] if with_ours else []
    experts = TRANSFORMERS_EXPERTS.get(mode, ["eager", "grouped_mm"])
    everyone += [Contender("transformers", mode, float_format, each) for each in experts]
    if mode != "decode":
        everyone += [Contender("NeMo AutoModel", mode, float_format, each) for each in NEMO_EXPERTS]
    llama_formats = {"prefill": ["bf16"], "decode": list(LLAMA_FORMATS)}.get(mode, [])
    return everyone + [Contender("llama.cpp", mode, each) for each in llama_formats]


@dataclass
class Field:
    """The contenders of one mode on one configuration, and their processes."""

    mode: str
    config: Path
    options: argparse.Namespace
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _workers: dict[tuple[str, ...], Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.contenders = contenders(self.mode, self.options.binary is not None)
        self.parameters = gguf_of_shape.parameters(json.loads(self.config.read_text()))
        processes = {each.process: self._bytes(each) for each in self.contenders}
        # Processes that don't fit beside each other are started anew for each round.
        self._all_fit = sum(processes.values()) + WORK_BYTES < 0.85 * available_bytes()

    def measure(self, contender: Contender, repetitions: int) -> dict:
        """The median tokens a second of some repetitions, and what else it tells.

        Raises `Missing` where it can't take part."""
        if contender.family == "llama.cpp" and self.options.batch != 1:
            raise Missing("it is measured with one row only")
        need, room = self._bytes(contender) + WORK_BYTES, available_bytes()
        if contender.process not in self._workers and need > room:
            raise Missing(f"it takes about {need / 1e9:.0f} GB, and {room / 1e9:.0f} are available")
        if contender.family == OURS:
            return run_ours(self.options.binary, self._arguments(contender, repetitions))
        worker = self._workers.get(contender.process) or self._start(contender)
        measured = worker.measure(contender.variant, repetitions)
        if not self._all_fit:
            self.close()
        return {**measured, "tokens_per_s": statistics.median(measured["tokens_per_s"])}

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _start(self, contender: Contender) -> Worker:
        options = self.options
        spec = {
            "family": contender.family,
            "mode": self.mode,
            "format": contender.format,
            "variant": contender.variant,
            "head_format": "q8_0" if contender.format == "q4_0" and options.head_bits == 8 else contender.format,
            "flash": options.flash,
            "config": str(self.config),
            "cache": str(options.cache),
            **{key: getattr(options, key) for key in ["tokens", "new_tokens", "batch", "threads"]},
        }
        worker = Worker(spec, options.nemo)
        self.versions.update(worker.versions)
        self._workers[contender.process] = worker
        return worker

    def states(self, contender: Contender) -> str:
        """What a parameter keeps beside its value, in training."""
        if contender.family != OURS:
            return f"{contender.format} moments"
        is_f32 = contender.format == "f32"
        states = ["bf16 moments" if "--state-dtype" in self._offered and not is_f32 else "f32 moments"]
        if "--no-master-weights" not in self._offered and not is_f32:
            states.append("f32 master")
        if "--optimizer-in-bwd" in self._offered:
            states.append("a layer's gradient at a time")
        return ", ".join(states)

    @cached_property
    def _offered(self) -> str:
        """What our binary, which may be an older one, says of its options."""
        return subprocess.run([self.options.binary, "bench", "--help"], check=True, capture_output=True, text=True).stdout

    def _arguments(self, contender: Contender, repetitions: int) -> list[object]:
        options = self.options
        arguments = ["--config", self.config, "--mode", self.mode.split("-")[0], "--dtype", contender.format]
        arguments += ["--tokens", options.tokens, "--batch", options.batch, "--new-tokens", options.new_tokens]
        arguments += ["--threads", options.threads, "--repetitions", repetitions]
        if contender.format == "int4":
            arguments += ["--quantize-lm-head", f"int{options.head_bits}"]
        if self.mode.startswith("train") and "--optimizer-in-bwd" in self._offered:
            arguments += ["--optimizer-in-bwd"]
        if self.mode == "train":
            # What torch's optimizer keeps of bf16 parameters: bf16 moments alone.
            for option in [["--state-dtype", "bf16"], ["--no-master-weights"]]:
                arguments += option if option[0] in self._offered else []
        return arguments

    def _bytes(self, contender: Contender) -> float:
        """Memory of weights, gradients, optimizer and libraries."""
        value = BYTES_OF_VALUE[contender.format]
        if self.mode.startswith("train"):
            # Value, gradient and two moments; ours may have a master in f32.
            value = 4 * value
            if contender.family == OURS and "master" in self.states(contender):
                value = 14 if "--state-dtype" in self._offered else 18
        libraries = TORCH_BYTES if contender.family in ("transformers", "NeMo AutoModel") else 0.0
        return self.parameters * value + libraries
