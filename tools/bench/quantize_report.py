"""The tables of `quantize_peers.py`, on the terminal and in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

COLUMNS = {  # key: heading, how to write a value
    "perplexity": ("perplexity", "{:.4f}"),
    "divergence": ("KL to fp16, 1e-3 nats", "{:.3f}"),
    "agreement": ("same token, %", "{:.2f}"),
    "exact_match": ("exact match, %", "{:.1f}"),
    "seconds": ("seconds", "{:.0f}"),
}
UNITS = {"divergence": 1e3, "agreement": 100, "exact_match": 100}


def cells(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """A line of a table: the mean over seeds, with the standard deviation where there are several."""
    found = []
    for key in keys:
        values = [row[key] * UNITS.get(key, 1) for row in rows]
        _, form = COLUMNS[key]
        text = form.format(statistics.mean(values))
        if len(values) > 1 and key != "seconds":
            text += f" ± {form.format(statistics.stdev(values))}"
        found.append(text)
    return found


def by_model(report: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows of each case of each model, in the order they were measured."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in report["results"]:
        found.setdefault(row["model"], {}).setdefault(row["case"], []).append(row)
    return found


def _keys(cases: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [key for key in COLUMNS if all(key in row for rows in cases.values() for row in rows)]


def console_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for model, cases in by_model(report).items():
        keys = _keys(cases)
        table = Table("case", title=model)
        for key in keys:
            table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
        for case, rows in cases.items():
            table.add_row(case, *cells(rows, keys))
        Console(width=140).print(table)


def markdown(report: dict[str, Any]) -> str:
    parts = []
    for model, cases in by_model(report).items():
        keys = _keys(cases)
        head = ["case", *(COLUMNS[key][0] for key in keys)]
        lines = [f"### {model}", "", _line(head), _line(["---"] * len(head))]
        parts.append("\n".join([*lines, *(_line([case, *cells(rows, keys)]) for case, rows in cases.items())]))
    return "\n\n".join(parts) + "\n"


def _line(cells_of_it: Sequence[str]) -> str:
    return "| " + " | ".join(cells_of_it) + " |"
