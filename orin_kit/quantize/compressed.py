"""compressed-tensors `pack-quantized` checkpoints, as we write them: their config and their tensors.

https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized, quantization/quant_config.py); read back
by `models/formats/compressed_tensors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.models.formats.compressed_tensors import FORMAT, WeightScheme
from orin_kit.models.packing import PackedWeight, middle, pack

KV_CACHE = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


def quantization_config(
    scheme: WeightScheme,
    *,
    ignored: Sequence[str] = (),
    others: Mapping[str, WeightScheme] | None = None,
    kv_strategy: str | None = None,
) -> dict[str, Any]:
    """The `quantization_config` that transformers and vLLM load.

    Args:
        scheme: of all linears that are not named otherwise.
        ignored: linears left plain, by name (`lm_head`).
        others: linears with a scheme of their own, by name.
        kv_strategy: of the KV cache's int8 scales, stored as `kv_scale_tensors` says: "tensor", "attn_head", or None
            without scales.
    """
    by_scheme: dict[WeightScheme, list[str]] = {}
    for name, other in (others or {}).items():
        by_scheme.setdefault(other, []).append(name)
    groups = [*((other, names) for other, names in by_scheme.items()), (scheme, ["Linear"])]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "weights": _weights(how),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for index, (how, targets) in enumerate(groups)
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None if kv_strategy is None else {**KV_CACHE, "strategy": kv_strategy},
    }


def packed_entries(name: str, shape: Sequence[int], scheme: WeightScheme) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The tensors that a linear `[out, in]` becomes: name -> dtype, shape."""
    rows, columns = shape
    groups = columns // (scheme.group_size or columns)
    entries: dict[str, tuple[Any, tuple[int, ...]]] = {
        f"{name}.weight_packed": (np.int32, (rows, columns * scheme.bits // 32)),
        f"{name}.weight_scale": (np.float16, (rows, groups)),
        f"{name}.weight_shape": (np.int64, (2,)),
    }
    if not scheme.symmetric:
        entries[f"{name}.weight_zero_point"] = (np.int32, (-(-rows * scheme.bits // 32), groups))
    return entries


def packed_tensors(name: str, weight: PackedWeight, *, symmetric: bool = True) -> dict[str, NDArray[Any]]:
    """The tensors of `packed_entries`; zero points are stored unless `symmetric`.

    Raises:
        ValueError: the weight has zero points but the scheme is symmetric, or has an order of columns.
    """
    if weight.order is not None or (symmetric and weight.zero_points is not None):
        raise ValueError(f"{name} has an order or zero points, which the scheme does not store")
    tensors: dict[str, NDArray[Any]] = {
        f"{name}.weight_packed": weight.packed,
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": np.array(weight.shape, np.int64),
    }
    if not symmetric:
        zero_points = weight.zero_points
        if zero_points is None:
            zero_points = np.full(weight.scales.shape, middle(weight.bits), np.uint8)
        tensors[f"{name}.weight_zero_point"] = _pack_rows(zero_points, weight.bits)
    return tensors


def kv_scale_tensors(
    layer: int, key: NDArray[np.float32], value: NDArray[np.float32], kv_strategy: str
) -> dict[str, NDArray[np.float16]]:
    """A layer's `k_scale` and `v_scale`, so that `cached = round(x / scale)` in int8.

    Args:
        layer: its index.
        key: fp32 `[kv_heads]`; with the strategy "tensor" the largest serves all.
        value: likewise.
        kv_strategy: "tensor" (stored as `[1]`) or "attn_head" (`[kv_heads, 1, 1]`).
    """
    stored = {}
    for name, scales in (("k_scale", key), ("v_scale", value)):
        shaped = scales.max(keepdims=True) if kv_strategy == "tensor" else scales.reshape(-1, 1, 1)
        stored[f"model.layers.{layer}.self_attn.{name}"] = shaped.astype(np.float16)
    return stored


def _weights(scheme: WeightScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def _pack_rows(zero_points: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Zero points uint8 `[out, groups]` -> int32 `[ceil(out * bits / 32), groups]`, neighbouring outputs in a word."""
    columns = np.ascontiguousarray(zero_points.T)
    filled = np.pad(columns, ((0, 0), (0, -columns.shape[1] % (32 // bits))))
    return np.ascontiguousarray(pack(filled, bits).T)
