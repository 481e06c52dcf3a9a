"""GPTQ checkpoints (`quant_method: gptq`), as AutoGPTQ, optimum and GPTQModel write them.

https://github.com/ModelCloud/GPTQModel (gptqmodel/nn_modules/qlinear): `qweight` int32 `[in * bits / 32, out]`,
`qzeros` int32 `[groups, out * bits / 32]`, `scales` fp16 `[groups, out]`, `g_idx` int32 `[in]`, each input's group.
The first format subtracts 1 from all zero points, "gptq_v2" stores them as they are.
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

V1, V2 = "gptq", "gptq_v2"
ONES = {4: 0x11111111, 8: 0x01010101}  # 1 for each zero point of a word


@dataclass(frozen=True)
class Gptq:
    """See `Format`.

    Attributes:
        bits: of linears that do not say otherwise by the length of their `g_idx` (GPTQModel's `dynamic`).
        zeros_less_one: zero points are stored minus 1.
    """

    bits: int
    zeros_less_one: bool

    parts: ClassVar[Mapping[str, str]] = {
        "qweight": "weight_packed", "qzeros": "weight_zero_point", "scales": "weight_scale", "g_idx": "weight_g_idx"
    }  # fmt: skip
    weight_part: ClassVar[str] = "qweight"
    kv_bits: ClassVar[None] = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Gptq:
        bits = config.get("bits")
        if bits not in BITS:
            raise unsupported("bits", bits, "4 or 8")
        form = V1
        for field in ("format", "checkpoint_format"):  # the second is the older name
            form = config.get(field) or form
            if form not in (V1, V2):
                raise unsupported(field, form, f"{V1} or {V2}")
        if config.get("pack_dtype", "int32") != "int32":
            raise unsupported("pack_dtype", config["pack_dtype"], "int32")
        # These change what the linears compute: a LoRA beside them, rotated or quantized inputs.
        for field in ("adapter", "rotation", "activation"):
            if config.get(field):
                raise unsupported(field, config[field], None)
        return cls(int(bits), zeros_less_one=form == V1)

    def packing(self, source: WeightSource, linear: str) -> Packing:
        qweight, scales = source.get(f"{linear}.qweight"), source.get(f"{linear}.scales")
        words, rows = qweight.shape if qweight.ndim == 2 else (0, 0)
        g_idx = f"{linear}.g_idx"
        columns = source.shape(g_idx)[0] if g_idx in source and source.shape(g_idx) else words * 32 // self.bits
        bits, groups = 32 * words // columns if columns else 0, len(scales) if scales.ndim else 0
        fits = qweight.dtype == np.int32 and bits in BITS and words * 32 == columns * bits
        if not fits or not groups or columns % groups or scales.shape != (groups, rows):
            stored = f"{qweight.dtype} {list(qweight.shape)}, scales {list(scales.shape)}"
            raise broken(source, linear, f"has a qweight {stored} for {columns} input features")
        zero_points = self._zero_points(source, linear, bits, scales.shape)
        order = self._order(source, linear, groups)
        return Packing((rows, columns), bits, columns // groups, zero_points is not None, order is not None)

    def read(self, source: WeightSource, linear: str) -> PackedWeight:
        how = self.packing(source, linear)
        # Neighbouring inputs share a word, the first in its lowest bits: the canonical packing, transposed.
        packed = np.ascontiguousarray(source.get(f"{linear}.qweight").T)
        stored = source.get(f"{linear}.scales")
        order = self._order(source, linear, len(stored))
        if order is not None:
            packed = reordered(packed, order, how.bits)
        zero_points = self._zero_points(source, linear, how.bits, stored.shape)
        scales = fp16_scales(source, linear, np.ascontiguousarray(stored.T))
        return PackedWeight(how.bits, packed, scales, zero_points, order)

    def _zero_points(
        self, source: WeightSource, linear: str, bits: int, shape: tuple[int, ...]
    ) -> NDArray[np.uint8] | None:
        """uint8 `[out, groups]`."""
        stored = source.get(f"{linear}.qzeros")
        groups, rows = shape
        if stored.dtype != np.int32 or stored.shape != (groups, -(-rows * bits // 32)):
            raise broken(source, linear, f"has qzeros {stored.dtype} {list(stored.shape)} for scales {list(shape)}")
        if self.zeros_less_one:
            # A word at a time, as GPTQModel subtracts and adds them: a zero point of 0 borrows from its neighbour.
            stored = (stored.view(np.uint32) + np.uint32(ONES[bits])).view(np.int32)
        zero_points = unpack(stored, bits)[:, :rows]
        return without_middle(np.ascontiguousarray(zero_points.T), bits)

    def _order(self, source: WeightSource, linear: str, groups: int) -> NDArray[np.int32] | None:
        name = f"{linear}.g_idx"
        return sorting(source, linear, source.get(name), groups) if name in source else None
