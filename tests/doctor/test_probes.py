"""Tries in a process of their own: real libraries, real modules, and those that fail."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from orin_kit.doctor import probes
from orin_kit.doctor.probes import ProbeError, run_probe

COMPILER = shutil.which("cc")


def compile_library(folder: Path, name: str, source: str, *options: str) -> Path:
    """A shared library of our own."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    (folder / f"{name}.c").write_text(source)
    command = [COMPILER, "-shared", "-fPIC", "-o", str(folder / f"{name}.so"), str(folder / f"{name}.c"), *options]
    subprocess.run(command, check=True)
    return folder / f"{name}.so"


def test_a_module_and_its_version() -> None:
    assert run_probe("module", "numpy") == {"version": np.__version__}


def test_a_module_that_is_missing_says_so() -> None:
    with pytest.raises(ProbeError, match="No module named 'no_such_module'"):
        run_probe("module", "no_such_module")


def test_a_module_of_the_current_folder_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "impostor.py").write_text("__version__ = '1'\n")
    monkeypatch.chdir(tmp_path)
    for name in ("impostor", "sensors"):  # the latter lies beside the probes themselves
        with pytest.raises(ProbeError, match="No module named"):
            run_probe("module", name)


def test_a_module_that_prints_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatty.py").write_text("print('hello')\n__version__ = '2'\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_probe("module", "chatty") == {"version": "2"}
    with pytest.raises(ProbeError, match="exit code 3"):
        run_probe("module", "leaving")


def test_plugins_load_and_say_what_they_are_built_for(tmp_path: Path) -> None:
    path = compile_library(tmp_path, "whole", 'const char *orin_version(void) { return "0.1.0 sm_80 sm_87"; }\n')
    assert run_probe("plugins", str(path)) == {"path": str(path), "version": "0.1.0", "sms": ["sm_80", "sm_87"]}


def test_another_library_is_not_taken_for_the_plugins(tmp_path: Path) -> None:
    path = compile_library(tmp_path, "other", "int answer(void) { return 42; }\n")
    with pytest.raises(ProbeError, match="undefined symbol: orin_version"):
        run_probe("plugins", str(path))


def test_a_library_that_is_cut_short_or_lacks_another(tmp_path: Path) -> None:
    needed = compile_library(tmp_path, "needed", "int answer(void) { return 42; }\n")
    options = ("-L", str(tmp_path), f"-l:{needed.name}")
    path = compile_library(tmp_path, "needy", "int answer(void); int twice(void) { return 2 * answer(); }\n", *options)
    with pytest.raises(ProbeError, match=r"needed\.so: cannot open shared object file"):
        run_probe("plugins", str(path))
    needed.write_bytes(needed.read_bytes()[:100])
    with pytest.raises(ProbeError, match="file too short|cannot read file data"):
        run_probe("plugins", str(needed))


def test_a_crash_is_an_answer(tmp_path: Path) -> None:
    source = "#include <signal.h>\n__attribute__((constructor)) static void crash(void) { raise(SIGSEGV); }\n"
    with pytest.raises(ProbeError, match="crashed"):
        run_probe("plugins", str(compile_library(tmp_path, "crashing", source)))


def test_no_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(30)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ProbeError, match=r"no answer within 0\.5 s"):
        run_probe("module", "slow", timeout_s=0.5)


# A driver of our own, by the signatures of cuda.h; what a real one says, only a machine with a GPU can tell.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags ? 1 : STATE; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    if (device != 7 || size < 5) return 101;
    strcpy(name, "Orin");
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 7) return 101;
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
    return 0;
}
"""


@pytest.mark.parametrize(
    ("state", "count", "error"), [(0, 1, None), (100, 1, "cuInit failed with CUDA error 100"), (0, 0, "knows no GPU")]
)
def test_the_gpu_by_the_drivers_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: int, count: int, error: str | None
) -> None:
    library = compile_library(tmp_path, "libcuda", DRIVER, f"-DSTATE={state}", f"-DCOUNT={count}")
    library.rename(tmp_path / "libcuda.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    if error is None:
        assert run_probe("cuda") == {"name": "Orin", "capability": [8, 7], "cuda": [12, 6]}
    else:
        with pytest.raises(ProbeError, match=error):
            run_probe("cuda")


def test_the_gpu_of_this_machine() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    answer = run_probe("cuda")
    assert answer["name"] == torch.cuda.get_device_name(0)
    assert tuple(answer["capability"]) == torch.cuda.get_device_capability(0)


def test_probes_need_the_standard_library_only() -> None:
    # A broken installation must not keep the doctor from saying so.
    done = subprocess.run(
        [shutil.which("python3") or "python3", "-I", "-S", probes.__file__, "module", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "version" in done.stdout
