"""Scales of an int8 KV cache: how large the keys and values are that a decoder layer makes of the calibration text.

Symmetric and static: `cached = clip(round(x / scale), -127, 127)`, keys after their norm and RoPE, as a cache holds
them. Keys have channels that stand out in every token (KIVI, arXiv 2402.02750), so each channel has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orin_kit.quantize.layerwise import ATTENTION

LARGEST = 127
# Of a channel's scale: below it, what fp16 holds of keys and values is as good as zero.
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)

Store = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def caching(store: Store) -> Iterator[None]:
    """Let all attention of a `LayerwiseDecoder` attend to what `store` makes of keys and values.

    Args:
        store: takes and gives keys and values `[rows, kv_heads, length, head_dim]`, keys after norm and RoPE.
    """
    attend = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def through(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        return attend(module, query, *store(key, value), *args, **options)

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = through
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend


class CacheRange:
    """The largest key and value of each channel, fp32 `[kv_heads, head_dim]`, over all batches that were added."""

    def __init__(self) -> None:
        self._key = self._value = torch.zeros(())

    def add(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A `Store` that only looks."""
        self._key = torch.maximum(self._key.to(key.device), key.abs().amax((0, 2)))
        self._value = torch.maximum(self._value.to(value.device), value.abs().amax((0, 2)))
        return key, value

    def scales(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Key and value scales, fp32 `[kv_heads, head_dim]`, positive."""
        key, value = ((x / LARGEST).clamp_min(SMALLEST_SCALE).cpu().numpy() for x in (self._key, self._value))
        return key, value


def int8_store(key_scale: NDArray[np.float32], value_scale: NDArray[np.float32]) -> Store:
    """A `Store` that rounds as an int8 cache with these scales `[kv_heads, head_dim]` does."""
    scales = [torch.tensor(scale)[:, None, :] for scale in (key_scale, value_scale)]

    def store(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = []
        for x, scale in zip((key, value), scales, strict=True):
            s = scale.to(x.device)
            rounded.append((x / s).round().clamp(-LARGEST, LARGEST) * s)
        return rounded[0], rounded[1]

    return store
