"""What only trying tells: does the GPU answer, do TensorRT's bindings import, does a library load.

Each try is a process of its own that runs this file: a driver that hangs or crashes takes only that with it. It imports
nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 60.0  # the first contact with a GPU may load modules
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR of cuda.h


class ProbeError(Exception):
    """The try did not succeed; one line why."""


def run_probe(name: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Try `name` of `PROBES` in a process of its own.

    Raises:
        ProbeError: it failed, crashed, or took longer than `timeout_s`.
    """
    try:
        done = subprocess.run(
            [sys.executable, __file__, name, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {timeout_s:g} s") from None
    if done.returncode < 0:
        raise ProbeError(f"crashed (signal {-done.returncode})")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:  # bindings may print before us, so ours is the last line
        raise ProbeError(" ".join(done.stderr.split())[-200:] or f"ended with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise ProbeError(answer["error"])
    return answer


def cuda() -> dict[str, Any]:
    """The first GPU, from the CUDA driver itself (the driver API of cuda.h)."""
    driver = ctypes.CDLL("libcuda.so.1")
    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _call(driver.cuInit, ctypes.c_uint(0))
    _call(driver.cuDriverGetVersion, ctypes.byref(number))
    driver_version = number.value
    _call(driver.cuDeviceGetCount, ctypes.byref(count))
    if not count.value:
        raise OSError("the driver knows no GPU")
    _call(driver.cuDeviceGet, ctypes.byref(device), ctypes.c_int(0))
    _call(driver.cuDeviceGetName, name, ctypes.c_int(len(name)), device)
    capability = []
    for attribute in COMPUTE_CAPABILITY:
        _call(driver.cuDeviceGetAttribute, ctypes.byref(number), ctypes.c_int(attribute), device)
        capability.append(number.value)
    return {
        "name": name.value.decode("utf-8", "replace"),
        "capability": capability,
        "cuda": [driver_version // 1000, driver_version % 1000 // 10],
    }


def module(name: str) -> dict[str, Any]:
    """Import a Python module; its version."""
    return {"version": str(getattr(importlib.import_module(name), "__version__", ""))}


def plugins(path: str) -> dict[str, Any]:
    """Load the plugin library, with every library that it needs; it says "0.1.0 sm_87" of itself (orin_kernels.h)."""
    function = ctypes.CDLL(path).orin_version
    function.restype = ctypes.c_char_p
    version, *sms = str(function(), "utf-8").split()
    return {"path": path, "version": version, "sms": sms}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {"cuda": cuda, "module": module, "plugins": plugins}


def _call(function: Callable[..., int], *arguments: Any) -> None:
    code = function(*arguments)
    if code:
        raise OSError(f"{getattr(function, '__name__', 'the CUDA driver')} failed with CUDA error {code}")


def main() -> None:
    """Print the answer as one line of JSON."""
    sys.path.pop(0)  # this file's folder: its neighbours are no top-level modules
    name, *arguments = sys.argv[1:]
    try:
        answer = PROBES[name](*arguments)
    except Exception as error:  # whatever a foreign module raises is the answer
        answer = {"error": " ".join(f"{error}".split()) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
