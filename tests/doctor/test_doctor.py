"""The doctor's lines: a whole Orin is ready, what is missing is said with its mending, and this machine is no Orin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jetson_root import R39, cooling_device, cpu, write
from orin_kit.doctor.doctor import Check, Live, Report, ask, doctor
from orin_kit.doctor.report import print_report
from orin_kit.engine.plugin_library import VARIABLE
from orin_kit.errors import EXIT_INTERNAL

HOST_ONLY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "safetensors", "onnxruntime")


def live(**changed: Any) -> Live:
    """What a whole Orin with JetPack 6.2 answers."""
    answers: dict[str, Any] = {
        "python": (3, 10, 12),
        "cuda": {"name": "Orin", "capability": [8, 7], "cuda": [12, 6]},
        "tensorrt": {"version": "10.3.0"},
        "pycuda": {"version": ""},
        "plugins": {"path": "/opt/orin-kit/lib/liborin_plugins.so", "version": "0.1.0", "sms": ["sm_87"]},
        "onnxruntime": "1.23.2",
    }
    return Live(**(answers | changed))


def line(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def failing(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


def test_a_whole_orin_is_ready(orin: Path) -> None:
    report = doctor(orin, live())
    assert failing(report) == []
    assert report.ok
    assert line(report, "board").found == "NVIDIA Jetson AGX Orin Developer Kit"
    assert line(report, "jetpack").found == "JetPack 6.2 (L4T R36.4.3)"
    assert line(report, "gpu").found == "Orin, sm_87, driver for CUDA 12.6"
    assert line(report, "tensorrt").found == "library 10.3.0, bindings 10.3.0"
    assert line(report, "memory").found == "61.5 of 65.9 GB available, 32.9 GB swap"
    assert line(report, "power mode").found == "MAXN (mode 0)"
    assert line(report, "clocks").found == "fixed at their highest"
    assert line(report, "temperature").found == "hottest tj-thermal 48.6 °C"
    assert all(check.mend == "" for check in report.checks)


def test_jetpack_7_2_has_other_parts(orin: Path) -> None:
    (orin / "etc/nv_tegra_release").write_text(R39)
    assert failing(doctor(orin, live())) == ["python", "cuda", "tensorrt"]
    (orin / "usr/local/cuda/version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "13.2.2"}}')
    (orin / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.16.2").touch()
    report = doctor(orin, live(python=(3, 12, 3), tensorrt={"version": "10.16.2.10"}))
    assert failing(report) == []
    assert line(report, "jetpack").found == "JetPack 7.2.1 (L4T R39.2.1)"


def no_release(root: Path) -> None:
    (root / "etc/nv_tegra_release").unlink()


def old_release(root: Path) -> None:
    (root / "etc/nv_tegra_release").write_text("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref\n")


def no_cuda(root: Path) -> None:
    (root / "usr/local/cuda/version.json").unlink()


def no_tensorrt(root: Path) -> None:
    (root / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0").unlink()


def other_tensorrt(root: Path) -> None:
    (root / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.7.0").touch()


def full_memory(root: Path) -> None:
    write(root, {"proc/meminfo": "MemTotal:       64336988 kB\nMemAvailable:    1953124 kB\n"})


@pytest.mark.parametrize(
    ("damage", "answers", "name", "mend"),
    [
        (no_release, {}, "jetpack", "flash JetPack 6.2 or 7.2; in a container, mount /etc/nv_tegra_release"),
        (old_release, {}, "jetpack", "JetPack 6.2 or 7.2"),
        (None, {"python": (3, 12, 3)}, "python", "system's Python 3.10"),
        (None, {"cuda": "libcuda.so.1: cannot open"}, "gpu", "groups video and render"),
        (no_cuda, {}, "cuda", "jetson/install.sh"),
        (no_tensorrt, {}, "tensorrt", "jetson/install.sh"),
        (None, {"tensorrt": "No module named 'tensorrt'"}, "tensorrt", "--system-site-packages"),
        (None, {"tensorrt": {"version": "10.13.0"}}, "tensorrt", "pip uninstall tensorrt"),
        (other_tensorrt, {"tensorrt": {"version": "10.7.0"}}, "tensorrt", "JetPack 6.2 has TensorRT 10.3"),
        (None, {"pycuda": "No module named 'pycuda'"}, "pycuda", "jetson/install.sh"),
        (None, {"plugins": "no liborin_plugins.so here"}, "plugins", "ORIN_KIT_PLUGINS"),
        (None, {"plugins": {"path": "x.so", "version": "0.1.0", "sms": ["sm_80"]}}, "plugins", "ARCHITECTURES=87"),
        (full_memory, {}, "memory", "2 GB are needed"),
    ],
)
def test_what_is_needed(
    orin: Path, damage: Callable[[Path], None] | None, answers: dict[str, Any], name: str, mend: str
) -> None:
    if damage:
        damage(orin)
    report = doctor(orin, live(**answers))
    assert failing(report) == [name]
    assert not report.ok
    assert mend in line(report, name).mend


def test_what_only_costs_speed(orin: Path) -> None:
    write(orin, {"var/lib/nvpmodel/status": "pmode:0002\n"})
    write(orin, cpu(1, 729600, 1728000) | cooling_device(9, "gpu-throttle-alert", 1))
    report = doctor(orin, live(onnxruntime=None))
    assert failing(report) == ["power mode", "clocks", "temperature", "onnxruntime"]
    assert report.ok
    assert line(report, "power mode").mend == "slower than it can be: sudo jetson/power.sh set --mode MAXN"
    assert line(report, "clocks").found == "1 CPU vary with the load"
    assert line(report, "temperature").found.endswith("slowed now: gpu-throttle-alert")


def test_a_container_that_hides_the_board_is_told_by_its_gpu(orin: Path) -> None:
    (orin / "proc/device-tree/model").unlink()
    assert doctor(orin, live()).ok
    other = live(cuda={"name": "NVIDIA H100", "capability": [9, 0], "cuda": [12, 6]})
    assert failing(doctor(orin, other)) == ["board", "plugins"]


def test_plugins_that_are_said_to_be_where_they_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "x.so"))
    assert ask().plugins == f"there is no plugin library {tmp_path / 'x.so'}"
    (tmp_path / "x.so").write_text("no library")
    assert "invalid ELF header" in str(ask().plugins) or "file too short" in str(ask().plugins)


def test_lines_for_people(orin: Path) -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    print_report(doctor(orin, live(plugins="none", onnxruntime=None)), console)
    text = console.export_text()
    assert "ok    board" in text
    assert "mend  plugins      none" in text
    assert "optional: to run ONNX artifacts too" in text
    assert text.splitlines()[-1] == "To mend before an engine can run: plugins."


def test_the_last_line_of_a_ready_machine(orin: Path) -> None:
    for answers, last in (
        (live(), "Ready."),
        (live(onnxruntime=None), "Ready. For speed and steady figures: onnxruntime."),
    ):
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        print_report(doctor(orin, answers), console)
        assert console.export_text().splitlines()[-1] == last


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orin_kit", "doctor", *arguments], capture_output=True, text=True, check=False
    )


def test_this_machine() -> None:
    if Path("/etc/nv_tegra_release").exists():
        pytest.skip("this is a Jetson")
    done = run_here("--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["schema"]) == (EXIT_INTERNAL, False, "orin-kit/doctor/1")
    by_name = {check["name"]: check for check in report["checks"]}
    assert not by_name["jetpack"]["ok"]
    assert by_name["python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    lines = run_here()
    assert lines.returncode == EXIT_INTERNAL
    assert "mend  jetpack" in lines.stdout
    assert lines.stderr == ""


def test_the_device_install_is_enough() -> None:
    code = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "class Missing(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HOST_ONLY}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from orin_kit.doctor.doctor import doctor\n"
        "from orin_kit.doctor.report import print_report\n"
        "print_report(doctor())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jetpack" in done.stdout
