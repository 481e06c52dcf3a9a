"""orin_int4_linear against its definition in float64, over both kernels and what their plans can come to."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import Int4LinearArgs, KernelError, Kernels
from orin_kit.export.interleave import deinterleave, interleave
from orin_kit.models.packing import PackedWeight, pack

NONE, GATE = 0, 1

Half = NDArray[np.float16]


class Layer:
    """A random weight `[n, k]`, as the kernel wants it and dense in float64."""

    def __init__(self, rng: np.random.Generator, n: int, k: int, group_size: int, bias: bool = False) -> None:
        codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
        scales = rng.uniform(0.002, 0.02, (n, k // group_size)).astype(np.float16)
        self.n, self.k, self.group_size = n, k, group_size
        self.dense = (codes.astype(np.float64) - 8) * scales.astype(np.float64).repeat(group_size, axis=1)
        self.weight = interleave(PackedWeight(4, pack(codes), scales))
        self.scales = np.ascontiguousarray(scales.T)
        self.bias = rng.standard_normal(n).astype(np.float16) if bias else None

    def definition(self, x: Half, activation: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The outputs, and how far each may be off: the rounding of a sum of `k` products and of the output to fp16."""
        wide = x.astype(np.float64)
        y = _product(wide, self.dense)
        # Weights scaled in fp16 are off by 2^-12 of themselves, independently: within six standard deviations.
        error = 6 * 2**-12 * np.sqrt(_product(wide**2, self.dense**2))
        if self.bias is not None:
            y += self.bias.astype(np.float64)
        if activation == GATE:
            gate, up = y[:, 0::2], y[:, 1::2]
            sigmoid = 1 / (1 + np.exp(-gate))
            # |silu'| <= 1.1
            error = 1.1 * error[:, 0::2] * np.abs(up) + error[:, 1::2] * np.abs(gate * sigmoid)
            y = gate * sigmoid * up
        return y, error + np.abs(y) * 2**-10 + 1e-6


def _product(x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """`x w^T`. Not by BLAS, whose threads wait for each other longer than they compute where cores are shared."""
    y: NDArray[np.float64] = np.einsum("rk,nk->rn", x, w)
    return y


def run(
    kernels: Kernels, layer: Layer, rows_of_x: Half, activation: int = NONE, spare: int = 0, **changed: Any
) -> Half:
    """The kernel's outputs. `spare` more bytes of workspace than asked for; `changed` arguments are passed instead."""
    rows = len(rows_of_x)
    inputs = [kernels.put(a) for a in (rows_of_x, layer.weight, layer.scales)]
    if layer.bias is not None:
        inputs.append(kernels.put(layer.bias))
    y = kernels.empty((rows, layer.n // (1 + activation)), np.float16)
    workspace = kernels.workspace("orin_int4_linear_workspace", rows, layer.n, layer.k)
    addresses = [one.address for one in inputs]
    sizes = {"rows": rows, "n": layer.n, "k": layer.k, "group_size": layer.group_size, "activation": activation}
    pointers = dict(zip(("x", "weight", "scales", "bias"), addresses, strict=False))
    args = Int4LinearArgs(**{**sizes, **pointers, "y": y.address, **changed})
    kernels.call("orin_int4_linear", byref(args), workspace, workspace.given.size + spare, inputs=inputs)
    workspace.read()
    return y.read()


def compare(kernels: Kernels, layer: Layer, x: Half, activation: int = NONE) -> None:
    y = run(kernels, layer, x, activation).astype(np.float64)
    expected, allowed = layer.definition(x, activation)
    worst = np.max(np.abs(y - expected) / allowed)
    assert worst <= 1, f"off by {worst:.2f} times what rounding explains"


def inputs(rng: np.random.Generator, rows: int, k: int) -> Half:
    return rng.standard_normal((rows, k)).astype(np.float16)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rows", range(1, 9))
def test_one_to_eight_rows(kernels: Kernels, rng: np.random.Generator, rows: int, group_size: int) -> None:
    layer = Layer(rng, 72, 640, group_size, bias=True)
    compare(kernels, layer, inputs(rng, rows, 640))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [9, 16, 17, 31, 33, 64, 65, 130])
def test_more_rows(kernels: Kernels, rng: np.random.Generator, rows: int, group_size: int) -> None:
    layer = Layer(rng, 136, 384, group_size, bias=True)  # 136: one tile behind the first block's
    compare(kernels, layer, inputs(rng, rows, 384))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 12, 40])
def test_silu_gate(kernels: Kernels, rng: np.random.Generator, rows: int, bias: bool) -> None:
    layer = Layer(rng, 176, 256, 128, bias)
    compare(kernels, layer, inputs(rng, rows, 256), GATE)


