"""Where the scales of an int8 KV cache lie in a checkpoint: `k_scale` and `v_scale` beside each layer's attention.

compressed-tensors' `kv_cache_scheme` holds one scale a head or one in all. Scales for each channel have no place in it:
they are stored under the same names as fp32 `[kv_heads, head_dim]`, the scheme stays empty, and transformers, which
does not know what they are, passes over them.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from orin_kit.quantize.compressed import kv_scale_tensors

Granularity = Literal["channel", "head", "tensor"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
# What compressed-tensors calls them.
STRATEGIES: dict[Granularity, str | None] = {"channel": None, "head": "attn_head", "tensor": "tensor"}


def scale_tensors(
    layer: int, key: NDArray[np.float32], value: NDArray[np.float32], granularity: Granularity
) -> dict[str, NDArray[Any]]:
    """A layer's scales as they are stored.

    Args:
        layer: its index.
        key: fp32 `[kv_heads, head_dim]`; coarser granularities take the largest.
        value: likewise.
        granularity: what shares a scale.
    """
    strategy = STRATEGIES[granularity]
    if strategy is not None:
        stored: dict[str, NDArray[Any]] = {**kv_scale_tensors(layer, key.max(-1), value.max(-1), strategy)}
        return stored
    prefix = f"model.layers.{layer}.self_attn."
    return {f"{prefix}k_scale": key, f"{prefix}v_scale": value}


def scale_entries(
    layer: int, kv_heads: int, head_dim: int, granularity: Granularity
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The tensors of `scale_tensors`: name -> dtype, shape."""
    any_scales = np.ones((kv_heads, head_dim), np.float32)
    made = scale_tensors(layer, any_scales, any_scales, granularity)
    return {name: (tensor.dtype.type, tensor.shape) for name, tensor in made.items()}
