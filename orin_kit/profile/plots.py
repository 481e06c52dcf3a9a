"""The report's plots, as SVG that stands inside an HTML page and takes its colours from it."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orin_kit.profile.report import MEMORY_KINDS, Report, size
from orin_kit.profile.targets import GB

# Text and axes are drawn in this colour, which the page then replaces by its own, light or dark.
INK = "#010203"
SERIES = ("#2f7ed8", "#e08a1e", "#2a9d76", "#8e6bbf", "#c2557a", "#6b7a8f")
LIMIT = "#d6403a"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def plots(report: Report) -> dict[str, str]:
    """SVG elements by what they show: `ttft`, `tpot`, `memory`."""
    with mpl.rc_context(STYLE):
        return {
            name: _svg(draw(report), name) for name, draw in (("ttft", _ttft), ("tpot", _tpot), ("memory", _memory))
        }


def _ttft(report: Report) -> Figure:
    """Median by prompt length, a bar up to the 95th percentile, a line for each batch size."""
    figure, axes = _figure("Time to first token by prompt length", width=5.4)
    lengths = sorted({point.prompt_length for point in report.points})
    for color, batch in _colors(report):
        points = sorted((p for p in report.points if p.batch_size == batch), key=lambda p: p.prompt_length)
        x = [lengths.index(point.prompt_length) for point in points]
        median = [point.ttft_ms.median for point in points]
        above = [max(0.0, point.ttft_ms.p95 - point.ttft_ms.median) for point in points]
        error = ([0.0] * len(points), above)
        axes.errorbar(x, median, yerr=error, color=color, marker="o", capsize=4, label=f"batch {batch}: median, p95")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set(xlabel="prompt tokens", ylabel="ms")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    _limit(axes, report.targets.ttft_p95_ms)
    return figure


def _tpot(report: Report) -> Figure:
    """Every decode step of every point: box from quartile to quartile, whiskers from the 5th to the 95th percentile."""
    figure, axes = _figure("Time per decoded token (quartiles; whiskers 5 to 95 %)", width=5.4)
    several = len({point.batch_size for point in report.points}) > 1
    colors = {batch: color for color, batch in _colors(report)}
    names = [f"{p.prompt_length}\n×{p.batch_size}" if several else str(p.prompt_length) for p in report.points]
    samples = [point.tpot_ms.samples for point in report.points]
    drawn = axes.boxplot(samples, whis=(5, 95), widths=0.5, patch_artist=True, flierprops={"markersize": 2})
    for part in ("whiskers", "caps", "medians"):
        for line in drawn[part]:
            line.set_color(INK)
    for box, point in zip(drawn["boxes"], report.points, strict=True):
        box.set(facecolor=colors[point.batch_size], edgecolor=INK)
    for flier in drawn["fliers"]:
        flier.set(markeredgecolor=INK, markerfacecolor="none")
    axes.set_xticks(range(1, len(names) + 1), names)
    axes.set(xlabel="prompt tokens × batch size" if several else "prompt tokens", ylabel="ms")
    _limit(axes, report.targets.tpot_p95_ms)
    return figure


def _memory(report: Report) -> Figure:
    """Memory by kind at the judged point."""
    point = report.judged
    figure, axes = _figure(f"Memory by kind ({point.place})", width=11.2, height=2.6)
    kinds = list(reversed(MEMORY_KINDS))
    values = [getattr(point.memory, kind) for kind in kinds]
    files = ("weights", "kv_cache")
    colors = [SERIES[1] if kind in files else SERIES[0] for kind in kinds]
    bars = axes.barh([MEMORY_KINDS[kind] for kind in kinds], [v / GB for v in values], color=colors, height=0.62)
    axes.bar_label(bars, [size(value) for value in values], padding=4, color=INK)
    axes.set(xlabel="GB (1 GB = 1e9 bytes)")
    axes.margins(x=0.12)
    if (limit := report.targets.memory_gb) is not None:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1.4)
        axes.text(limit, 1, f"target {limit:g} GB", color=LIMIT, ha="center", va="bottom",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    return figure


def _figure(title: str, *, width: float, height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _colors(report: Report) -> list[tuple[str, int]]:
    """A colour for every batch size, the same in all plots."""
    batches = sorted({point.batch_size for point in report.points})
    return [(SERIES[i % len(SERIES)], batch) for i, batch in enumerate(batches)]


def _limit(axes: Axes, limit: float | None) -> None:
    """The target as a line, named beside the axes; they reach it, so that the distance shows."""
    axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], (limit or 0) * 1.1))
    if limit is not None:
        axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1.4)
        beside = axes.get_yaxis_transform()
        axes.text(1.01, limit, f"target\n{limit:g} ms", color=LIMIT, va="center", fontsize=9, transform=beside)


def _svg(figure: Figure, name: str) -> str:
    """The `<svg>` element alone: no XML head, no metadata, ids that are the page's only ones of that name."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg)[^>]*?(viewBox="[^"]*")[^>]*>', r'\1 \2 role="img">', text, count=1)
    return text.replace(INK, "currentColor")
