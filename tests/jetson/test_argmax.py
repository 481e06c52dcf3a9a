"""orin_argmax against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import KernelError, Kernels


def run(kernels: Kernels, logits: NDArray[Any]) -> NDArray[np.int64]:
    given = kernels.put(logits)
    rows, vocab = logits.shape
    index = kernels.empty(rows, np.int64)
    workspace = kernels.workspace("orin_argmax_workspace", rows, vocab)
    half = int(logits.dtype == np.float16)
    size = workspace.given.size
    kernels.call("orin_argmax", given, half, rows, vocab, index, workspace, size, inputs=[given])
    workspace.read()
    return index.read()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("vocab", [1, 31, 4096, 4097, 50003, 151936])
def test_agrees_with_numpy(kernels: Kernels, rng: np.random.Generator, vocab: int, dtype: type[Any]) -> None:
    logits = (rng.standard_normal((3, vocab)) * 10 - 20).astype(dtype)  # fp16: many ties
    np.testing.assert_array_equal(run(kernels, logits), logits.argmax(axis=1))


def test_the_first_of_equals_and_never_nan(kernels: Kernels, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((4, 9001)).astype(np.float32)
    logits[0, [77, 8800]] = 50
    logits[1, 5000:6000] = np.nan
    logits[2] = -np.inf
    logits[2, [3000, 4500]] = -0.0, 0.0  # equal, so the first
    logits[2, 2999] = np.nan
    logits[3, 123] = np.inf
    np.testing.assert_array_equal(run(kernels, logits), [77, np.nanargmax(logits[1]), 3000, 123])


def test_a_row_of_nothing_but_nan_gives_a_valid_index(kernels: Kernels) -> None:
    assert run(kernels, np.full((1, 5000), np.nan, np.float32))[0] == 0


def test_refuses_bad_arguments(kernels: Kernels) -> None:
    logits, index = kernels.put(np.ones((2, 8), np.float32)), kernels.empty(2, np.int64)
    workspace = kernels.empty(16, np.uint8)
    with pytest.raises(KernelError, match="workspace has 15 bytes, want 16") as raised:
        kernels.call("orin_argmax", logits, 0, 2, 8, index, workspace, 15)
    assert raised.value.status == kernels.SMALL_WORKSPACE
    with pytest.raises(KernelError, match="vocab is 0") as raised:
        kernels.call("orin_argmax", logits, 0, 2, 0, index, workspace, 16)
    assert raised.value.status == kernels.BAD_ARGUMENT
