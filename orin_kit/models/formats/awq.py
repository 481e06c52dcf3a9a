"""AutoAWQ's checkpoints (`quant_method: awq`, version `gemm`), as AutoAWQ and GPTQModel write them.

https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py): `qweight` int32 `[in, out / 8]`, `qzeros` int32
`[groups, out / 8]`, `scales` fp16 `[groups, out]`; a word holds eight neighbouring outputs in the order of `ORDER`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from orin_kit.models.formats.format import Packing, broken, fp16_scales, unsupported, without_middle
from orin_kit.models.packing import PackedWeight, pack
from orin_kit.models.weights import WeightSource

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output the n-th four bits of a word are


@dataclass(frozen=True)
class Awq:
    """See `Format`. Codes are 4 bits, zero points are stored even where they are all the middle."""

    parts: ClassVar[Mapping[str, str]] = {
        "qweight": "weight_packed", "qzeros": "weight_zero_point", "scales": "weight_scale", "g_idx": "weight_g_idx"
    }  # fmt: skip
    weight_part: ClassVar[str] = "qweight"
    kv_bits: ClassVar[None] = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Awq:
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise unsupported("bits", bits, 4)
        for field in ("version", "format", "checkpoint_format"):
            if str(config.get(field, "gemm")).lower() != "gemm":
                raise unsupported(field, config[field], "gemm")
        if config.get("backend") == "llm-awq":  # packed otherwise
            raise unsupported("backend", config["backend"], "autoawq")
        return cls()

    def packing(self, source: WeightSource, linear: str) -> Packing:
        qweight, scales = source.get(f"{linear}.qweight"), source.get(f"{linear}.scales")
        columns, words = qweight.shape if qweight.ndim == 2 else (0, 0)
        rows, groups = 8 * words, len(scales) if scales.ndim else 0
        fits = qweight.dtype == np.int32 and columns and groups and columns % (8 * groups) == 0
        if not fits or scales.shape != (groups, rows):
            stored = f"{qweight.dtype} {list(qweight.shape)} and scales {list(scales.shape)}"
            raise broken(source, linear, f"has a qweight {stored}")
        zero_points = self._zero_points(source, linear, (groups, words))
        return Packing((rows, columns), 4, columns // groups, zero_points is not None)

    def read(self, source: WeightSource, linear: str) -> PackedWeight:
        how = self.packing(source, linear)
        packed = pack(_outputs_first(source.get(f"{linear}.qweight")))
        scales = np.ascontiguousarray(source.get(f"{linear}.scales").T)
        zero_points = self._zero_points(source, linear, (how.shape[1] // how.group_size, how.shape[0] // 8))
        return PackedWeight(4, packed, fp16_scales(source, linear, scales), zero_points)

    def _zero_points(self, source: WeightSource, linear: str, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
        if f"{linear}.qzeros" not in source:
            return None
        stored = source.get(f"{linear}.qzeros")
        if stored.dtype != np.int32 or stored.shape != shape:
            raise broken(source, linear, f"has qzeros {stored.dtype} {list(stored.shape)} where {list(shape)} fit")
        return without_middle(_outputs_first(stored), 4)


def _outputs_first(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32 `[n, out / 8]` -> codes uint8 `[out, n]`."""
    columns = np.ascontiguousarray(words.T).view(np.uint32)  # words are fewer to transpose than codes: 10 times as fast
    codes = np.empty((len(columns), 8, columns.shape[1]), np.uint8)
    for place, output in enumerate(ORDER):
        codes[:, output] = columns >> np.uint32(4 * place) & np.uint32(15)
    return codes.reshape(-1, columns.shape[1])
