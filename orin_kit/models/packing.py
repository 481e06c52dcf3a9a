"""The one packing of quantized weights, that every format is read into and every dialect is written from.

A weight `[out, in]` is cut into groups of `group_size` input features. A group shares one scale, and one zero point
where the scheme is asymmetric: `weight = (code - zero_point) * scale`, codes unsigned of `bits` bits. Symmetric weights
have the middle code for a zero point and store none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = (4, 8)
ROWS = 128  # that are reordered together


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight `[out, in]`.

    Attributes:
        bits: of a code, 4 or 8.
        packed: int32 `[out, in * bits / 32]`, see `pack`.
        scales: fp16 `[out, in / group_size]`, positive.
        zero_points: uint8 `[out, in / group_size]`, codes that mean zero; None where all are `middle(bits)`.
        order: int32 `[in]` or None: column i multiplies input feature `order[i]` (GPTQ's act-order, whose groups are
            neighbours only after sorting).
    """

    bits: int
    packed: NDArray[np.int32]
    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None = None
    order: NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.packed.shape[0], self.packed.shape[1] * (32 // self.bits)

    @property
    def group_size(self) -> int:
        return self.shape[1] // int(self.scales.shape[1])

    def codes(self) -> NDArray[np.uint8]:
        """uint8 `[out, in]`, in the stored order of columns."""
        return unpack(self.packed, self.bits)

    def regrouped(self, group_size: int) -> PackedWeight:
        """The same weight in smaller groups, which repeat the scales and zero points of the larger.

        Args:
            group_size: divides this weight's own.
        """
        times = self.group_size // group_size
        if times == 1:
            return self
        zero_points = None if self.zero_points is None else self.zero_points.repeat(times, axis=1)
        return PackedWeight(self.bits, self.packed, self.scales.repeat(times, axis=1), zero_points, self.order)

    def dense(self) -> NDArray[np.float32]:
        """The weight fp32 `[out, in]`, columns in the order of the input features."""
        rows, columns = self.shape
        groups = self.codes().reshape(rows, -1, self.group_size).astype(np.float32)
        groups -= middle(self.bits) if self.zero_points is None else self.zero_points[..., None].astype(np.float32)
        groups *= np.asarray(self.scales, np.float32)[..., None]
        weight: NDArray[np.float32] = groups.reshape(rows, columns)
        if self.order is None:
            return weight
        sorted_back = np.empty_like(weight)
        sorted_back[:, self.order] = weight
        return sorted_back


def middle(bits: int) -> int:
    """The zero point of symmetric codes: 8 or 128."""
    return 128 if bits == 8 else 8


def pack(codes: NDArray[np.uint8], bits: int = 4) -> NDArray[np.int32]:
    """Pack codes uint8 `[out, in]` into int32 `[out, in * bits / 32]`, as compressed-tensors' `weight_packed`.

    Neighbours share a word, the first in its lowest bits. Little-endian hosts only.
    """
    raw = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    packed: NDArray[np.int32] = np.ascontiguousarray(raw).view(np.int32)
    return packed


def unpack(packed: NDArray[np.int32], bits: int = 4) -> NDArray[np.uint8]:
    """`pack` undone: int32 `[out, in * bits / 32]` -> uint8 `[out, in]`."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return raw
    return np.stack((raw & 15, raw >> 4), axis=-1).reshape(raw.shape[0], -1)


def reordered(packed: NDArray[np.int32], order: NDArray[np.int32], bits: int = 4) -> NDArray[np.int32]:
    """Packed codes with column `order[i]` in place i, a few rows at a time: what fits the cache is 10 times as fast."""
    parts = (packed[first : first + ROWS] for first in range(0, len(packed), ROWS))
    return np.concatenate([pack(np.take(unpack(part, bits), order, axis=1), bits) for part in parts])
