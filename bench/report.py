"""What the measurements of a configuration come to: medians, ratios, shares of the machine's peaks, and their table."""

from __future__ import annotations

import statistics

from contenders import OURS, Contender

# Bits of a value with its share of scales, for formats of others.
BITS = {"bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


def summarise(mode: str, rounds: dict[Contender, list[dict]], states: dict[Contender, str]) -> dict[str, dict]:
    """A record of every contender of a mode, from what each round told of it."""
    records = {}
    ours = {each.format: of for each, of in rounds.items() if each.family == OURS}
    for contender, measured in rounds.items():
        speeds = [each["tokens_per_s"] for each in measured]
        record = {
            "family": contender.family,
            "format": contender.format,
            "variant": contender.variant,
            "tokens_per_s": speeds,
            "median_tokens_per_s": statistics.median(speeds),
            "peak_rss_bytes": max(each["peak_rss_bytes"] for each in measured),
        }
        if mode.startswith("train"):
            record["states"] = states[contender]
        rival = ours.get(contender.rival_format)
        if rival:
            median = statistics.median(each["tokens_per_s"] for each in rival)
            record["ours_times_it"] = median / record["median_tokens_per_s"]
            record["ours_peak_rss_times_its"] = (
                max(each["peak_rss_bytes"] for each in rival) / record["peak_rss_bytes"]
            )
        if ours:
            record |= _shares(mode, contender, record["median_tokens_per_s"], ours)
        records[contender.name] = record
    return records


def _shares(mode: str, contender: Contender, speed: float, ours: dict[str, list[dict]]) -> dict:
    """Work and bytes a second, by our count of what a token takes, against the peaks measured in the same runs."""
    told = ours.get(contender.format) or next(iter(ours.values()))
    peaks = [each["cpu"] for of in ours.values() for each in of]
    if mode == "decode":
        # The first format of ours is bf16.
        bytes_of_token = told[0]["weight_bytes_per_s"] / told[0]["tokens_per_s"]
        if contender.format not in ours:
            bytes_of_token *= BITS[contender.format] / BITS["bf16"]
        bandwidth = statistics.median(peak["read_bytes_per_s"] for peak in peaks)
        return {
            "weight_bytes_per_s": speed * bytes_of_token,
            "share_of_read_bandwidth": speed * bytes_of_token / bandwidth,
        }
    flops_of_token = told[0]["model_flops_per_s"] / told[0]["tokens_per_s"]
    peak = statistics.median(peak["flops_per_s"] for peak in peaks)
    return {"model_flops_per_s": speed * flops_of_token, "share_of_gemm_peak": speed * flops_of_token / peak}


def peaks(rounds_of_modes: list[dict[Contender, list[dict]]]) -> dict:
    """The machine's peaks, each the median of what all runs of ours measured, with the smallest and the largest."""
    seen: dict[str, list[float]] = {}
    for rounds in rounds_of_modes:
        for contender, measured in rounds.items():
            for cpu in (each["cpu"] for each in measured if contender.family == OURS):
                number = "f32" if contender.format == "f32" else "bf16"
                seen.setdefault(f"{number}_flops_per_s", []).append(cpu["flops_per_s"])
                seen.setdefault("read_bytes_per_s", []).append(cpu["read_bytes_per_s"])
    return {
        name: {"median": statistics.median(values), "range": [min(values), max(values)]}
        for name, values in sorted(seen.items())
    }


def headlines(modes: dict[str, dict]) -> dict[str, float]:
    """The figures that issue readers ask for, by what they say."""
    figures: dict[str, float] = {}
    for mode, result in modes.items():
        records = result["contenders"].values()
        ours = {record["format"]: record for record in records if record["family"] == OURS}
        if not ours:
            continue
        first = next(iter(ours.values()))

        def best(families: list[str], key: str, choose, records=records) -> dict | None:
            found = [record for record in records if record["family"] in families]
            return choose(found, key=lambda record: record[key]) if found else None

        python = best(["transformers", "NeMo AutoModel"], "median_tokens_per_s", max)
        if python:
            figures[f"{mode}: times the fastest Python variant ({_label(python)})"] = python["ours_times_it"]
        if mode == "decode":
            for record in records:
                if record["family"] == "llama.cpp":
                    rival = Contender("llama.cpp", mode, record["format"]).rival_format
                    figures[f"decode: {rival} times llama.cpp {record['format']}"] = record["ours_times_it"]
            for each in ["int8", "int4"]:
                if each in ours:
                    ratio = ours[each]["median_tokens_per_s"] / first["median_tokens_per_s"]
                    figures[f"decode: {each} times our bf16"] = ratio
            figures["decode: share of the read bandwidth, bf16"] = first["share_of_read_bandwidth"]
        else:
            figures[f"{mode}: share of the GEMM peak"] = first["share_of_gemm_peak"]
        small = best(["transformers"], "peak_rss_bytes", min)
        if mode.startswith("train") and small:
            what = f"ours {first['states']}, {_label(small)} {small['states']}"
            figures[f"{mode}: peak memory, times transformers' ({what})"] = small["ours_peak_rss_times_its"]
    return figures


def _label(record: dict) -> str:
    return " ".join(part for part in [record["family"], record["variant"]] if part)


def table(mode: str, records: dict[str, dict]) -> str:
    """Text, a line for each contender."""
    share = "share_of_read_bandwidth" if mode == "decode" else "share_of_gemm_peak"
    rate, unit = ("weight_bytes_per_s", "GB/s") if mode == "decode" else ("model_flops_per_s", "GFLOP/s")
    of = "bandwidth" if mode == "decode" else "GEMM peak"
    lines = [f"{mode:34} {'tokens/s':>9} {'lowest to highest':>19} {'ours is':>8} {unit:>8} {of:>9} {'memory':>8}"]
    for name, record in records.items():
        speeds = record["tokens_per_s"]
        ratio = f"{record['ours_times_it']:.2f}x" if "ours_times_it" in record and record["family"] != OURS else ""
        line = f"{name:34} {record['median_tokens_per_s']:9.1f} {min(speeds):9.1f} {max(speeds):9.1f} {ratio:>8}"
        line += f" {record[rate] / 1e9:8.1f} {100 * record[share]:7.1f} %" if rate in record else f" {'':18}"
        line += f" {record['peak_rss_bytes'] / 1e9:5.2f} GB"
        lines.append(f"{line}  {record.get('states', '')}".rstrip())
    return "\n".join(lines)
