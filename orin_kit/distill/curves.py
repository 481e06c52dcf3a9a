"""The picture of a run: what its train log says, over all steps, with the stages shaded and named."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from orin_kit.errors import ArtifactError

# Okabe and Ito's colours, told apart by colour-blind eyes (https://jfly.uni-koeln.de/color/).
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
INK = "#010203"  # text and axes; a page replaces it by its own colour, light or dark
SHADE = "#8a94a0"
WIDTH = 8.0  # inches: a page's, without its margins
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "curves",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Series:
    """A number of the log: its field, its name in the legend, its colour and the axis that measures it."""

    field: str
    label: str
    color: str
    right: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[Series, ...]
    unit: str = ""
    right_unit: str = ""
    log_scale: bool = False  # where all its numbers are above 0
    height: float = 1.0


PANELS = (
    Panel(
        "Training loss and its parts",
        (
            # What is minimised goes through black on white and white on black alike: it is the page's own colour.
            Series("loss", "loss that is minimised", INK),
            Series("ce", "cross-entropy", BLUE),
            Series("kd", "distillation (T² × divergence)", ORANGE),
            Series("alignment", "alignment", GREEN),
            Series("exits", "early exits", PURPLE),
        ),
        unit="nats; alignment: its own unit",
        log_scale=True,
        height=1.6,
    ),
    Panel(
        "Loss on what is never trained on",
        (Series("held_out_loss", "held-out", BLUE), Series("general_loss", "general set", RED)),
        unit="nats a token",
    ),
    Panel(
        "Teacher weight, and what is forgotten",
        (Series("teacher_weight", "teacher weight", GREEN), Series("forgetting", "forgetting", RED, right=True)),
        unit="share of the loss",
        right_unit="rise of the general loss",
    ),
    Panel("Learning rate", (Series("learning_rate", "learning rate", SKY),), height=0.8),
)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a train log, each with `done`, its step over all stages. A last line cut off by a kill is left out.

    Raises:
        ArtifactError: the file is missing, or a line before the last is no JSON object.
    """
    try:
        texts = [text for text in path.read_text("utf-8").splitlines() if text.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the train log {path} cannot be read ({error})", mend="give train.log.jsonl") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
            if number == len(texts):
                break
        if not isinstance(line, dict):
            raise ArtifactError(f"line {number} of {path} is no JSON object", mend="remove that line")
        lines.append({"done": line.get("step", number), **line})
    return lines


def plot_curves(log: Path, to: Path) -> None:
    """Draw a train log; the suffix of `to` says the format, as .svg or .png.

    Raises:
        ArtifactError: as `read_log`.
    """
    lines = read_log(log)
    with mpl.rc_context(STYLE):
        figure = curves(lines)
        # Pictures of the same log are the same bytes; a picture that stands alone has a ground of its own.
        metadata = {"Date": None} if to.suffix == ".svg" else None
        figure.savefig(to, facecolor="white", dpi=150, metadata=metadata)


def curves_svg(lines: Sequence[Mapping[str, Any]]) -> str:
    """The same as an `<svg>` element for a page."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        curves(lines).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(file.getvalue(), "curves")


def curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each of `PANELS` of which the log says something, under one axis of steps."""
    with mpl.rc_context(STYLE):
        return _figure(lines)


def _figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    drawn = [panel for panel in PANELS if any(_points(lines, s.field)[0] for s in panel.series)]
    if not drawn:
        figure = Figure(figsize=(WIDTH, 1.2), layout="constrained")
        figure.text(0.5, 0.5, "nothing was logged", ha="center", va="center")
        return figure
    heights = [panel.height for panel in drawn]
    figure = Figure(figsize=(WIDTH, 0.6 + 1.9 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (axes,) in zip(drawn, grid, strict=True):
        _draw(panel, axes, lines)
        _shade(axes, lines, named=axes is grid[0][0])
    last = grid[-1][0]
    last.set_xlabel("steps over all stages")
    last.set_xlim(*_limits(lines))
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw(panel: Panel, axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(panel.title, pad=18)
    axes.set_ylabel(panel.unit)
    found = {series: _points(lines, series.field) for series in panel.series}
    found = {series: points for series, points in found.items() if points[0]}
    right = axes.twinx() if any(series.right for series in found) else None
    handles = []
    for series, (steps, values) in found.items():
        place = right if series.right and right is not None else axes
        marker = "o" if sum(map(math.isfinite, values)) < 40 else None
        style = "--" if series.right else "-"
        handles += place.plot(
            steps, values, style, color=series.color, label=series.label, marker=marker, markersize=3, linewidth=1.5
        )
    if right is not None:
        right.set_ylabel(panel.right_unit)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axes.spines["right"].set_visible(False)
    if panel.log_scale and not any(value <= 0 for _, values in found.values() for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    # Above the panel, at its right: no curve runs there.
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), borderpad=0,
                handlelength=1.4, columnspacing=1.2)  # fmt: skip


def _points(lines: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of a field, where a line has it as a finite number; NaN between stages, whose curves part."""
    steps: list[int] = []
    values: list[float] = []
    stage = None
    for line in lines:
        value = line.get(field)
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        if steps and line.get("stage") != stage:
            steps.append(line["done"])
            values.append(math.nan)
        stage = line.get("stage")
        steps.append(line["done"])
        values.append(float(value))
    return steps, values


def stages(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(name, steps done before it, steps done at its end) of each stage, as far as the log goes."""
    found: list[tuple[str, float, float]] = []
    for name, group in groupby(lines, key=lambda line: str(line.get("stage", ""))):
        own = list(group)
        before = own[0]["done"] - own[0].get("step", 1)
        found.append((name, found[-1][2] if found else before, own[-1]["done"]))
    return found


def _shade(axes: Axes, lines: Sequence[Mapping[str, Any]], *, named: bool) -> None:
    first, last = _limits(lines)
    for number, (name, begin, end) in enumerate(stages(lines)):
        if number % 2 == 0:
            axes.axvspan(begin, end, color=SHADE, alpha=0.16, linewidth=0, zorder=0)
        if number:
            axes.axvline(begin, color=SHADE, linewidth=0.8, zorder=0)
        if named and name:
            narrow = (end - begin) / (last - first) < 0.017 * len(name)
            axes.annotate(name, ((begin + end) / 2, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top",
                          fontsize=9, fontweight="bold", rotation=90 if narrow else 0)  # fmt: skip


def _limits(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    begin, end = min(s[1] for s in stages(lines)), max(s[2] for s in stages(lines))
    return begin, end if end > begin else begin + 1


def inline_svg(text: str, name: str) -> str:
    """The `<svg>` element of an SVG file, for a page: no head, ids that begin with `name`, the page's ink."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg)[^>]*?(viewBox="[^"]*")[^>]*>', r'\1 \2 role="img">', text, count=1)
    return text.replace(INK, "currentColor")
