"""What a format of quantized checkpoints is: where a linear's weights lie, how they become a `PackedWeight`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.packing import PackedWeight, middle
from orin_kit.models.weights import WeightSource

MEND = "quantize the fp16 model with `orin-kit quantize`"
BROKEN = "copy the checkpoint whole or quantize it again"


@dataclass(frozen=True)
class Packing:
    """How a linear is quantized, known without reading its weights.

    Attributes:
        shape: `(out, in)`.
        bits: of a code, 4 or 8.
        group_size: input features that share a scale.
        has_zero_points: codes that mean zero are stored, and are not all the middle one.
        has_order: groups are neighbours only after sorting the input features.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    has_zero_points: bool = False
    has_order: bool = False


class Format(Protocol):
    """One checkpoint's scheme, in its format. `linear` is a name without `.weight`: "model.layers.0.mlp.up_proj".

    Implementations lie beside this file and are found by `quant_method` (see `registry`).

    Attributes:
        parts: what the tensors of a packed linear are called after its name, here and in compressed-tensors.
        weight_part: the one of them that holds the weights.
    """

    parts: ClassVar[Mapping[str, str]]
    weight_part: ClassVar[str]

    @property
    def kv_bits(self) -> int | None:
        """Bits of a KV cache whose scales the checkpoint holds; None without."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Format:
        """Read config.json's `quantization_config`.

        Raises:
            UnsupportedModelError: a field says something that the format does not read; it is named.
        """
        ...

    def packing(self, source: WeightSource, linear: str) -> Packing:
        """How a packed linear is quantized.

        Raises:
            ArtifactError: its tensors are missing or contradict each other or the config.
        """
        ...

    def read(self, source: WeightSource, linear: str) -> PackedWeight:
        """The linear in the canonical packing.

        Raises:
            ArtifactError: as `packing`.
        """
        ...


def unsupported(field: str, value: Any, wanted: Any) -> UnsupportedModelError:
    """That a field of `quantization_config` is not what a format reads."""
    what = f"quantization_config: {field} is {value!r}, only {wanted!r} is supported"
    return UnsupportedModelError(what, mend=MEND)


def broken(source: WeightSource, linear: str, what: str) -> ArtifactError:
    return ArtifactError(f"{source.directory}: {linear} {what}", mend=BROKEN)


def fp16_scales(source: WeightSource, linear: str, scales: NDArray[Any]) -> NDArray[np.float16]:
    """Scales in fp16, refused where that cannot hold them."""
    with np.errstate(over="ignore"):
        stored: NDArray[np.float16] = np.asarray(scales, np.float16)
    if not np.isfinite(stored).all():
        raise broken(source, linear, "has scales that are NaN, infinite or beyond fp16")
    return stored


def without_middle(zero_points: NDArray[np.uint8], bits: int) -> NDArray[np.uint8] | None:
    """None where every zero point is that of symmetric codes."""
    return None if (zero_points == middle(bits)).all() else zero_points


def sorting(source: WeightSource, linear: str, g_idx: NDArray[Any], groups: int) -> NDArray[np.int32] | None:
    """The order that makes groups neighbours, from each input feature's group `[in]`; None where they are already.

    Raises:
        ArtifactError: the groups are not all of one size.
    """
    size = len(g_idx) // groups
    order: NDArray[np.int32] = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], np.arange(groups).repeat(size)):
        raise broken(source, linear, f"has a g_idx that is not {groups} groups of {size} input features")
    return None if np.array_equal(order, np.arange(len(order))) else order
