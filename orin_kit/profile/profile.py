"""`orin-kit profile`: latency, throughput and memory of an artifact, judged against targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orin_kit.errors import UserError
from orin_kit.manifest import Manifest, check_free, read_manifest, sha256_input, write_artifact
from orin_kit.profile.html import render_html
from orin_kit.profile.latency import Timings, Workload
from orin_kit.profile.launch import run_worker
from orin_kit.profile.machine import read_machine
from orin_kit.profile.points import Memory, point
from orin_kit.profile.report import Method, Model, Report, print_report
from orin_kit.profile.targets import load_targets, verdicts
from orin_kit.profile.worker import Job
from orin_kit.runtime.runtime import DEFAULT_MAX_LEN

LEAST = {"warmup": 0, "new_tokens": 2}  # the first new token comes from the prefill, only the others are decoded


def profile(
    artifact: str | Path,
    out: str | Path,
    *,
    prompt_lengths: Sequence[int] = (32, 128, 512),
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1,),
    warmup: int = 2,
    repeats: int = 10,
    threads: int | None = None,
    provider: str = "cpu",
    max_len: int | None = None,
    targets: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    show: bool = True,
) -> Report:
    """Measure every batch size with every prompt length, each in a fresh process, and judge the targets.

    Args:
        artifact: an ONNX artifact.
        out: the artifact to write (kind `profile`): `report.json`, `report.html`.
        prompt_lengths: tokens.
        new_tokens: tokens of every answer, >= 2: one from the prefill, the others decoded.
        batch_sizes: rows answered at once.
        warmup: answers before those that count.
        repeats: answers that count.
        threads: CPU threads; all the process may use when None.
        provider: "cpu" or "cuda".
        max_len: tokens a row of the cache can hold; by default the runtime's, more where the points need more.
        targets: YAML file of `Targets`; the defaults when None.
        overwrite: replace an existing artifact.
        seed: of the prompts.
        show: print the table on stdout.

    Raises:
        ArtifactError: no whole ONNX artifact.
        UserError: a bad targets file, a number that makes no sense, or a point that does not fit the context.
    """
    artifact = Path(artifact)
    check_free(out, overwrite=overwrite)
    manifest = read_manifest(artifact, "onnx")
    wanted = load_targets(targets)
    counts = {"prompt_lengths": prompt_lengths, "batch_sizes": batch_sizes, "repeats": [repeats], "warmup": [warmup]}
    for name, values in {**counts, "new_tokens": [new_tokens]}.items():
        least = LEAST.get(name, 1)
        if not values or min(values) < least:
            raise UserError(f"{name} is {list(values)}", mend=f"give whole numbers of at least {least}")
    works = [
        Workload(batch_size, length, new_tokens, warmup, repeats, seed)
        for batch_size, length in itertools.product(sorted(set(batch_sizes)), sorted(set(prompt_lengths)))
    ]
    max_len = _context(works, max_len, int(manifest.settings["max_len"]), artifact)
    jobs = [Job(str(artifact), max_len, threads, provider, asdict(work)) for work in works]
    method = Method(
        new_tokens=new_tokens,
        warmup=warmup,
        repeats=repeats,
        seed=seed,
        max_len=max_len,
        threads=threads,
        provider=provider,
    )
    machine = read_machine(onnxruntime="")  # before the start: what is busy now is not us
    measured = _measure(jobs, works)
    machine.onnxruntime = measured[0]["onnxruntime"]
    points = [
        point(work, Timings(**one["timings"]), one["load_s"], Memory(**one["memory"]))
        for work, one in zip(works, measured, strict=True)
    ]
    report = Report(
        model=_model(artifact, manifest, points[0].memory.weights),
        backend=measured[0]["backend"],
        method=method,
        machine=machine,
        points=points,
        targets=wanted,
        verdicts=verdicts(points, wanted),
    )
    _write(report, artifact, out, overwrite)
    if show:
        print_report(report, Console())
    return report


def _write(report: Report, artifact: Path, out: str | Path, overwrite: bool) -> None:
    settings = report.method.model_dump() | {"targets": report.targets.model_dump()}
    with write_artifact(out, "profile", inputs={"model": artifact}, settings=settings, overwrite=overwrite) as writer:
        (writer.directory / "report.json").write_text(report.to_json(), "utf-8")
        (writer.directory / "report.html").write_text(render_html(report), "utf-8")
        writer.results |= {"passed": report.passed, "verdicts": [v.model_dump() for v in report.verdicts]}


def _measure(jobs: Sequence[Job], works: Sequence[Workload]) -> list[dict[str, Any]]:
    """What each worker returned, one worker at a time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("profile", total=sum(work.warmup + work.repeats for work in works))
        advance: Callable[[], None] = lambda: bar.advance(task)  # noqa: E731
        measured = []
        for job, work in zip(jobs, works, strict=True):
            bar.update(task, description=f"profile batch {work.batch_size}, prompt {work.prompt_length}")
            measured.append(run_worker(job, advance))
    return measured


def _context(works: Sequence[Workload], max_len: int | None, limit: int, artifact: Path) -> int:
    """Tokens a row of the cache shall hold, the same at all points, so that their memory can be compared."""
    longest = max(works, key=lambda work: work.context)
    room, whose = (limit, f"the longest context of {artifact}") if max_len is None else (max_len, "max_len")
    if longest.context > room:
        what = (
            f"a prompt of {longest.prompt_length} tokens and {longest.new_tokens} new ones need a context of "
            f"{longest.context}, more than {whose}, {room}"
        )
        raise UserError(what, mend=f"use prompts of at most {max(0, room - longest.new_tokens + 1)} tokens")
    return max_len or min(limit, max(DEFAULT_MAX_LEN, longest.context))


def _model(artifact: Path, manifest: Manifest, weights_bytes: int) -> Model:
    return Model(
        name=artifact.resolve().name,
        directory=str(artifact.resolve()),
        sha256=sha256_input(artifact),
        precision=str(manifest.settings.get("precision", "unknown")),
        activations=str(manifest.settings.get("activations", "unknown")),
        parameters=manifest.results.get("parameters"),
        weights_bytes=weights_bytes,
    )
