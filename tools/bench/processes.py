"""Programs that the benchmarks start: how long each took, and the most memory it held."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def environment(threads: int) -> dict[str, str]:
    """Ours, with everybody's thread count set and the network left alone."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **counts, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(command: Sequence[str | Path], env: Mapping[str, str], log: Path) -> dict[str, float]:
    """Run a program to its end, what it says going to `log`.

    Returns:
        Seconds, and `peak_bytes`, its largest resident set as the kernel reports it (wait4(2)). The kernel starts that
        count with what this process holds, so keep it small.

    Raises:
        SystemExit: it failed; with the end of the log.
    """
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen([str(part) for part in command], env=env, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text("utf-8", "replace")[-2000:]
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{said}")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
