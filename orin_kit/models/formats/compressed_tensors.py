"""compressed-tensors `pack-quantized`, as llm-compressor and orin-kit write it.

https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized, quantization/quant_config.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from orin_kit.models.formats.format import Packing, broken, fp16_scales, sorting, unsupported, without_middle
from orin_kit.models.packing import BITS, PackedWeight, reordered, unpack
from orin_kit.models.weights import WeightSource

FORMAT = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
MIXED = "mixed-precision"  # the format is said by each group


@dataclass(frozen=True)
class WeightScheme:
    """What one of `config_groups` says of its weights.

    Attributes:
        bits: 4 or 8.
        group_size: input features that share a scale; None: all of a row.
        symmetric: without zero points.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True


@dataclass(frozen=True)
class CompressedTensors:
    """See `Format`.

    Which linears are packed is read off their tensors; `targets` and `ignore` say the same once more.

    Attributes:
        schemes: of the config groups.
        kv_bits: of the KV cache whose scales are stored; None without.
    """

    schemes: tuple[WeightScheme, ...]
    kv_bits: int | None = None

    parts: ClassVar[Mapping[str, str]] = {part: part for part in PARTS}
    weight_part: ClassVar[str] = "weight_packed"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        form = config.get("format")
        if form not in (FORMAT, MIXED):
            raise unsupported("format", form, FORMAT)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise unsupported("config_groups", groups, "groups with targets and weights")
        schemes = tuple(_scheme(name, group, form) for name, group in groups.items())
        transforms, sparsity = config.get("transform_config") or {}, config.get("sparsity_config") or {}
        if transforms.get("config_groups"):  # rotations, some of them at run time
            raise unsupported("transform_config", transforms, None)
        if sparsity.get("format", "dense") != "dense":
            raise unsupported("sparsity_config.format", sparsity["format"], "dense")
        return cls(schemes, _kv_bits(config.get("kv_cache_scheme")))

    def packing(self, source: WeightSource, linear: str) -> Packing:
        packed, scales = source.get(f"{linear}.weight_packed"), source.get(f"{linear}.weight_scale")
        shape = tuple(int(n) for n in source.get(f"{linear}.weight_shape"))
        rows, columns = shape if len(shape) == 2 else (0, 0)
        bits = 32 * packed.shape[-1] // columns if columns > 0 else 0
        fits = packed.dtype == np.int32 and bits in BITS and packed.shape == (rows, columns * bits // 32)
        if not fits or columns * bits % 32 or scales.ndim != 2 or len(scales) != rows or columns % scales.shape[1]:
            stored = f"packed {packed.dtype} {list(packed.shape)} and scales {list(scales.shape)}"
            raise broken(source, linear, f"is said to be {list(shape)}, but has {stored}")
        group_size = columns // scales.shape[1]
        if not any(s.bits == bits and (s.group_size or columns) == group_size for s in self.schemes):
            raise broken(source, linear, f"has {bits} bits in groups of {group_size}, which no config group says")
        zero_points = self._zero_points(source, linear, scales.shape, bits)
        order = self._order(source, linear, columns, scales.shape[1])
        return Packing((rows, columns), bits, group_size, zero_points is not None, order is not None)

    def read(self, source: WeightSource, linear: str) -> PackedWeight:
        how = self.packing(source, linear)
        packed, scales = source.get(f"{linear}.weight_packed"), source.get(f"{linear}.weight_scale")
        order = self._order(source, linear, how.shape[1], scales.shape[1])
        if order is not None:  # the columns are stored as the features are
            packed = reordered(packed, order, how.bits)
        zero_points = self._zero_points(source, linear, scales.shape, how.bits)
        return PackedWeight(how.bits, packed, fp16_scales(source, linear, scales), zero_points, order)

    def _zero_points(
        self, source: WeightSource, linear: str, shape: tuple[int, ...], bits: int
    ) -> NDArray[np.uint8] | None:
        """uint8 `[out, groups]`, packed along the outputs: int32 `[ceil(out * bits / 32), groups]`."""
        name = f"{linear}.weight_zero_point"
        if name not in source:
            return None
        stored = source.get(name)
        words = -(-shape[0] * bits // 32)
        if stored.dtype != np.int32 or stored.shape != (words, shape[1]):
            raise broken(source, linear, f"has zero points {stored.dtype} {list(stored.shape)} for {list(shape)}")
        columns = unpack(np.ascontiguousarray(stored.T), bits)[:, : shape[0]]  # the rest fills the last word
        return without_middle(np.ascontiguousarray(columns.T), bits)

    def _order(self, source: WeightSource, linear: str, columns: int, groups: int) -> NDArray[np.int32] | None:
        name = f"{linear}.weight_g_idx"
        if name not in source:
            return None
        g_idx = source.get(name)
        if g_idx.shape != (columns,):
            raise broken(source, linear, f"has a g_idx of {list(g_idx.shape)} for {columns} input features")
        # Written as -1 throughout where the groups are neighbours.
        return None if (g_idx == -1).all() else sorting(source, linear, g_idx, groups)


def _scheme(name: str, group: Any, form: str) -> WeightScheme:
    if not isinstance(group, Mapping):
        raise unsupported(f"config_groups.{name}", group, "a group with targets and weights")
    if group.get("format", FORMAT if form == FORMAT else None) not in (FORMAT, None if form == FORMAT else FORMAT):
        raise unsupported(f"{name}.format", group.get("format"), FORMAT)
    for field in ("input_activations", "output_activations"):
        if group.get(field) is not None:
            raise unsupported(field, group[field], None)
    if not isinstance(group.get("targets"), list) or not group["targets"]:
        raise unsupported("targets", group.get("targets"), ["Linear"])
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise unsupported("weights", weights, "what the weights are")
    for field, wanted in (("num_bits", BITS), ("type", ("int",)), ("strategy", ("group", "channel"))):
        if weights.get(field) not in wanted:
            raise unsupported(f"weights.{field}", weights.get(field), " or ".join(map(str, wanted)))
    if weights.get("dynamic", False) is not False:
        raise unsupported("weights.dynamic", weights["dynamic"], False)
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (not isinstance(size, int) or size < 1):
        raise unsupported("weights.group_size", size, "a positive number")
    return WeightScheme(weights["num_bits"], size, bool(weights.get("symmetric", True)))


def _kv_bits(scheme: Any) -> int | None:
    """Of a KV cache in int8 with stored scales, the one kind that is read."""
    if scheme is None:
        return None
    for field, wanted in (("num_bits", (8,)), ("type", ("int",)), ("symmetric", (True,)), ("dynamic", (False,)),
                          ("strategy", ("tensor", "attn_head"))):  # fmt: skip
        value = scheme.get(field, wanted[0]) if isinstance(scheme, Mapping) else scheme
        if value not in wanted:
            raise unsupported(f"kv_cache_scheme.{field}", value, " or ".join(map(str, wanted)))
    return 8
