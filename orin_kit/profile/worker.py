"""The measuring process: `python -m orin_kit.profile.worker`, a job as JSON on stdin, events as JSON lines on stdout.

Every point of a profile gets a process of its own, so its load time and its peak memory are of that point alone.
Events: `{"answer": 1}` after every answer, and last `{"result": {...}}` or `{"error": {"what", "mend", "exit_code"}}`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from orin_kit.errors import OrinKitError
from orin_kit.profile.latency import Workload, measure
from orin_kit.profile.memory import peak_bytes, resident_bytes


@dataclass(frozen=True)
class Job:
    """One point to measure: how to open the artifact (see `open_runtime`), and the workload's fields."""

    directory: str
    max_len: int
    threads: int | None
    provider: str
    workload: dict[str, int]


def run(job: Job, events: TextIO) -> dict[str, Any]:
    """Open the artifact, measure, and return times in seconds and memory in bytes."""
    # The baseline is numpy and onnxruntime alone, so the import stands here and not above.
    import onnxruntime

    baseline = resident_bytes()
    from orin_kit.runtime.runtime import open_runtime

    work = Workload(**job.workload)
    runtime = open_runtime(
        job.directory,
        max_len=job.max_len,
        batch_size=work.batch_size,
        threads=job.threads,
        provider=job.provider,
    )
    loaded, load_peak = resident_bytes(), peak_bytes()
    backend = runtime.backend
    vocab_size = min(len(runtime.tokenizer), backend.vocab_size)
    timings = measure(backend, work, vocab_size, lambda: _say(events, {"answer": 1}))
    of_backend = backend.memory()
    return {
        "backend": backend.name,
        "onnxruntime": onnxruntime.__version__,
        "load_s": runtime.load_seconds,
        "timings": asdict(timings),
        "memory": {
            "weights": of_backend["weights"],
            "kv_cache": of_backend["kv_cache"],
            "baseline": baseline,
            "loaded": loaded,
            "load_peak": load_peak,
            "peak": max(load_peak, peak_bytes()),
        },
    }


def main() -> None:
    """Read a job, say what happens to it."""
    # Whatever a library prints goes to stderr; stdout is for events.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as events:
        os.dup2(2, 1)
        job = Job(**json.load(sys.stdin))
        try:
            _say(events, {"result": run(job, events)})
        except OrinKitError as error:
            _say(events, {"error": {"what": error.what, "mend": error.mend, "exit_code": error.exit_code}})


def _say(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    main()
