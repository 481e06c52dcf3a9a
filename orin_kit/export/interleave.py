"""How `Int4Linear` wants its weights: every 16 bytes are what one thread of a tensor-core multiplication needs.

int32 `[out / 8, in / 128, 8, 4, 4]`: row `8 i + r` of the weight (axes 0 and 2), a block of 128 input features (axis
1), thread t of the four that share a row (axis 3), word w (axis 4). A word holds the codes of two steps of 16 features,
`2 w` and `2 w + 1`; of each step thread t of mma.m16n8k16 holds features `2 t, 2 t + 1, 2 t + 8, 2 t + 9`. Two
neighbours lie 16 bits apart, so `(word >> 4 p) & 0x000f000f` is pair p: of step `2 w + p / 2`, the features from
`2 t + 8 (p % 2)` on. A warp's loads, 8 rows by 4 threads, are 512 bytes in a row.
https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orin_kit.models.packing import PackedWeight, pack, unpack

ROWS, FEATURES = 8, 128  # that a tile holds: a weight's sizes must be multiples

# Rows [i, r], features [block, w, step, half, t, neighbour] -> [i, block, r, t, w, neighbour, step, half].
_SPLIT = (4, 2, 2, 4, 2)
_TO_TILES = (0, 2, 1, 6, 3, 7, 4, 5)
_TO_ROWS = (0, 2, 1, 4, 6, 7, 3, 5)


def interleave(weight: PackedWeight) -> NDArray[np.int32]:
    """int32 `[out / 8, in / 128, 8, 4, 4]` from a 4-bit weight whose sizes are multiples of 8 and 128."""
    rows, columns = weight.shape
    codes = weight.codes().reshape(rows // ROWS, ROWS, columns // FEATURES, *_SPLIT).transpose(_TO_TILES)
    return pack(np.ascontiguousarray(codes).reshape(-1, 8)).reshape(tiles(rows, columns))


def deinterleave(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """`interleave` undone: codes uint8 `[out, in]`."""
    outer, blocks = words.shape[:2]
    nibbles = unpack(words.reshape(-1, 1)).reshape(outer, blocks, ROWS, 4, 4, 2, 2, 2)
    return np.ascontiguousarray(nibbles.transpose(_TO_ROWS)).reshape(outer * ROWS, blocks * FEATURES)


def tiles(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """The shape that a weight `[rows, columns]` has in tiles."""
    return rows // ROWS, columns // FEATURES, ROWS, 4, 4
