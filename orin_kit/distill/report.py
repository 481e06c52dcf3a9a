"""What a run tells: report.json, and the tables on the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from orin_kit.manifest import made_by


def stage_summaries(log: Path) -> dict[str, dict[str, float]]:
    """For each stage of a train log: steps, first and last loss, and the last of each part of the loss."""
    stages: dict[str, dict[str, float]] = {}
    for text in log.read_text("utf-8").splitlines():
        line = json.loads(text)
        summary = stages.setdefault(line["stage"], {"steps": 0, "first_loss": line["loss"]})
        summary |= {"steps": line["step"], "last_loss": line["loss"]}
        summary |= {f"last_{part}": line[part] for part in ("alignment", "kd", "ce") if part in line}
    return stages


def build_report(
    scores: Mapping[str, Mapping[str, Any]], log: Path, *, seed: int, seconds: float, items: int
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        scores: by model ("teacher", "start" for the student before, "student" for it now), see `run.score`.
        log: train.log.jsonl.
        seed: the recipe's.
        seconds: spent training.
        items: number of test questions.
    """
    stages = stage_summaries(log)
    general = {
        when: {"accuracy": scores[model]["general_accuracy"], "loss": scores[model]["general_loss"]}
        for when, model in (("before", "start"), ("after", "student"))
        if "general_loss" in scores.get(model, {})
    }
    return {
        "made_by": made_by(),
        "seed": seed,
        "test_items": items,
        "models": {name: dict(score) for name, score in scores.items()},
        "final_loss": [*stages.values()][-1]["last_loss"] if stages else None,
        "stages": stages,
        "train_seconds": round(seconds, 1),
        **({"general": general} if general else {}),
    }


def report_table(report: Mapping[str, Any]) -> Table:
    """Exact match of each model of one run, by kind of question."""
    models: dict[str, dict[str, Any]] = report["models"]
    table = Table(title=f"exact match on {report['test_items']} unseen questions")
    _columns(table, models)
    for kind in next(iter(models.values()))["accuracy"]:
        table.add_row(kind, *(f"{100 * score['accuracy'][kind]:.1f} %" for score in models.values()))
    table.add_section()
    losses = (score.get("held_out_loss") for score in models.values())
    table.add_row("held-out loss", *("" if loss is None else f"{loss:.4f}" for loss in losses))
    if "general_loss" in models["student"]:
        of_general = [score.get("general_loss") for score in models.values()]
        table.add_row("general loss", *("" if loss is None else f"{loss:.4f}" for loss in of_general))
        table.add_row("general, all", *(_general(score) for score in models.values()))
    table.add_row("parameters", *(f"{score['parameters'] / 1e6:.2f} M" for score in models.values()))
    return table


def _general(score: Mapping[str, Any]) -> str:
    return f"{100 * score['general_accuracy']['all']:.1f} %" if "general_accuracy" in score else ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def compare_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """For each model and kind of question, mean and standard deviation over the seeds.

    Args:
        runs: one a seed, with `models` by name as in report.json.
    """
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name in runs[0]["models"]:
        of_model = [run["models"][name]["accuracy"] for run in runs]
        summary[name] = {kind: spread([accuracy[kind] for accuracy in of_model]) for kind in of_model[0]}
    gains = [r["models"]["distilled"]["accuracy"]["all"] - r["models"]["plain"]["accuracy"]["all"] for r in runs]
    summary["gain"] = {"all": spread(gains)}
    return summary


def compare_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int, items: int) -> Table:
    models = [name for name in summary if name != "gain"]
    table = Table(title=f"exact match on {items} unseen questions, %, mean ± standard deviation over {seeds} seeds")
    _columns(table, models)
    for kind in summary[models[0]]:
        table.add_row(kind, *(_percent(summary[name][kind]) for name in models))
    table.caption = f"distilled minus plain, seed by seed: {_percent(summary['gain']['all'])} points"
    return table


def _columns(table: Table, models: Iterable[str]) -> None:
    table.add_column()
    for name in models:
        table.add_column(name, justify="right")


def _percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"
