"""Inputs of onnxruntime's MatMulNBits, from the canonical packing.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UnsupportedModelError
from orin_kit.models.packing import PackedWeight

BLOCKS = (256, 128, 64, 32, 16)


def block_size(group_size: int) -> int:
    """The operator's blocks for groups of any size, one scale for a whole channel say: the largest of `BLOCKS` that
    divides them.

    Raises:
        UnsupportedModelError: none does.
    """
    for block in BLOCKS:
        if group_size % block == 0:
            return block
    what = f"MatMulNBits cannot multiply in groups of {group_size}"
    raise UnsupportedModelError(what, mend="use --precision fp32 or fp16, which dequantizes")


def in_blocks(weight: PackedWeight) -> PackedWeight:
    """The same weight in groups of `block_size`: each block has its group's scale and zero point."""
    times = weight.group_size // block_size(weight.group_size)
    if times == 1:
        return weight
    points = weight.zero_points
    return replace(
        weight,
        scales=weight.scales.repeat(times, axis=1),
        zero_points=None if points is None else points.repeat(times, axis=1),
    )


def blob(weight: PackedWeight) -> NDArray[np.uint8]:
    """Input B: the same bytes, seen as uint8 `[out, in / group_size, group_size * bits / 8]`."""
    rows, bytes_a_group = weight.shape[0], weight.group_size * weight.bits // 8
    return np.ascontiguousarray(weight.packed).view(np.uint8).reshape(rows, -1, bytes_a_group)


def zero_points(weight: PackedWeight) -> NDArray[np.uint8] | None:
    """Input zero_points: uint8 `[out, ceil(groups * bits / 8)]`, two 4-bit ones in a byte, the first in its low bits.

    None for symmetric weights, whose zero point is the operator's default.
    """
    points = weight.zero_points
    if points is None or weight.bits == 8:
        return points
    even: NDArray[np.uint8] = np.pad(points, ((0, 0), (0, points.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
    return packed
