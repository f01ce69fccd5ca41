"""Measures transformers and `mistral4 bench` in turns, on one machine, and prints medians and ratios.

    python side_by_side.py [--binary path/to/mistral4] [--config configs/small.json] [--out RESULT.json]

Modes, each in bfloat16 with random weights:

- prefill: one forward of a prompt with a cache, logits of the last position only;
- decode: tokens one by one after a prompt, prefill not counted;
- train: forward, backward and an AdamW step (fused, in bfloat16) on a row of labels.

transformers runs with `sdpa` attention and its ways to compute experts; the ratio is ours to the
fastest of them. Every round measures every contender once, so that a slow minute of the machine hits all.
Needs the packages of ../tools/golden/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers

# `batched_mm` copies the experts of every token: 50 times slower than the others on whole prompts.
EXPERTS = {
    "prefill": ["eager", "grouped_mm"],
    "decode": ["eager", "grouped_mm", "batched_mm"],
    "train": ["eager", "grouped_mm"],
}
DECODED_TOKENS = 32


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Transformers:
    """The reference, one model for all modes and experts implementations."""

    def __init__(self, config: Path, batch: int, tokens: int):
        torch.manual_seed(0)
        settings = transformers.Mistral4Config.from_json_file(config)
        torch.set_default_dtype(torch.bfloat16)
        self.model = transformers.Mistral4ForCausalLM._from_config(settings, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.ids = torch.randint(16, settings.vocab_size, (batch, tokens))

    def measure(self, mode: str, experts: str) -> float:
        """Tokens a second."""
        self.model.set_experts_implementation(experts)
        return getattr(self, mode)()

    @torch.inference_mode()
    def prefill(self) -> float:
        self.model.eval()
        start = time.perf_counter()
        self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        return self.ids.numel() / (time.perf_counter() - start)

    @torch.inference_mode()
    def decode(self) -> float:
        self.model.eval()
        output = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(DECODED_TOKENS):
            token = output.logits[:, -1:].argmax(-1)
            output = self.model(input_ids=token, cache=output.cache, use_cache=True)
        return len(self.ids) * DECODED_TOKENS / (time.perf_counter() - start)

    def train(self) -> float:
        self.model.train()
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.ids.numel() / (time.perf_counter() - start)


def measure_ours(options: argparse.Namespace, mode: str) -> float:
    """Tokens a second of one `mistral4 bench`, itself a median over its repetitions."""
    command = [options.binary, "bench", "--config", options.config, "--mode", mode, "--dtype", "bf16", "--json"]
    command += ["--tokens", options.tokens, "--batch", options.batch, "--threads", options.threads]
    run = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)["tokens_per_s"]


def measure_mode(reference: Transformers, mode: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of every contender, a list of rounds each; one round before them is not counted."""
    rounds: dict[str, list[float]] = {}
    for counted in [False] + [True] * options.rounds:
        for experts in EXPERTS[mode]:
            speed = reference.measure(mode, experts)
            if counted:
                rounds.setdefault(f"transformers {experts}", []).append(speed)
        if options.binary and counted:
            rounds.setdefault("mistral4", []).append(measure_ours(options, mode))
    return rounds


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path)
    parser.add_argument("--config", type=Path, default=here / "configs/small.json")
    parser.add_argument("--modes", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()

    reference = Transformers(options.config, options.batch, options.tokens)
    results = {}
    for mode in options.modes:
        rounds = measure_mode(reference, mode, options)
        medians = {name: statistics.median(speeds) for name, speeds in rounds.items()}
        fastest = max(speed for name, speed in medians.items() if name != "mistral4")
        results[mode] = {"rounds": rounds, "median_tokens_per_s": medians}
        for name, speed in medians.items():
            print(f"{mode:8} {name:24} {speed:10.1f} tokens/s", flush=True)
        if "mistral4" in medians:
            results[mode]["ratio_to_fastest"] = medians["mistral4"] / fastest
            print(f"{mode:8} mistral4 is {results[mode]['ratio_to_fastest']:.2f} times the fastest of transformers")
    report = {
        "config": options.config.stem,
        "tokens": options.tokens,
        "batch": options.batch,
        "threads": options.threads,
        "dtype": "bf16",
        "decoded_tokens": DECODED_TOKENS,
        "machine": {"cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability()},
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
