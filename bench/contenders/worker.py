"""The process of a contender that is written in Python: a model, measured when asked.

Started as `python -m contenders.worker SPEC`, with a JSON object. Answers are lines of JSON: first `{"versions"}`, or
`{"missing"}` where a package is not there; then for each line `{"variant", "repetitions"}` of the input
`{"tokens_per_s", "peak_rss_bytes"}`.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys

MODULES = {"transformers": "hf_transformers", "NeMo AutoModel": "nemo", "llama.cpp": "llama_cpp"}


def main() -> None:
    spec = json.loads(sys.argv[1])
    # What libraries print goes with the errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        module = importlib.import_module(f"contenders.{MODULES[spec['family']]}")
    except ImportError as error:
        answer({"missing": str(error)})
        return
    runner = module.Runner(spec)
    answer({"versions": module.Runner.versions})
    warm = set()
    for line in sys.stdin:
        request = json.loads(line)
        variant = request["variant"]
        if variant not in warm:
            runner.run(spec["mode"], variant)
            warm.add(variant)
        speeds = [runner.run(spec["mode"], variant) for _ in range(request["repetitions"])]
        # Linux counts kilobytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"tokens_per_s": speeds, "peak_rss_bytes": peak})


if __name__ == "__main__":
    main()
