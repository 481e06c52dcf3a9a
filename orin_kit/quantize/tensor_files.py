"""Safetensors files written one tensor at a time, so that a checkpoint never has to be in memory.

The sizes are known before the data: headers come first, each tensor is then written at its place, in any order.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UserError
from orin_kit.models.weights import DTYPES, INDEX, SINGLE

NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
SHARD_BYTES = 4 << 30
CHUNK_BYTES = 8 << 20

Plan = Mapping[str, tuple[Any, tuple[int, ...]]]


class TensorFiles:
    """`model.safetensors`, or shards of at most `shard_bytes` with their index; a context manager.

    Args:
        directory: exists; the files are made in it.
        plan: every tensor that will be put: name -> dtype, shape.
    """

    def __init__(self, directory: Path, plan: Plan, shard_bytes: int = SHARD_BYTES) -> None:
        self._plan = plan
        self._missing = set(plan)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        shards = _shards(plan, shard_bytes)
        width = len(shards)
        names = [SINGLE] if width == 1 else [f"model-{i:05d}-of-{width:05d}.safetensors" for i in range(1, width + 1)]
        self._files = [(directory / name).open("wb") for name in names]
        for file, shard in zip(self._files, shards, strict=True):
            self._begin(file, shard)
        if width > 1:
            where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": sum(_bytes(plan[t]) for t in plan)}, "weight_map": where}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def put(self, name: str, tensor: NDArray[Any]) -> None:
        """Write a tensor, cast to the planned dtype; a large one is cast and written in pieces.

        Raises:
            UserError: a value is NaN or infinite, or not within the planned dtype's range.
        """
        dtype, shape = self._plan[name]
        if tensor.shape != tuple(shape):
            raise ValueError(f"{name} has shape {tensor.shape}, the plan says {shape}")
        file, start = self._places[name]
        file.seek(start)
        rows = max(1, CHUNK_BYTES // max(1, _bytes(self._plan[name]) // max(1, len(tensor))))
        for first in range(0, len(tensor), rows):
            with np.errstate(over="ignore"):  # found below, and named
                piece = np.ascontiguousarray(tensor[first : first + rows], dtype)
            if piece.dtype.kind == "f" and not np.isfinite(piece).all():
                what = f"{name} holds NaN, infinities or values beyond the range of {np.dtype(dtype).name}"
                raise UserError(what, mend="get the checkpoint again or train it again")
            file.write(piece.reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        if kind is None and self._missing:
            raise ValueError(f"tensors planned but never written: {sorted(self._missing)}")

    def _begin(self, file: BinaryIO, shard: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in shard:
            dtype, shape = self._plan[name]
            begin, end = end, end + _bytes(self._plan[name])
            header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in shard:
            self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])


def _bytes(entry: tuple[Any, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return math.prod(shape) * int(np.dtype(dtype).itemsize)


def _shards(plan: Plan, limit: int) -> list[list[str]]:
    """Names in order, cut where `limit` is reached; within a shard the widest dtypes first, so that all are aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in plan.items():
        if shards[-1] and size + _bytes(entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(entry)
    return [sorted(shard, key=lambda name: -np.dtype(plan[name][0]).itemsize) for shard in shards]
