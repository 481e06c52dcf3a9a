"""The curves show the log's numbers, and the page shows the report's, with nothing outside it and nothing unescaped."""

from __future__ import annotations

import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orin_kit.distill.curves import PANELS, curves, plot_curves, read_log, stages
from orin_kit.distill.heads import LayerHeads, write_heads
from orin_kit.distill.report_html import write_html
from orin_kit.errors import ArtifactError

EVIL = "<script>alert('x')</script>\"&$\\alpha$"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def lines(seed: int = 0) -> list[dict[str, Any]]:
    """A log as the trainer writes it: three stages, some fields in some lines only."""
    draw = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for stage, steps in (("features", 30), ("attention", 20), ("task", 100)):
        before = made[-1]["done"] if made else 0
        for step in (1, *range(10, steps + 1, 10)):
            line = {"stage": stage, "step": step, "done": before + step, "seconds": 0.5 * (before + step)}
            line |= {name: float(draw.uniform(0.1, 3)) for name in ("loss", "ce", "kd", "learning_rate", "grad_norm")}
            line |= {"temperature": 2.0, "teacher_weight": float(draw.uniform(0.3, 0.9))}
            if stage == "task":
                if step % 50 == 0:
                    line |= {n: float(draw.uniform(0.1, 3)) for n in ("held_out_loss", "general_loss")}
                    line["forgetting"] = float(draw.uniform(-0.1, 0.2))
            else:
                line["alignment"] = float(draw.uniform(0.1, 3))
            made.append(line)
    return made


def write_log(home: Path, content: list[dict[str, Any]]) -> Path:
    path = home / "train.log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in content), "utf-8")
    return path


def drawn(figure: Figure, label: str) -> list[tuple[float, float]]:
    """The points of a curve, read back from its axes."""
    found = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == label]
    assert len(found) == 1, label
    return [(x, y) for x, y in zip(*found[0].get_data(), strict=True) if not math.isnan(y)]


def test_every_number_of_the_log_is_in_the_plot() -> None:
    log = lines()
    figure = curves(log)
    for panel in PANELS:
        for series in panel.series:
            wanted = [(line["done"], line[series.field]) for line in log if series.field in line]
            if wanted:
                assert drawn(figure, series.label) == wanted
    assert sum(bool(axes.get_title(loc="left")) for axes in figure.axes) == 4


def test_a_curve_parts_where_a_stage_begins() -> None:
    (line,) = [li for axes in curves(lines()).axes for li in axes.get_lines() if li.get_label() == "alignment"]
    values = line.get_ydata()
    assert [math.isnan(value) for value in values].index(True) == 4  # after steps 1, 10, 20 and 30 of the first stage


def test_stages_are_where_they_were_and_named() -> None:
    log = lines()
    assert stages(log) == [("features", 0, 30), ("attention", 30, 50), ("task", 50, 150)]
    first: Axes = curves(log).axes[0]
    named = {text.get_text(): text.xy[0] for text in first.texts}  # type: ignore[attr-defined]
    assert named == {"features": 15, "attention": 40, "task": 100}
    assert first.get_xlim() == (0, 150)


def test_forgetting_has_an_axis_of_its_own() -> None:
    figure = curves(lines())
    of = {line.get_label(): axes for axes in figure.axes for line in axes.get_lines()}
    assert of["forgetting"] is not of["teacher weight"]
    assert of["forgetting"].get_shared_x_axes().joined(of["forgetting"], of["teacher weight"])


def test_what_is_not_finite_or_missing_leaves_a_gap() -> None:
    log = lines()
    log[2]["loss"], log[3]["loss"] = math.nan, math.inf
    del log[4]["loss"]
    kept = [(line["done"], line["loss"]) for i, line in enumerate(log) if i not in (2, 3, 4)]
    assert drawn(curves(log), "loss that is minimised") == kept


