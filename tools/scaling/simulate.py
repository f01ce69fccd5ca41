"""Memory and step time of training Mistral Small 4 119B on many GPUs.

    python3 tools/scaling/simulate.py --gpus 64 --ep 64 --micro-batch 2     one layout
    python3 tools/scaling/simulate.py --write docs                         the tables and the picture of docs/scaling.md
"""

import argparse
import re
from pathlib import Path

import model as models
import report
from estimate import H100, H200, Layout, Workload, estimate


def write(docs):
    """Puts the tables between their marks in scaling.md and draws the picture."""
    page = docs / "scaling.md"
    text = page.read_text()
    for name, content in (
        ("published", report.comparison()),
        ("h100", report.table(H100)),
        ("h200", report.table(H200)),
    ):
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.S
        )
        assert count == 1, name
    page.write_text(text)
    (docs / "images" / "scaling.svg").write_text(report.picture(H100))


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpu", choices=("h100", "h200"), default="h100")
    for name, default in (("gpus", 64), ("pp", 1), ("tp", 1), ("ep", 1), ("replicate", 1), ("chunks", 1), ("micro-batch", 1)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--sequences", type=int, default=512, help="a step, over all GPUs")
    arguments.add_argument("--tokens", type=int, default=4096, help="a sequence")
    arguments.add_argument("--keep-activations", action="store_true")
    arguments.add_argument("--write", type=Path, metavar="DOCS")
    given = arguments.parse_args()
    if given.write:
        return write(given.write)
    gpu = {"h100": H100, "h200": H200}[given.gpu]
    layout = Layout(
        given.gpus, given.pp, given.tp, given.ep, given.replicate, given.chunks, given.micro_batch, not given.keep_activations
    )
    result = estimate(models.MISTRAL_SMALL_4, layout, gpu, Workload(given.sequences, given.tokens))
    if isinstance(result, str):
        raise SystemExit(result)
    print(f"{report.named(layout)} on {layout.gpus} x {gpu.name}")
    for name, size in result.memory.items():
        print(f"  {name:18} {size / 1e9:8.1f} GB")
    fits = "fits" if result.bytes <= gpu.memory else "does not fit"
    print(f"  {'together':18} {result.bytes / 1e9:8.1f} GB, {fits} in {gpu.memory / 1e9:.0f}")
    for name, time in result.times.items():
        print(f"  {name:18} {time:8.2f} s")
    print(f"  {'a step':18} {result.seconds:8.2f} s, {result.tokens_per_gpu:.0f} tokens/s and {result.model_flops / 1e12:.0f} model TFLOP/s a GPU")


if __name__ == "__main__":
    main()
