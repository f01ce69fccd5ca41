"""Tables and the picture of docs/scaling.md."""

from itertools import product

import model as models
from check import published
from estimate import H100, H200, Estimate, Layout, Workload, estimate

GPUS = (8, 16, 32, 64, 128, 256, 512)
FAMILIES = {
    "FSDP": dict(),
    "HSDP": dict(replicate=(2, 4, 8)),
    "FSDP + EP": dict(ep=(8, 16, 32, 64, 128)),
    "HSDP + EP": dict(ep=(8, 16, 32, 64), replicate=(2, 4, 8)),
    "PP + EP": dict(pp=(2, 4, 6), ep=(4, 8, 16, 32), chunks=(1, 2, 3, 6)),
    "TP + EP": dict(tp=(2, 4, 8), ep=(4, 8, 16, 32)),
    "PP + TP + EP": dict(pp=(2, 4), tp=(2, 4), ep=(4, 8, 16), chunks=(1, 2, 3)),
}


def best(family, gpus, gpu, model=models.MISTRAL_SMALL_4):
    """The fastest layout of a family that fits; else the one that comes nearest to fitting; `None` where none divides."""
    axes = dict(pp=(1,), tp=(1,), ep=(1,), replicate=(1,), chunks=(1,), micro_batch=(1, 2, 4, 8)) | FAMILIES[family]
    work = Workload(max(512, gpus))
    found = []
    for values in product(*axes.values()):
        layout = Layout(gpus, **dict(zip(axes, values)))
        if gpus % (layout.pp * layout.tp * layout.replicate) or layout.pp > 1 and model.num_hidden_layers % (layout.pp * layout.chunks):
            continue
        result = estimate(model, layout, gpu, work)
        if isinstance(result, Estimate):
            found.append(result)
    fitting = [result for result in found if result.bytes <= gpu.memory]
    if fitting:
        return max(fitting, key=lambda result: result.tokens_per_gpu)
    return min(found, key=lambda result: result.bytes, default=None)


def named(layout):
    """The layout in words."""
    extras = [f"{layout.chunks} chunks"] if layout.chunks > 1 else []
    return ", ".join([str(layout), *extras, f"micro-batch {layout.micro_batch}"])


def table(gpu):
    """Every family at every size."""
    lines = ["| GPUs | family | best layout | GB a GPU | s a step | tokens/s a GPU | model TFLOP/s a GPU | largest cost beside computing |"]
    lines.append("| ---: | --- | --- | ---: | ---: | ---: | ---: | --- |")
    for gpus in GPUS:
        results = {family: result for family in FAMILIES if (result := best(family, gpus, gpu))}
        fitting = {family: result for family, result in results.items() if result.bytes <= gpu.memory}
        if not fitting:
            least = min(results.values(), key=lambda result: result.bytes)
            lines.append(f"| {gpus} | none fits | {named(least.layout)} | {least.bytes / 1e9:.0f} | | | | |")
        for family, result in fitting.items():
            lines.append(row(gpus, family, result))
    return "\n".join(lines)


def row(gpus, family, result):
    """A line of the table."""
    costs = {name: time for name, time in result.times.items() if name != "compute"}
    name = max(costs, key=costs.get)
    return (
        f"| {gpus} | {family} | {named(result.layout)} | {result.bytes / 1e9:.0f} | {result.seconds:.1f} |"
        f" {result.tokens_per_gpu:.0f} | {result.model_flops / 1e12:.0f} | {name}, {costs[name] / result.seconds:.0%} |"
    )


def comparison():
    """Published against estimated."""
    lines = ["| model | GPUs | layout | published tokens/s a GPU | estimated | ratio |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    for model, layout, tokens, result, _ in published():
        ratio = result.tokens_per_gpu / tokens
        lines.append(f"| {model.name} | {layout.gpus} | {named(layout)} | {tokens} | {result.tokens_per_gpu:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


INK, FAINT, GRID = "#1b2733", "#5d6b7a", "#e3e8ee"
COLOURS = ("#2563c9", "#7fa7e0", "#2b8a3e", "#8cc49a", "#d9480f", "#7048b6", "#b08900")


def picture(gpu):
    """Throughput a GPU of each family over the number of GPUs, as SVG."""
    width, height, left, right, top, bottom = 960, 520, 80, 190, 78, 58
    lines = {family: [(gpus, best(family, gpus, gpu)) for gpus in GPUS] for family in FAMILIES}
    lines = {f: [(g, r.tokens_per_gpu) for g, r in line if r and r.bytes <= gpu.memory] for f, line in lines.items()}
    highest = max(value for line in lines.values() for _, value in line)
    highest = -(-highest // 1000) * 1000
    step = (width - left - right) / (len(GPUS) - 1)
    x = lambda gpus: left + GPUS.index(gpus) * step
    y = lambda value: height - bottom - value / highest * (height - top - bottom)
    text = lambda x, y, words, size=13, fill=FAINT, anchor="start": (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{words}</text>'
    )
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    out.append(text(left, 32, f"Mistral Small 4 119B on {gpu.name}: tokens/s a GPU", 19, INK))
    out.append(text(left, 54, "estimated from bytes and FLOPs, nothing was run; best layout of each family that fits in memory"))
    for value in range(0, int(highest) + 1, 1000):
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="{GRID}"/>')
        out.append(text(left - 10, y(value) + 4, value, anchor="end"))
    for gpus in GPUS:
        out.append(text(x(gpus), height - bottom + 22, gpus, anchor="middle"))
    out.append(text((left + width - right) / 2, height - 12, "GPUs", anchor="middle"))
    labels = []
    for (family, line), colour in zip(lines.items(), COLOURS):
        if not line:
            continue
        points = " ".join(f"{x(gpus):.1f},{y(value):.1f}" for gpus, value in line)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        out += [f'<circle cx="{x(gpus):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>' for gpus, value in line]
        labels.append((y(line[-1][1]), family, colour, x(line[-1][0])))
    # Labels in the order of their lines' ends, far enough apart to read.
    place = top
    for at, family, colour, _ in sorted(labels):
        place = max(place, at)
        out.append(text(width - right + 14, place + 4, family, 14, colour))
        place += 19
    return "\n".join([*out, "</svg>", ""])
