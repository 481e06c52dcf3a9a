"""Time and memory of one distillation loss at a real vocabulary: orin-kit's chunked one and one over whole logits.

    python tools/bench/logits_kd.py --json logits-kd.json

Each case runs in a fresh process, the cases take turns, and the process reports its own peak. "Naive" is the loss as it
is usually written: both models' logits whole, in fp32, then `cross_entropy` and `kl_div`. Both get the same random
hidden states and heads. The head's gradient, which any method must make, is part of both peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CASES = ("orin-kit", "naive")
MIB = 2**20


class Peak:
    """Resident memory at its highest since this was made, above what was resident then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        self.before = _status("VmRSS")

    def mib(self) -> float:
        return _status("VmHWM") - self.before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def in_turns(
    script: str,
    cases: Sequence[str],
    repeats: int,
    threads: int,
    arguments: Sequence[str],
    python: str = sys.executable,
) -> dict[str, list[dict[str, Any]]]:
    """Run every case `repeats` times, each in its own process, one after the other; what each printed last, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for repeat in range(repeats):
        for case in cases:
            print(f"[{repeat + 1}/{repeats}] {case}", file=sys.stderr, flush=True)
            command = [python, script, "--case", case, *arguments]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results[case].append(json.loads(done.stdout.splitlines()[-1]))
    return results


class Clock:
    """Seconds of each step. Where the machine is shared the processor's say more: with one thread they are the work."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the runs: of the peak, and of the steps after the first, which pays for first touches."""
    later = {clock: [seconds for run in runs for seconds in run[clock][1:] or run[clock]] for clock in ("cpu", "wall")}
    peak = statistics.median(run["peak_mib"] for run in runs)
    return {"peak_mib": peak, **{clock: statistics.median(seconds) for clock, seconds in later.items()}}


def run_case(options: argparse.Namespace) -> None:
    import torch

    from orin_kit.distill.logits import Dense, task_loss

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def dense(vocab: int, width: int, dtype: torch.dtype) -> Dense:
        hidden = torch.empty(options.positions, width, dtype=dtype).normal_()
        return Dense(hidden, torch.empty(vocab, width, dtype=dtype).normal_(std=2 / width**0.5))

    student = dense(options.vocab, options.hidden, getattr(torch, options.student_dtype))
    teacher = dense(options.teacher_vocab, options.teacher_hidden, getattr(torch, options.teacher_dtype))
    labels = torch.randint(0, options.vocab, (options.positions,))
    student.hidden.requires_grad_()
    student.weight.requires_grad_()

    def ours() -> torch.Tensor:
        return task_loss(
            student,
            labels,
            teacher,
            teacher_weight=options.teacher_weight,
            temperature=options.temperature,
            chunk=options.chunk,
        ).loss

    def naive() -> torch.Tensor:
        logits = (student.hidden @ student.weight.t()).float()
        with torch.no_grad():
            target = (teacher.hidden @ teacher.weight.t()).float()
        ce = torch.nn.functional.cross_entropy(logits, labels)
        shared = min(options.vocab, options.teacher_vocab)
        log_q = (logits[:, :shared] / options.temperature).log_softmax(-1)
        log_p = (target[:, :shared] / options.temperature).log_softmax(-1)
        kd = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        weight: float = options.teacher_weight
        return (1 - weight) * ce + weight * float(options.temperature) ** 2 * kd

    peak, clock, loss = Peak(), Clock(), torch.zeros(())
    for _ in range(options.steps):
        student.hidden.grad = student.weight.grad = None
        clock.start()
        loss = ours() if options.case == "orin-kit" else naive()
        loss.backward()  # type: ignore[no-untyped-call]
        clock.stop()
    found = {
        "baseline_mib": peak.before,
        "peak_mib": peak.mib(),
        "cpu": clock.cpu,
        "wall": clock.wall,
        "loss": loss.item(),
    }
    torch.save((loss.detach(), student.hidden.grad, student.weight.grad), options.kept / f"{options.case}.pt")
    print(json.dumps(found))


def differences(kept: Path) -> dict[str, float]:
    """max |ours - naive| / max |naive| of the loss and of both gradients."""
    import torch

    ours, naive = (torch.load(kept / f"{case}.pt", weights_only=True, mmap=True) for case in CASES)
    names = ("loss", "hidden_gradient", "weight_gradient")
    return {
        name: float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for name, a, b in zip(names, ours, naive, strict=True)
    }


def show(results: dict[str, list[dict[str, Any]]], apart: dict[str, float], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.positions:,} positions, vocabulary {options.vocab:,} under {options.teacher_vocab:,}, widths "
        f"{options.hidden} ({options.student_dtype}) and {options.teacher_hidden} ({options.teacher_dtype})"
    )
    for column in ("loss", "peak above start, MiB", "CPU s a step", "wall s a step"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    rows = {case: summary(runs) for case, runs in results.items()}
    for case, row in rows.items():
        table.add_row(case, f"{row['peak_mib']:,.0f}", f"{row['cpu']:.2f}", f"{row['wall']:.2f}")
    ratios = (rows["naive"][key] / rows["orin-kit"][key] for key in ("peak_mib", "cpu", "wall"))
    table.add_row("naive / orin-kit", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)
    print("largest relative difference:", ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"positions": 2048, "vocab": 151_936, "teacher_vocab": 152_064, "hidden": 1536, "teacher_hidden": 3584}
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--student-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--teacher-dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--teacher-weight", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--chunk", type=int, help="positions at a time; by default for 64 MB of logits")
    parser.add_argument("--steps", type=int, default=3, help="in each process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options)
        return
    with tempfile.TemporaryDirectory() as kept:
        results = in_turns(__file__, CASES, options.repeats, options.threads, [*sys.argv[1:], "--kept", kept])
        apart = differences(Path(kept))
    show(results, apart, options)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "case", "kept")}
        options.json.write_text(
            json.dumps({"settings": settings, "runs": results, "differences": apart}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
