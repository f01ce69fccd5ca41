"""Draws bars of prefill, decode and training from results of `side_by_side.py`.

    python picture.py RESULT.json [RESULT.json ...] --out RESULT.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "mistral4": "#e8590c",
    "transformers": "#4c78a8",
    "NeMo AutoModel": "#76b041",
    "llama.cpp": "#7f7f7f",
}
TITLES = {"prefill": "prefill", "decode": "decode", "train": "training step"}
# Formats that stand in one group.
BITS = {"f32": 32, "bf16": 16, "int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}


def draw(results: list[dict], path: Path) -> None:
    """A panel for each configuration and mode, bars grouped by bits of a weight, ours first."""
    configs = _joined(results)
    settings = results[0]["settings"]
    modes = [mode for mode in TITLES if any(mode in config["modes"] for config in configs.values())]
    most = [max(len(_bars(config, mode)) for config in configs.values()) for mode in modes]
    figure, axes = plt.subplots(
        len(modes), len(configs), figsize=(6.2 * len(configs), 0.9 + 0.34 * sum(most) + 0.9 * len(modes)),
        squeeze=False, height_ratios=[count + 2 for count in most], layout="constrained",
    )  # fmt: skip
    for row, mode in enumerate(modes):
        for column, (name, config) in enumerate(configs.items()):
            if mode not in config["modes"]:
                axes[row][column].set_axis_off()
                continue
            _panel(axes[row][column], _bars(config, mode), config, mode)
            size = f"{config['parameters'] / 1e6:,.0f} M parameters"
            axes[row][column].set_title(f"{TITLES[mode]}, {name} ({size})", fontsize=11, loc="left")
    machine = results[0]["machine"]
    figure.suptitle(
        "Tokens a second: medians with the lowest and highest round\n"
        f"{settings['batch']} x {settings['tokens']} tokens, "
        f"{settings['threads']} threads of {machine['cpu']}, {results[0]['date']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _joined(results: list[dict]) -> dict[str, dict]:
    """Configurations, small ones first, with the modes of all results; peaks are those of the first that has them."""
    configs: dict[str, dict] = {}
    for result in results:
        for name, config in result["configs"].items():
            known = configs.setdefault(name, {**config, "modes": {}, "peaks": {}})
            known["modes"] = {**config["modes"], **known["modes"]}
            known["peaks"] = {**config["peaks"], **known["peaks"]}
    return dict(sorted(configs.items(), key=lambda item: item[1]["parameters"]))


def _bars(config: dict, mode: str) -> list[dict]:
    """Records of a mode: wide formats first, in each ours first and the others from the fastest on."""
    records = config["modes"].get(mode, {"contenders": {}})["contenders"]

    def place(record: dict) -> tuple:
        return (-BITS[record["format"]], record["family"] != "mistral4", -record["median_tokens_per_s"])

    return sorted(records.values(), key=place)


def _panel(axes: plt.Axes, records: list[dict], config: dict, mode: str) -> None:
    places, place, before = [], 0.0, None
    for record in records:
        bits = BITS[record["format"]]
        place += 1.0 if before in (None, bits) else 1.6
        places.append(place)
        before = bits
    speeds = [record["median_tokens_per_s"] for record in records]
    axes.barh(places, speeds, color=[COLOURS[record["family"]] for record in records], height=0.8)
    errors = [
        [speed - min(record["tokens_per_s"]) for speed, record in zip(speeds, records)],
        [max(record["tokens_per_s"]) - speed for speed, record in zip(speeds, records)],
    ]
    axes.errorbar(speeds, places, xerr=errors, fmt="none", ecolor="#222222", elinewidth=0.8, capsize=2)
    labels = [" ".join(part for part in (r["family"], r["format"], r["variant"]) if part) for r in records]
    axes.set_yticks(places, labels, fontsize=9)
    for at, record in zip(places, records):
        speed = record["median_tokens_per_s"]
        text = f"{speed:,.0f}" if speed >= 20 else f"{speed:.1f}"
        share = record.get("share_of_read_bandwidth") if mode == "decode" else record.get("share_of_gemm_peak")
        if share is not None:
            text += f"  ({100 * share:.0f} %)"
        end = (max(record["tokens_per_s"]), at)
        axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.35 * max((max(record["tokens_per_s"]) for record in records), default=1.0))
    peak = config["peaks"].get("read_bytes_per_s" if mode == "decode" else "bf16_flops_per_s")
    if peak:
        if mode == "decode":
            limit = f"read bandwidth, {peak['median'] / 1e9:.0f} GB/s"
        else:
            limit = f"bf16 GEMM peak, {peak['median'] / 1e12:.2f} TFLOP/s"
        axes.set_xlabel(f"tokens/s (% of the measured {limit})", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw([json.loads(path.read_text()) for path in options.results], options.out)


if __name__ == "__main__":
    main()
