"""What a profile says: the report as data (`report.json`) and as a table on the terminal."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, Field
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orin_kit.profile.machine import Machine
from orin_kit.profile.points import Point
from orin_kit.profile.targets import GB, Targets, Verdict, judged

SCHEMA: Final = "orin-kit/profile/1"


class Model(BaseModel):
    """What was profiled: the artifact's directory, its manifest's sha256 and what that says of the model."""

    name: str
    directory: str
    sha256: str
    precision: str
    activations: str
    parameters: int | None
    weights_bytes: int


class Method(BaseModel):
    """How it was measured: `warmup` answers uncounted, then `repeats` answers of `new_tokens`, at every point."""

    new_tokens: int
    warmup: int
    repeats: int
    seed: int
    max_len: int
    threads: int | None
    provider: str

    @property
    def text(self) -> str:
        return (
            f"{self.warmup} warm-up and {self.repeats} counted answers of {self.new_tokens} tokens at every point, "
            f"each to a fresh random prompt (seed {self.seed}), greedy, never stopped early; cache of {self.max_len} "
            "tokens a row; every point in a process of its own"
        )


class Report(BaseModel):
    """A profile; `report.json` is this, field by field."""

    schema_: Literal["orin-kit/profile/1"] = Field(default=SCHEMA, alias="schema")
    model: Model
    backend: str
    method: Method
    machine: Machine
    points: list[Point]
    targets: Targets
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def judged(self) -> Point:
        """The point that the targets are judged at."""
        return judged(self.points, self.targets)

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing a figure."""
        notes = [self.machine.note]
        if self.machine.busy:
            machine = self.machine
            notes.append(
                f"Other work kept {machine.busy_cores:.1f} of {machine.cores} cores busy just before the start, so "
                "times are longer than this machine can do."
            )
        notes += sorted({verdict.note for verdict in self.verdicts if verdict.note})
        return notes

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


# Field of Memory -> its name for people.
MEMORY_KINDS = {
    "weights": "weights (files)",
    "kv_cache": "KV cache (reserved)",
    "baseline": "process before loading",
    "loaded": "process after loading",
    "peak": "process peak",
}
# Column -> cell; the terminal and the HTML report show the same ones.
COLUMNS: dict[str, str] = {
    "batch": "{p.batch_size}",
    "prompt": "{p.prompt_length}",
    "TTFT ms\nmedian": "{p.ttft_ms.median:.1f}",
    "TTFT ms\np95": "{p.ttft_ms.p95:.1f}",
    "TPOT ms\nmedian": "{p.tpot_ms.median:.2f}",
    "TPOT ms\np95": "{p.tpot_ms.p95:.2f}",
    "prefill\ntok/s": "{p.prefill_tokens_per_s:.0f}",
    "decode\ntok/s": "{p.decode_tokens_per_s:.1f}",
    "load\ns": "{p.load_s:.2f}",
    "peak\nMB": "{peak:.0f}",
}


def cells(point: Point) -> list[str]:
    """A point's row of the table, in the order of `COLUMNS`."""
    return [cell.format(p=point, peak=point.memory.peak / 1e6) for cell in COLUMNS.values()]


def size(count: int) -> str:
    """Bytes in decimal units: "820 MB", "1.10 GB"."""
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / 1e6:.3g} MB"


def figures(verdict: Verdict) -> tuple[str, str]:
    """The measured value and the limit with their unit, in digits enough to tell them apart."""
    digits = 3 if verdict.unit == "GB" else 1
    while digits < 9 and verdict.measured != verdict.limit == round(verdict.measured, digits):
        digits += 1
    return f"{verdict.measured:.{digits}f} {verdict.unit}", f"{verdict.limit:g} {verdict.unit}"


def print_report(report: Report, console: Console) -> None:
    """The table, the verdicts and what to know of them."""
    console.print(Group(*_parts(report)))


def _parts(report: Report) -> list[RenderableType]:
    model, parameters = report.model, ""
    if model.parameters:
        parameters = f", {model.parameters / 1e6:.4g} M parameters"
    title = f"{model.name}: {model.precision}{parameters}, {size(model.weights_bytes)} on disk; {report.backend}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for point in report.points:
        table.add_row(*cells(point))
    kinds = ", ".join(f"{name} {size(getattr(report.judged.memory, kind))}" for kind, name in MEMORY_KINDS.items())
    parts: list[RenderableType] = [Text(title, style="bold"), table, Text(f"Memory at {report.judged.place}: {kinds}.")]
    for verdict in report.verdicts:
        sign, style = ("pass", "green") if verdict.passed else ("MISSED", "bold red")
        relation = "within" if verdict.passed else "above"
        measured, limit = figures(verdict)
        said = f"{verdict.label} {measured}, {relation} {limit}"
        where = f" (batch {verdict.batch_size}, prompt {verdict.prompt_length})"
        parts.append(Text.assemble((f"{sign:>6}  ", style), said, (where, "dim")))
    parts.append(Text(f"{report.method.text}.", style="dim"))
    parts += [Text(note, style="yellow") for note in report.notes]
    return parts
