"""The emulator finds what it says it finds, in kernels with one mistake each (broken_kernels.cu); its half is IEEE."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from kernels import BuildError, HostMemory, KernelError, Kernels, build_emulator

X = np.arange(520, dtype=np.float32)
I = np.arange(128)  # noqa: E741
ROTATED = (I + 37) % 128


@pytest.fixture(scope="module", params=["", "-DORIN_EMULATE_UCONTEXT"])
def broken(request: pytest.FixtureRequest) -> Kernels:
    """With the kernels of broken_kernels.cu, switching fibers by assembly and as on other processors."""
    cache, source = request.config.cache.mkdir("orin_emulator"), Path(__file__).parent / "broken_kernels.cu"
    try:
        library = build_emulator(cache, [source], only_emulator=True, flags=request.param.split())
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    return Kernels(library, HostMemory())


def run(broken: Kernels, name: str, right: bool, seed: int = 0) -> np.ndarray:
    broken.configure(seed)
    x, y = broken.put(X), broken.empty(128, np.float32)
    passed = ctypes.c_char_p(name.encode()), ctypes.c_int(right), ctypes.c_void_p(y.address), ctypes.c_void_p(x.address)
    if status := broken.library.run_broken(*passed):
        raise KernelError(status, broken.library.orin_last_error().decode())
    return y.read()


EXPECTED = {
    "rotate": ROTATED,
    "twice": 2 * ROTATED + 1000,
    "copy": X[4 * I] + X[4 * I + 3],
    "barrier": np.ones(128),
    "warp": I ^ 1,
    "shared": np.ones(128),
    "misaligned": X[4 * I],
    "blocks": I,
    "threads": ROTATED,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_right_kernels_are_right_in_every_order(broken: Kernels, name: str) -> None:
    for seed in (0, 1, 7, 123456789):
        np.testing.assert_array_equal(run(broken, name, True, seed), EXPECTED[name])


@pytest.mark.parametrize("name", ["rotate", "copy"])
def test_reading_shared_memory_too_early_gives_nan(broken: Kernels, name: str) -> None:
    assert np.isnan(run(broken, name, False)).any()


@pytest.mark.parametrize("name", ["twice", "blocks"])
def test_a_shuffled_order_shows_a_missing_barrier(broken: Kernels, name: str) -> None:
    wrong = [not np.array_equal(run(broken, name, False, seed), EXPECTED[name]) for seed in range(1, 9)]
    assert sum(wrong) >= 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier", "is stuck: .*waits in __syncthreads"),
        ("warp", "is stuck: .*waits in __shfl_xor_sync"),
        ("shared", "a write 0 bytes behind the block's shared memory"),
        ("misaligned", "a 16-byte load at an address that is no multiple of 16"),
        ("threads", "invalid launch: 1 blocks of 2000 threads"),
    ],
)
def test_mistakes_are_named(broken: Kernels, name: str, message: str) -> None:
    with pytest.raises(KernelError, match=message) as raised:
        run(broken, name, False)
    assert raised.value.status == broken.CUDA_ERROR
    np.testing.assert_array_equal(run(broken, name, True), EXPECTED[name])  # the next launch is a clean one


def test_halves_without_f16c_are_those_of_numpy(emulator: Kernels, rng: np.random.Generator) -> None:
    to_float, to_half = emulator.library.orin_emulator_half_to_float, emulator.library.orin_emulator_float_to_half
    to_float.restype, to_float.argtypes = ctypes.c_float, [ctypes.c_uint16]
    to_half.restype, to_half.argtypes = ctypes.c_uint16, [ctypes.c_float]
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    floats = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.array([to_float(int(b)) for b in bits], np.float32), floats)
    halves = bits[np.isfinite(floats)].view(np.float16)
    between = (halves[:-1].astype(np.float32) + halves[1:].astype(np.float32)) / 2
    ties = (np.nextafter(halves, np.float16(np.inf)).astype(np.float64) + halves.astype(np.float64)) / 2
    many = np.concatenate(
        (between, ties.astype(np.float32), np.array([65519.9, 65520, 1e30, -1e-30, np.inf, -0.0], np.float32))
    )
    many = np.concatenate((many, (rng.standard_normal(3000) * 10.0 ** rng.integers(-9, 6, 3000)).astype(np.float32)))
    with np.errstate(over="ignore"):
        expected = many.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(np.array([to_half(float(v)) for v in many], np.uint16), expected)
