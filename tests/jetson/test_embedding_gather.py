"""orin_embedding_gather against the codes and scales themselves."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import EmbeddingArgs, KernelError, Kernels
from orin_kit.export.interleave import interleave
from orin_kit.models.packing import PackedWeight, pack

ROWS, TILED = 0, 1


def table(codes: NDArray[np.uint8], scales: NDArray[np.float16], bits: int, layout: int) -> list[NDArray[Any]]:
    """The table and the scales as the kernel wants them."""
    if layout == TILED:
        return [interleave(PackedWeight(4, pack(codes), scales)), np.ascontiguousarray(scales.T)]
    if bits == 4:
        codes = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return [codes, scales]


def run(kernels: Kernels, ids: NDArray[np.int64], given: list[NDArray[Any]], fp32: bool, **sizes: int) -> NDArray[Any]:
    inputs = [kernels.put(a) for a in (ids, *given)]
    y = kernels.empty((len(ids), sizes["hidden"]), np.float32 if fp32 else np.float16)
    ids_at, table_at, scales_at = (one.address for one in inputs)
    args = EmbeddingArgs(
        tokens=len(ids), fp32_output=int(fp32), ids=ids_at, table=table_at, scales=scales_at, y=y.address, **sizes
    )
    kernels.call("orin_embedding_gather", byref(args), inputs=inputs)
    return y.read()


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize(
    ("bits", "layout", "hidden", "group_size"),
    [
        (4, ROWS, 1536, 128),
        (4, ROWS, 40, 8),
        (8, ROWS, 896, 896),
        (8, ROWS, 2560, 32),
        (4, TILED, 1536, 128),
        (4, TILED, 256, 32),
        (4, TILED, 128, 64),
    ],
)
def test_rows_are_exact(
    kernels: Kernels, rng: np.random.Generator, bits: int, layout: int, hidden: int, group_size: int, fp32: bool
) -> None:
    vocab = 48
    codes = rng.integers(0, 1 << bits, (vocab, hidden), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.1, (vocab, hidden // group_size)).astype(np.float16)
    dense = (codes.astype(np.float32) - (1 << bits - 1)) * scales.astype(np.float32).repeat(group_size, axis=1)
    ids = rng.integers(0, vocab, 9)
    given = table(codes, scales, bits, layout)
    y = run(kernels, ids, given, fp32, vocab=vocab, hidden=hidden, bits=bits, group_size=group_size, layout=layout)
    np.testing.assert_array_equal(y, dense[ids].astype(y.dtype))


def test_ids_outside_the_table_give_zeros(kernels: Kernels, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 256, (8, 64), dtype=np.uint8)
    given = table(codes, np.ones((8, 2), np.float16), 8, ROWS)
    ids = np.array([-1, 8, 1 << 40, 3])
    y = run(kernels, ids, given, False, vocab=8, hidden=64, bits=8, group_size=32, layout=ROWS)
    assert (y[:3] == 0).all()
    np.testing.assert_array_equal(y[3], codes[3].astype(np.float16) - 128)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "bits is 3, want 4 or 8"),
        ({"bits": 8, "layout": TILED}, "bits is 8, want 4 in the layout int4_linear"),
        ({"layout": 7}, "layout is 7"),
        ({"hidden": 60}, "hidden is 60, want a multiple of 8"),
        ({"hidden": 64, "layout": TILED}, "hidden is 64, want a multiple of 128"),
        ({"group_size": 24}, "group_size is 24"),
        ({"vocab": 20, "layout": TILED}, "vocab is 20, want a multiple of 8"),
    ],
)
def test_refuses_bad_arguments(kernels: Kernels, changed: dict[str, int], message: str) -> None:
    sizes = {"vocab": 16, "hidden": 64, "bits": 4, "group_size": 32, "layout": ROWS} | changed
    given: list[NDArray[Any]] = [np.zeros((16, 128), np.uint8), np.ones((16, 16), np.float16)]
    with pytest.raises(KernelError, match=message) as raised:
        run(kernels, np.zeros(1, np.int64), given, False, **sizes)
    assert raised.value.status == kernels.BAD_ARGUMENT
