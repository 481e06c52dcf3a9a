"""`report.html`: a distillation run on one page that needs nothing outside it, for screen and paper."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from orin_kit.distill.curves import STYLE, curves_svg, inline_svg, read_log
from orin_kit.distill.heads import plot_heads, read_heads

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NAMES = {"teacher": "teacher", "start": "student before", "student": "student now"}
PARTS = {"steps": "steps", "first_loss": "first loss", "last_loss": "last loss", "last_alignment": "alignment",
         "last_kd": "distillation", "last_ce": "cross-entropy", "last_exits": "early exits"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def write_html(report: Mapping[str, Any], log: Path, heads: Path | None, to: Path) -> None:
    """Write the page of a run. Every text is escaped but the pictures, whose own text matplotlib escapes.

    Args:
        report: the content of report.json, see `report.build_report`.
        log: train.log.jsonl.
        heads: heads.json, where attention maps were distilled.
        to: the page; a recipe.yaml beside it is shown in it.

    Raises:
        ArtifactError: the log or the heads cannot be read.
    """
    beside = to.with_name("recipe.yaml")
    recipe = beside.read_text("utf-8") if beside.is_file() else ""
    tables = (_scores(report), _forgetting(report), _stages(report))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=_title(recipe),
        subtitle=_subtitle(report),
        facts=_facts(report),
        tables=[table for table in tables if table is not None],
        curves=Markup(curves_svg(read_log(log))),
        heads=None if heads is None else Markup(_heads_svg(heads)),
        recipe=recipe,
    )
    to.write_text(page, "utf-8")


def _title(recipe: str) -> str:
    named = yaml.safe_load(recipe) or {}
    teacher, student = (Path(named[role]).name if named.get(role) else None for role in ("teacher", "student"))
    if student is None:
        return "Distillation"
    return f"{teacher} teaches {student}" if teacher else f"{student} teaches itself"


def _subtitle(report: Mapping[str, Any]) -> str:
    student = report.get("models", {}).get("student")
    if student is None:
        return ""
    size = f"{student['parameters'] / 1e6:,.2f} M parameters"
    score = student.get("accuracy", {}).get("all")
    return size if score is None else f"{size}, {_percent(score)} of {report['test_items']} unseen questions right"


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Names and values, those that the report has."""
    facts = {
        "Made by": report.get("made_by"),
        "Seed": report.get("seed"),
        "Stages": ", ".join(f"{name} ({stage['steps']} steps)" for name, stage in report.get("stages", {}).items()),
        "Training": _duration(report["train_seconds"]) if "train_seconds" in report else None,
        "Test questions": report.get("test_items"),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _scores(report: Mapping[str, Any]) -> Table | None:
    """Exact match of every model by kind of question, then losses and sizes."""
    models: Mapping[str, Mapping[str, Any]] = report.get("models", {})
    if not models:
        return None
    kinds = dict.fromkeys(kind for score in models.values() for kind in score.get("accuracy", {}))
    rows = [[kind, *(_percent(score.get("accuracy", {}).get(kind)) for score in models.values())] for kind in kinds]
    rows.append(["held-out loss, nats a token", *(_number(s.get("held_out_loss")) for s in models.values())])
    rows.append(["parameters", *(f"{score['parameters']:,}" for score in models.values())])
    return Table("Scores", ["exact match", *(NAMES.get(name, name) for name in models)], rows)


def _forgetting(report: Mapping[str, Any]) -> Table | None:
    """The general set before and after: accuracy by kind, and the loss with its rise."""
    general = report.get("general")
    if not general:
        return None
    before, after = general.get("before", {}), general.get("after", {})
    kinds = dict.fromkeys([*before.get("accuracy", {}), *after.get("accuracy", {})])
    rows = []
    for kind in kinds:
        old, new = (side.get("accuracy", {}).get(kind) for side in (before, after))
        change = "" if old is None or new is None else f"{100 * (new - old):+.1f} points"
        rows.append([kind, _percent(old), _percent(new), change])
    old, new = before.get("loss"), after.get("loss")
    rise = "" if not old or new is None else f"{100 * (new / old - 1):+.1f} %"
    rows.append(["loss, nats a token", _number(old), _number(new), rise])
    note = "The general set is what the student knew before. A loss that rose is forgetting."
    return Table("What was forgotten", ["general set", "before", "after", "change"], rows, note)


def _stages(report: Mapping[str, Any]) -> Table | None:
    stages: Mapping[str, Mapping[str, float]] = report.get("stages", {})
    if not stages:
        return None
    parts = [part for part in PARTS if any(part in stage for stage in stages.values())]
    rows = [
        [name, *(str(stage[p]) if p == "steps" else _number(stage.get(p)) for p in parts)]
        for name, stage in stages.items()
    ]
    note = "Parts are those of the last step."
    return Table("Stages", ["stage", *(PARTS[part] for part in parts)], rows, note)


def _heads_svg(heads: Path) -> str:
    with tempfile.TemporaryDirectory() as folder, mpl.rc_context(STYLE):
        picture = Path(folder) / "heads.svg"
        plot_heads(read_heads(heads), picture)
        return inline_svg(picture.read_text("utf-8"), "heads")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