@pytest.mark.parametrize(
    "content",
    [
        [],
        lines()[:1],
        [{"stage": "task", "step": 1, "loss": 2.0}],
        [{"stage": EVIL, "step": 1, "done": 1, "loss": 0.0}],
    ],
    ids=["empty", "one line", "no done", "evil"],
)
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_short_logs_are_drawn(content: list[dict[str, Any]], suffix: str, tmp_path: Path) -> None:
    picture = tmp_path / f"curves.{suffix}"
    plot_curves(write_log(tmp_path, content), picture)
    if suffix == "svg":
        text = "".join(ET.fromstring(picture.read_text("utf-8")).itertext())
        assert (content[0]["stage"] if content else "nothing was logged") in text
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_the_same_bytes_every_time_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    log = write_log(tmp_path, lines())
    for name in ("a.svg", "b.svg"):
        plot_curves(log, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_line_cut_off_at_the_end_is_left_out_and_one_before_it_is_an_error(tmp_path: Path) -> None:
    log = write_log(tmp_path, lines()[:3])
    with log.open("a") as file:
        file.write('{"stage": "ta')
    assert read_log(log) == lines()[:3]
    with log.open("a") as file:
        file.write('sk"\n{"stage": "task", "step": 1, "loss": 1.0}\n')
    with pytest.raises(ArtifactError, match="line 4"):
        read_log(log)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_log(tmp_path / "absent.jsonl")


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text by tag; complains of tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.cells += [""] if tag in {"td", "th"} else []
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1] += data


def score(draw: np.random.Generator) -> dict[str, Any]:
    accuracy = {kind: float(draw.uniform()) for kind in ("logic", "strings", "all")}
    return {"parameters": int(draw.integers(10**6)), "accuracy": accuracy, "held_out_loss": float(draw.uniform())}


def report() -> dict[str, Any]:
    draw = np.random.default_rng(5)
    return {
        "made_by": "orin-kit 0.1.0",
        "seed": 3,
        "test_items": 77,
        "models": {name: score(draw) for name in ("teacher", "start", "student")},
        "stages": {"task": {"steps": 100, "first_loss": 2.5, "last_loss": 1.25, "last_kd": 0.5, "last_ce": 0.75}},
        "final_loss": 1.25,
        "train_seconds": 3725.0,
        "general": {
            "before": {"accuracy": {"all": 0.5}, "loss": 1.0},
            "after": {"accuracy": {"all": 0.4}, "loss": 1.1},
        },
    }


def page(home: Path, of: dict[str, Any], *, heads: Path | None = None, recipe: str = "") -> tuple[Page, str]:
    if recipe:
        (home / "recipe.yaml").write_text(recipe, "utf-8")
    write_html(of, write_log(home, lines()), heads, home / "report.html")
    html = (home / "report.html").read_text("utf-8")
    return Page(html), html


def test_the_page_shows_the_reports_numbers(tmp_path: Path) -> None:
    content = report()
    found, _ = page(tmp_path, content, recipe="teacher: /m/Large\nstudent: /m/Small\n")
    for model in content["models"].values():
        assert all(f"{100 * share:.1f} %" in found.cells for share in model["accuracy"].values())
        assert f"{model['held_out_loss']:.4f}" in found.cells and f"{model['parameters']:,}" in found.cells
    assert "-10.0 points" in found.cells and "+10.0 %" in found.cells
    assert "1 h 2 min" in found.text and "Large teaches Small" in found.text
    assert {"teacher", "student before", "student now"} <= set(found.cells)


def test_the_page_needs_nothing_outside_it_and_its_ids_are_unique(tmp_path: Path) -> None:
    write_heads(
        tmp_path / "heads.json", [LayerHeads(6, [0.2, 0.9, 0.4], [0, 2]), LayerHeads(7, [0.1, 0.3, 0.8], [0, 1])]
    )
    found, html = page(tmp_path, report(), heads=tmp_path / "heads.json")
    assert found.tags.count("svg") == 2
    assert not set(found.tags) & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert not re.search(r"https?:|@import|url\((?!#)", re.sub(r"data:[^\"]*", "", html))
    assert len(found.ids) == len(set(found.ids))
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg.replace("xlink:", ""))


def test_text_of_the_user_is_escaped(tmp_path: Path) -> None:
    content = report()
    content["models"][EVIL] = content["models"]["start"] | {"accuracy": {EVIL: 0.25}}
    content["stages"][EVIL] = content["stages"]["task"]
    content["general"]["after"]["accuracy"][EVIL] = 0.125
    recipe = f"# {EVIL}\nteacher: null\nstudent: {json.dumps(EVIL.replace('/', ''))}\n"
    found, html = page(tmp_path, content, recipe=recipe)
    assert "<script" not in html and "script" not in found.tags
    assert found.cells.count(EVIL) == 4  # a model, its kind of question, a kind of the general set, a stage
    assert recipe in found.text


def test_a_page_without_scores_general_set_or_recipe(tmp_path: Path) -> None:
    found, _ = page(tmp_path, {"seed": 0})
    assert "table" not in found.tags and "svg" in found.tags
    newborn = report() | {"general": {"after": {"accuracy": {"all": 0.4}, "loss": 1.1}}}
    assert "1.1000" in page(tmp_path, newborn)[0].cells
