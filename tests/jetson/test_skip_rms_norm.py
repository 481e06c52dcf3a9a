"""orin_skip_rms_norm against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import KernelError, Kernels

EPSILON = 1e-6

Half = NDArray[np.float16]


def run(kernels: Kernels, x: Half, weight: Half, residual: Half | None) -> tuple[Half, Half | None]:
    inputs = [kernels.put(a) for a in (x, weight, residual) if a is not None]
    y = kernels.empty(x.shape, np.float16)
    total = None if residual is None else kernels.empty(x.shape, np.float16)
    third = None if residual is None else inputs[2]
    rows, hidden = x.shape
    kernels.call("orin_skip_rms_norm", inputs[0], inputs[1], third, y, total, rows, hidden, EPSILON, inputs=inputs)
    return y.read(), None if total is None else total.read()


def definition(total: Half, weight: Half) -> NDArray[np.float64]:
    wide = total.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPSILON) * weight.astype(np.float64)


# One vector, less than a warp, Qwen2.5's, several chunks a thread, the largest.
@pytest.mark.parametrize("hidden", [8, 104, 1536, 8960, 20000, 32768])
@pytest.mark.parametrize("skip", [False, True])
def test_agrees_with_float64(kernels: Kernels, rng: np.random.Generator, hidden: int, skip: bool) -> None:
    rows = 5 if hidden < 4096 else 2
    x = (rng.standard_normal((rows, hidden)) * rng.uniform(0.01, 30, (rows, 1))).astype(np.float16)
    weight = rng.standard_normal(hidden).astype(np.float16)
    residual = rng.standard_normal((rows, hidden)).astype(np.float16) if skip else None
    y, total = run(kernels, x, weight, residual)
    expected_sum = x if residual is None else (x.astype(np.float32) + residual.astype(np.float32)).astype(np.float16)
    if total is not None:
        np.testing.assert_array_equal(total, expected_sum)
    np.testing.assert_allclose(y, definition(expected_sum, weight), rtol=1.1e-3, atol=1e-6)


def test_a_row_of_zeros_stays_zero_and_overflow_shows(kernels: Kernels) -> None:
    x = np.zeros((2, 64), np.float16)
    x[1] = 60000
    residual = x.copy()
    y, total = run(kernels, x, np.ones(64, np.float16), residual)
    assert total is not None
    assert (y[0] == 0).all()
    assert np.isinf(total[1]).all()


def test_nothing_to_do(kernels: Kernels) -> None:
    y, _ = run(kernels, np.empty((0, 64), np.float16), np.ones(64, np.float16), None)
    assert y.shape == (0, 64)


@pytest.mark.parametrize("hidden", [12, 0, 40000])
def test_refuses_other_sizes(kernels: Kernels, hidden: int) -> None:
    with pytest.raises(KernelError, match=f"hidden is {hidden}, want a multiple of 8 up to 32768"):
        run(kernels, np.ones((1, hidden), np.float16), np.ones(hidden, np.float16), None)


def test_refuses_bad_pointers(kernels: Kernels) -> None:
    x, weight, y = (kernels.put(np.ones((1, 64), np.float16)) for _ in range(3))
    with pytest.raises(KernelError, match="residual and sum are given both or not at all"):
        kernels.call("orin_skip_rms_norm", x, weight, x, y, None, 1, 64, EPSILON)
    with pytest.raises(KernelError, match="weight is NULL"):
        kernels.call("orin_skip_rms_norm", x, None, None, y, None, 1, 64, EPSILON)
    with pytest.raises(KernelError, match="x is not aligned to 16 bytes"):
        kernels.call("orin_skip_rms_norm", x.address + 2, weight, None, y, None, 1, 64, EPSILON)
