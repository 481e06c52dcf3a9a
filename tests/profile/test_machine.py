"""The machine's description from the files that Linux and L4T keep."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import pytest

from orin_kit.profile import machine
from orin_kit.profile.machine import read_machine

TEGRA = "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n# KERNEL_VARIANT: oot\n"
CPUINFO = "processor\t: 0\nmodel name\t: A  CPU @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: A  CPU @ 2 GHz\n"


def test_this_machine() -> None:
    found = read_machine("1.2.3")
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.python == platform.python_version()
    assert found.onnxruntime == "1.2.3"
    assert found.cpu
    assert 0 <= found.busy_cores <= (psutil.cpu_count() or 1)


def test_a_jetson_is_its_board_and_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tegra").write_text(TEGRA)
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(machine, "TEGRA_RELEASE", tmp_path / "tegra")
    monkeypatch.setattr(machine, "DEVICE_TREE_MODEL", tmp_path / "model")
    found = read_machine("")
    assert found.cpu == "NVIDIA Jetson AGX Orin Developer Kit"
    assert found.jetson == "R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64"
    assert "not of an Orin" not in found.note
    assert found.jetson in found.note


def test_another_machine_is_its_processor_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    for name in ("TEGRA_RELEASE", "DEVICE_TREE_MODEL"):
        monkeypatch.setattr(machine, name, tmp_path / "none")
    found = read_machine("")
    assert (found.cpu, found.jetson) == ("A CPU @ 2 GHz", None)
    assert f"THIS machine (A CPU @ 2 GHz, {found.cores} cores), not of an Orin" in found.note


@pytest.mark.parametrize(("busy_cores", "busy"), [(0.0, False), (0.25, False), (0.5, True), (11.0, True)])
def test_a_busy_machine_is_told(busy_cores: float, busy: bool) -> None:
    assert read_machine("").model_copy(update={"busy_cores": busy_cores}).busy is busy
