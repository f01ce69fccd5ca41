"""Measures `mistral4 bench`, transformers, NeMo AutoModel and llama.cpp in turns, on one machine.

    python side_by_side.py --binary ../target/release/mistral4 --nemo ../../Automodel \\
        --configs small medium --rounds 3 2 --repetitions 3 1 --out RESULT.json --picture RESULT.png

Prints tables and writes JSON and a picture. Weights and tokens are random. Modes:

- prefill: a prompt into an empty cache, logits of the last position only, in bf16 (NeMo AutoModel: without a cache);
- decode: tokens one by one after a prompt, prefill not timed; bf16, and our int8 and int4 beside q8_0 and q4_0;
- train: forward, backward and an AdamW step on the prompt as labels, in bf16; ours moves each layer's parameters as
  soon as their gradient is final;
- train-f32: the same with parameters, gradients and moments in f32 on both sides, once, to compare memory.

Every round measures every contender once, so that a slow minute of the machine hits all; figures are medians over
rounds, of medians over repetitions, after a run that is not counted. Each contender is a process (`contenders/`),
kept from round to round where all fit into memory beside each other. One that isn't installed, or doesn't fit into
memory, is left out with a word why. Shares are our count of operations and bytes (`mistral4 bench --help`) against
the GEMM peak and read bandwidth that the runs of ours measured.

Packages: requirements.txt. The GGUF files (5 GB for `medium`) are kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import picture
import report
from contenders import MODES, Contender, Field, Missing

HERE = Path(__file__).resolve().parent


def machine() -> dict:
    """What the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "memory_bytes": memory}


def measure_mode(field: Field, rounds: int, repetitions: int) -> dict[Contender, list[dict]]:
    """What every contender told in each round; those that can't take part are in `field.skipped`."""
    measured: dict[Contender, list[dict]] = {}
    if field.mode == "train-f32":
        rounds = repetitions = 1
    passed_over = [each for each in field.contenders if each.variant in field.options.skip]
    field.skipped.update({each.name: "passed over (--skip)" for each in passed_over})
    for number in range(1, rounds + 1):
        for contender in field.contenders:
            if contender.name in field.skipped:
                continue
            begin = time.monotonic()
            try:
                result = field.measure(contender, repetitions)
            except Missing as reason:
                field.skipped[contender.name] = str(reason)
                print(f"{field.mode}: {contender.name} is left out: {reason}", flush=True)
                continue
            measured.setdefault(contender, []).append(result)
            took = f"took {time.monotonic() - begin:.0f} s"
            speed = f"{contender.name} {result['tokens_per_s']:.1f} tokens/s"
            print(f"{field.mode} {number}/{rounds}: {speed}, {took}", flush=True)
    return measured


def measure_config(config: Path, rounds: int, repetitions: int, options: argparse.Namespace, versions: dict) -> dict:
    """All modes of a configuration, and their tables."""
    results, raw = {}, []
    for mode in options.modes:
        field = Field(mode, config, options, versions)
        try:
            measured = measure_mode(field, rounds, repetitions)
            states = {each: field.states(each) for each in measured}
        finally:
            field.close()
        raw.append(measured)
        results[mode] = {"contenders": report.summarise(mode, measured, states), "skipped": field.skipped}
        print(f"\n{config.stem}, {options.batch} x {options.tokens} tokens")
        print(report.table(mode, results[mode]["contenders"]) + "\n", flush=True)
    figures = report.headlines(results)
    for what, value in figures.items():
        print(f"{config.stem} {what}: {value:.2f}")
    return {
        "parameters": field.parameters,
        "rounds": rounds,
        "repetitions": repetitions,
        "peaks": report.peaks(raw),
        "modes": results,
        "headlines": figures,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, help="mistral4; without it, only the others are measured")
    parser.add_argument("--nemo", type=Path, help="a checkout of NeMo AutoModel, where it isn't installed")
    parser.add_argument("--configs", nargs="+", default=["small"], help="names in configs/, or files")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, nargs="+", default=[3], help="one number, or one for each config")
    parser.add_argument("--repetitions", type=int, nargs="+", default=[3], help="one number, or one for each config")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash", choices=["on", "off"], default="on", help="flash attention of llama.cpp")
    head = "bits of int4's and q4_0's output projection"
    parser.add_argument("--head-bits", type=int, choices=[8, 4], default=8, help=head)
    skip = "ways to run experts that are not measured, as eager"
    parser.add_argument("--skip", nargs="+", default=[], metavar="VARIANT", help=skip)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mistral4-bench")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--picture", type=Path, help="PNG file")
    options = parser.parse_args()
    for name in ["rounds", "repetitions"]:
        given = getattr(options, name)
        if len(given) not in (1, len(options.configs)):
            parser.error(f"--{name}: give one number, or one for each of --configs")
        setattr(options, name, given * len(options.configs) if len(given) == 1 else given)
    named = {each: HERE / "configs" / f"{each}.json" for each in options.configs}
    options.configs = [path if path.exists() else Path(each) for each, path in named.items()]
    if missing := [str(path) for path in options.configs if not path.exists()]:
        parser.error(f"--configs: {missing[0]} is neither a name in configs/ nor a file")
    return options


def main() -> None:
    options = parse()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the load of this machine is {load:.1f}: other work distorts what is measured")
    versions: dict[str, str] = {}
    if options.binary:
        told = subprocess.run([options.binary, "--version"], check=True, capture_output=True, text=True).stdout
        versions["mistral4"] = told.split()[-1]
    configs = {
        config.stem: measure_config(config, rounds, repetitions, options, versions)
        for config, rounds, repetitions in zip(options.configs, options.rounds, options.repetitions, strict=True)
    }
    keys = ["tokens", "new_tokens", "batch", "threads", "flash", "head_bits"]
    settings = {key: getattr(options, key) for key in keys}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**machine(), "load_before": load},
        "versions": versions,
        "settings": settings,
        "configs": configs,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        picture.draw([result], options.picture)


if __name__ == "__main__":
    main()
