"""The machine that figures belong to."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import psutil
from pydantic import BaseModel

from orin_kit.manifest import made_by

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
CPUINFO = Path("/proc/cpuinfo")
OS_RELEASE = Path("/etc/os-release")
WATCH_S = 0.3


class Machine(BaseModel):
    """Where and with what a profile was made.

    Attributes:
        cpu: the processor's name; on a Jetson the board's.
        cores: logical cores that the process may use.
        memory_bytes: installed.
        jetson: first line of `/etc/nv_tegra_release` (the L4T release), None on other machines.
        busy_cores: cores that anything used in the `WATCH_S` seconds before the start, so that a busy machine shows.
        date: ISO 8601, UTC.
    """

    cpu: str
    cores: int
    memory_bytes: int
    os: str
    kernel: str
    architecture: str
    jetson: str | None
    python: str
    onnxruntime: str
    orin_kit: str
    busy_cores: float
    date: str

    @property
    def busy(self) -> bool:
        """Other work took so much of the machine that the figures are worse than it can do."""
        return self.busy_cores > 0.3

    @property
    def note(self) -> str:
        """Whose figures these are, in one sentence."""
        if self.jetson:
            return f"Figures of this Jetson: {self.cpu}, {self.jetson}."
        return f"Figures of THIS machine ({self.cpu}, {self.cores} cores), not of an Orin."


def read_machine(onnxruntime: str) -> Machine:
    """Describe the running machine; watches it for `WATCH_S` seconds.

    Args:
        onnxruntime: version that the measuring process loaded.
    """
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        os=_os(),
        kernel=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        jetson=_first_line(TEGRA_RELEASE),
        python=platform.python_version(),
        onnxruntime=onnxruntime,
        orin_kit=made_by(),
        busy_cores=round(psutil.cpu_percent(WATCH_S) / 100 * (psutil.cpu_count() or 1), 2),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _cpu() -> str:
    if board := _first_line(DEVICE_TREE_MODEL):
        return board
    if CPUINFO.is_file():
        for line in CPUINFO.read_text("utf-8", "replace").splitlines():
            if line.lower().startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def _os() -> str:
    if OS_RELEASE.is_file():
        for line in OS_RELEASE.read_text("utf-8", "replace").splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip('"')
    return platform.platform(terse=True)


def _first_line(path: Path) -> str | None:
    """None when there is no such file; device-tree texts end with a NUL."""
    if not path.is_file():
        return None
    lines = path.read_text("utf-8", "replace").rstrip("\0\n").splitlines()
    return lines[0].strip("# ") if lines else ""
