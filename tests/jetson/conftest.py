"""The kernels' tests run on the CPU, by the emulator, threads in order and shuffled, and on a GPU if there is one."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from kernels import GPU_LIBRARY, BuildError, GpuMemory, HostMemory, Kernels, build_emulator


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest) -> Kernels:
    """The emulated library, built once and kept in pytest's cache."""
    try:
        library = build_emulator(request.config.cache.mkdir("orin_emulator"))
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    return Kernels(library, HostMemory())


@pytest.fixture(scope="session")
def gpu() -> Kernels:
    """The library as CMake built it, on this machine's GPU."""
    if not GPU_LIBRARY.exists():
        pytest.skip(f"{GPU_LIBRARY} is not built: see jetson/README.md, or name the library in ORIN_KERNELS")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Kernels(GPU_LIBRARY, GpuMemory())


@pytest.fixture(params=["emulated", "shuffled", "gpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each way to run the kernels. A shuffled run's seed is printed when its test fails."""
    if request.param == "gpu":
        found: Kernels = request.getfixturevalue("gpu")
        return found
    emulated: Kernels = request.getfixturevalue("emulator")
    seed = secrets.randbits(32) | 1 if request.param == "shuffled" else 0
    print(f"emulator seed {seed}")
    emulated.configure(seed)
    return emulated


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh every time; its seed is printed when a test fails."""
    seed = secrets.randbits(32)
    print(f"inputs' seed {seed}")
    return np.random.default_rng(seed)
