"""`orin-kit demo`: the whole chain on the demo family, from a teacher and a student to a table and a chat."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orin_kit.data.tasks import distinct
from orin_kit.distill import Recipe, compare
from orin_kit.errors import UserError
from orin_kit.evaluate.exact_match import exact_match
from orin_kit.evaluate.perplexity import perplexity
from orin_kit.export.export import export
from orin_kit.manifest import made_by
from orin_kit.profile.profile import profile
from orin_kit.profile.report import Report
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.runtime import open_runtime
from orin_kit.shipped import calibration

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Length:
    """How much of everything a demo does: recipe overrides, calibration rows, test questions, profiled answers."""

    overrides: tuple[str, ...]
    samples: int
    questions: int
    prompt_lengths: tuple[int, ...]
    repeats: int


FULL = Length((), samples=128, questions=600, prompt_lengths=(32, 128), repeats=10)
# Too short to learn much: it shows, and tests, that the chain holds together.
FAST = Length(
    (
        "stages.features.steps=3",
        "stages.attention.steps=3",
        "stages.task.steps=6",
        "data.tasks.count=60",
        "data.questions.tasks=60",
        "watched_items=24",
        "test_items=24",
    ),
    samples=8,
    questions=24,
    prompt_lengths=(32,),
    repeats=3,
)


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        model: its name.
        onnx: the directory to run it from.
        parameters, onnx_bytes: its size.
        accuracy: exact match on unseen questions, a share.
        perplexity: of the reference answers' tokens.
        ttft_ms, tpot_ms: medians, at `prompt_length` tokens.
        peak_bytes: of the whole process that ran it.
    """

    model: str
    onnx: str
    parameters: int
    onnx_bytes: int
    accuracy: float
    perplexity: float
    prompt_length: int
    ttft_ms: float
    tpot_ms: float
    peak_bytes: int


def demo(out: str | Path, *, fast: bool = False, overwrite: bool = False) -> list[Row]:
    """Distil, quantize, export, profile and compare the demo family.

    Args:
        out: `students/plain` and `students/distilled`, `distilled-int4`, of each model `NAME-onnx` and `NAME-profile`,
            and summary.json.
        fast: train too little to learn much, for tests.
        overwrite: replace what `out` holds; students that are complete, of the same recipe, are kept.

    Returns:
        The rows of the table that is printed.

    Raises:
        UserError: `out` exists.
    """
    out, home = Path(out), calibration()
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists", mend="choose another --out or add --overwrite")
    length = FAST if fast else FULL
    console = Console()
    recipe = Recipe.load(home / "recipes" / "demo.yaml", overrides=list(length.overrides))

    console.rule("1/4  distil: a student without a teacher, then one with it, scored on the same unseen questions")
    students = out / "students"
    compare(recipe, students, seeds=1, overwrite=overwrite)

    console.rule("2/4  quantize the distilled student to INT4")
    int4 = out / "distilled-int4"
    quantize(students / "distilled", int4, samples=length.samples, overwrite=overwrite)

    console.rule("3/4  export to ONNX")
    assert recipe.teacher is not None
    checkpoints = {
        "teacher": recipe.teacher,
        "plain student": students / "plain",
        "distilled": students / "distilled",
        "distilled INT4": int4,
    }
    onnx = {name: out / f"{name.lower().replace(' ', '-')}-onnx" for name in checkpoints}
    for name, checkpoint in checkpoints.items():
        export(checkpoint, onnx[name], overwrite=overwrite, progress=False)
        console.print(f"{name}: {onnx[name]}")

    console.rule("4/4  profile and score")
    rows = [_row(name, directory, length, overwrite=overwrite) for name, directory in onnx.items()]
    summary = {"made_by": made_by(), "fast": fast, "questions": length.questions, "rows": [asdict(r) for r in rows]}
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    console.print(_table(rows, length))
    console.print(
        f"The profile to print or mail: {_profile_of(onnx['distilled INT4']) / 'report.html'}", soft_wrap=True
    )
    program = sys.argv[0] if Path(sys.argv[0]).name == "orin-kit" else "orin-kit"
    console.print(f"Chat with the result: [bold]{program} chat {onnx['distilled INT4']}[/]", soft_wrap=True)
    return rows


def _row(name: str, onnx: Path, length: Length, *, overwrite: bool) -> Row:
    report = profile(
        onnx,
        _profile_of(onnx),
        prompt_lengths=length.prompt_lengths,
        repeats=length.repeats,
        overwrite=overwrite,
        show=False,
    )
    point = report.points[-1]
    runtime = open_runtime(onnx, max_len=256, batch_size=1)
    questions = distinct("test", seed=1, count=length.questions)
    return Row(
        model=name,
        onnx=str(onnx),
        parameters=int(runtime.manifest.results["parameters"]),
        onnx_bytes=int(runtime.manifest.results["model_bytes"]),
        accuracy=exact_match(runtime, questions, batch_size=32)["all"],
        perplexity=perplexity(runtime, [task.chat() for task in questions]),
        prompt_length=point.prompt_length,
        **_latency(report),
    )


def _latency(report: Report) -> dict[str, Any]:
    point = report.points[-1]
    return {
        "ttft_ms": point.ttft_ms.median,
        "tpot_ms": point.tpot_ms.median,
        "peak_bytes": point.memory.peak,
    }


def _profile_of(onnx: Path) -> Path:
    return onnx.with_name(onnx.name.replace("-onnx", "-profile"))


def _table(rows: list[Row], length: Length) -> Table:
    title = f"{length.questions} unseen questions; {rows[0].prompt_length} prompt tokens, on this machine's CPU"
    table = Table("model", title=title)
    for column in ("params", "size", "exact", "ppl", "TTFT", "TPOT", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            f"{row.parameters / 1e6:.2f}M",
            f"{row.onnx_bytes / 1e6:.1f}MB",
            f"{row.accuracy:.1%}",
            f"{row.perplexity:.3f}",
            f"{row.ttft_ms:.1f}ms",
            f"{row.tpot_ms:.2f}ms",
            f"{row.peak_bytes / 1e6:.0f}MB",
        )
    return table
