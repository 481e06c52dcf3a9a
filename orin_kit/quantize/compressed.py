"""compressed-tensors `pack-quantized` checkpoints: what their config says, and their tensors, in and out.

https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized, quantization/quant_config.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.weights import WeightSource
from orin_kit.quantize.int4 import GROUP_SIZES, pack

MEND = "quantize the fp16 model with `orin-kit quantize`"
# What a group of weights must say to be the one kind of INT4 we know.
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}


@dataclass(frozen=True)
class Int4Config:
    """A checkpoint's INT4 scheme.

    Attributes:
        group_size: input features that share a scale.
        ignored: linears left as they were, by name (`lm_head`).
    """

    group_size: int
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Int4Config:
        """Read config.json's `quantization_config`.

        Raises:
            UnsupportedModelError: another method, format or scheme than symmetric group-wise INT4 on all linears.
        """
        for field, wanted in (("quant_method", "compressed-tensors"), ("format", "pack-quantized")):
            if config.get(field) != wanted:
                raise _unsupported(field, config.get(field), wanted)
        if config.get("kv_cache_scheme") is not None:
            raise _unsupported("kv_cache_scheme", config["kv_cache_scheme"], None)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
            raise _unsupported("config_groups", groups, "one group")
        group = next(iter(groups.values()))
        if group.get("targets") != ["Linear"]:
            raise _unsupported("targets", group.get("targets"), ["Linear"])
        for field in ("input_activations", "output_activations"):
            if group.get(field) is not None:
                raise _unsupported(field, group[field], None)
        weights = group.get("weights") or {}
        for field, expected in WEIGHTS.items():
            if weights.get(field, expected if field == "dynamic" else None) != expected:
                raise _unsupported(f"weights.{field}", weights.get(field), expected)
        if weights.get("group_size") not in GROUP_SIZES:
            raise _unsupported("weights.group_size", weights.get("group_size"), f"one of {GROUP_SIZES}")
        ignored = tuple(config.get("ignore") or ())
        if any(name.startswith("re:") for name in ignored):
            raise _unsupported("ignore", list(ignored), "plain names")
        return cls(group_size=weights["group_size"], ignored=ignored)

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` that transformers and vLLM load."""
        weights = {**WEIGHTS, "group_size": self.group_size}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": list(self.ignored),
            "kv_cache_scheme": None,
        }


@dataclass(frozen=True)
class Packed:
    """A stored INT4 weight: packed int32 `[out, in / 8]` (see `int4.pack`), scales fp16 `[out, in / group_size]`."""

    packed: NDArray[np.int32]
    scales: NDArray[np.float16]


def read_packed(source: WeightSource, name: str) -> Packed:
    """Read the linear `name` ("model.layers.0.mlp.up_proj"), views of mapped memory where dtypes allow.

    Raises:
        ArtifactError: a tensor is missing, or their shapes contradict each other.
        UnsupportedModelError: it has zero points or reordered input features.
    """
    for extra in ("weight_zero_point", "weight_g_idx"):
        if f"{name}.{extra}" in source:
            raise UnsupportedModelError(f"{source.directory}: {name} has {extra}, which is not supported", mend=MEND)
    packed, scales = source.get(f"{name}.weight_packed"), source.get(f"{name}.weight_scale")
    shape = tuple(int(n) for n in source.get(f"{name}.weight_shape"))
    rows, columns = shape if len(shape) == 2 else (0, 0)
    fits = packed.dtype == np.int32 and packed.shape == (rows, columns // 8) and columns > 0 and columns % 8 == 0
    if not fits or scales.ndim != 2 or scales.shape[0] != rows or scales.shape[1] < 1 or columns % scales.shape[1]:
        what = (
            f"{source.directory}: {name} is said to be {list(shape)}, but has packed {packed.dtype} "
            f"{list(packed.shape)} and scales {list(scales.shape)}"
        )
        raise ArtifactError(what, mend="copy the checkpoint whole or quantize it again")
    return Packed(packed, np.asarray(scales, np.float16))


def packed_entries(name: str, shape: Sequence[int], group_size: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The tensors that a linear `[out, in]` becomes: name -> dtype, shape."""
    rows, columns = shape
    return {
        f"{name}.weight_packed": (np.int32, (rows, columns // 8)),
        f"{name}.weight_scale": (np.float16, (rows, columns // group_size)),
        f"{name}.weight_shape": (np.int64, (2,)),
    }


def packed_tensors(name: str, q: NDArray[np.int8], scales: NDArray[np.float16]) -> dict[str, NDArray[Any]]:
    """The tensors of `packed_entries`, from what `quantize_groups` returns."""
    return {
        f"{name}.weight_packed": pack(q),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": np.array(q.shape, np.int64),
    }


def _unsupported(field: str, value: Any, wanted: Any) -> UnsupportedModelError:
    what = f"quantization_config: {field} is {value!r}, only {wanted!r} is supported"
    return UnsupportedModelError(what, mend=MEND)