# Multiprocessors decide how many tiles a block of the GEMV takes: all three, with a last block that is not full.
@pytest.mark.parametrize(("sms", "n"), [(1, 56), (2, 40), (4, 136), (16, 120), (16, 1000)])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_number_of_tiles(emulator: Kernels, rng: np.random.Generator, rows: int, n: int, sms: int) -> None:
    emulator.configure(int(rng.integers(1 << 30)), sms)
    compare(emulator, Layer(rng, n, 256, 64), inputs(rng, rows, 256))


# Long inputs: eight warps, and x in several parts (with 8 rows 16 k-blocks are a part).
@pytest.mark.parametrize(("rows", "k"), [(1, 8960), (8, 4096), (8, 8960), (3, 8960)])
def test_long_inputs_by_parts(kernels: Kernels, rng: np.random.Generator, rows: int, k: int) -> None:
    compare(kernels, Layer(rng, 24, k, 128), inputs(rng, rows, k))


# The grid is small for the multiprocessors: K is split, here into two to four, the last with fewer k-blocks.
@pytest.mark.parametrize(("rows", "n", "k"), [(9, 64, 2176), (48, 144, 4480), (70, 64, 3328)])
@pytest.mark.parametrize("activation", [NONE, GATE])
def test_split_inputs(kernels: Kernels, rng: np.random.Generator, rows: int, n: int, k: int, activation: int) -> None:
    layer = Layer(rng, n, k, 128, bias=True)
    if kernels.emulated:
        assert kernels.workspace("orin_int4_linear_workspace", rows, n, k).given.size > 0
    compare(kernels, layer, inputs(rng, rows, k) * np.float16(0.3), activation)


# Qwen2.5-1.5B's linears (hidden 1536, q + k + v 2048, intermediate 8960), with fewer outputs.
@pytest.mark.parametrize(
    ("n", "k", "activation"), [(256, 1536, NONE), (192, 1536, NONE), (320, 1536, GATE), (192, 8960, NONE)]
)
@pytest.mark.parametrize("rows", [1, 20])
def test_qwen_shapes(kernels: Kernels, rng: np.random.Generator, rows: int, n: int, k: int, activation: int) -> None:
    layer = Layer(rng, n, k, 128, bias=n == 256)
    compare(kernels, layer, inputs(rng, rows, k) * np.float16(0.3), activation)


def test_whole_numbers_are_exact(kernels: Kernels, rng: np.random.Generator) -> None:
    """Sums that fp16 holds exactly: any wrong index shows, however small its effect."""
    for rows in (2, 11):
        layer = Layer(rng, 40, 256, 32)
        layer.scales[:] = 1
        x = (rng.integers(-2, 3, (rows, 256)) * (rng.random((rows, 256)) < 0.2)).astype(np.float16)
        expected = x.astype(np.int64) @ (deinterleave(layer.weight).astype(np.int64) - 8).T
        np.testing.assert_array_equal(run(kernels, layer, x), expected.astype(np.float16))


def test_rows_do_not_touch_each_other(kernels: Kernels, rng: np.random.Generator) -> None:
    """NaN in one row stays there, in both kernels."""
    for rows in (3, 10):
        layer = Layer(rng, 64, 256, 64)
        x = inputs(rng, rows, 256)
        clean = run(kernels, layer, x)
        x[1] = np.nan
        y = run(kernels, layer, x)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))


def test_no_rows(kernels: Kernels, rng: np.random.Generator) -> None:
    assert run(kernels, Layer(rng, 16, 128, 32), np.empty((0, 128), np.float16)).shape == (0, 16)


def test_the_workspace_does_for_fewer_rows(emulator: Kernels) -> None:
    for sms in (2, 16, 132):
        emulator.configure(0, sms)
        needed = [int(emulator.library.orin_int4_linear_workspace(rows, 256, 8960)) for rows in range(700)]
        assert needed == sorted(needed)
        assert max(needed) > 0 or sms == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 36}, "n is 36, want a multiple of 8"),
        ({"n": 40, "activation": GATE}, "n is 40, want a multiple of 16"),
        ({"k": 192}, "k is 192, want a multiple of 128"),
        ({"group_size": 16}, "group_size is 16, want 32, 64 or 128"),
        ({"activation": 2}, "activation is 2"),
        ({"rows": -1}, "rows is -1"),
        ({"x": None}, "x is NULL"),
        ({"bias": 8}, "bias is not aligned to 16 bytes"),
    ],
)
def test_refuses_bad_arguments(
    kernels: Kernels, rng: np.random.Generator, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(KernelError, match=message) as raised:
        run(kernels, Layer(rng, 48, 256, 32), inputs(rng, 1, 256), **changed)
    assert raised.value.status == kernels.BAD_ARGUMENT


def test_refuses_a_small_workspace(emulator: Kernels, rng: np.random.Generator) -> None:
    emulator.configure(0)
    with pytest.raises(KernelError, match="workspace has .* bytes, want") as raised:
        run(emulator, Layer(rng, 64, 4096, 128), inputs(rng, 16, 4096), spare=-1)
    assert raised.value.status == emulator.SMALL_WORKSPACE
