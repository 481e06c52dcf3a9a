"""Resident memory of this process, now and at its highest."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that was ever resident.

    Linux keeps it by address space (`VmHWM`, proc(5)), so it starts afresh with the program; `ru_maxrss`, used
    elsewhere, can start from what the parent process held when it forked. `VmHWM` lags behind by some pages a core
    (the kernel counts in batches), so it is never taken to be less than what is resident now.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return max(int(line.split()[1]) * 1024, resident_bytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
