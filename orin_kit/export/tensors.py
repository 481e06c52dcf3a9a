"""A checkpoint's tensors as the exporter asks for them: by role, read only when the file is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.format import Packing
from orin_kit.models.packing import PackedWeight, middle
from orin_kit.models.spec import EMBEDDING, HEAD

MEND = "use --precision fp32 or fp16, which dequantizes"
# Group sizes that the dialects' operators take; larger and odd ones, a whole row's, are cut into the first that fits.
GROUPS, CUT = (256, 128, 64, 32, 16), (128, 64, 32, 16)


@dataclass(frozen=True)
class Linear:
    """One linear, or several that read the same input, their outputs side by side (q, k, v; gate, up).

    Attributes:
        name: what it is called in the graph.
        parts: checkpoint names, without `.weight`.
        in_features, out_features: of all parts together.
        bits: of a packed weight, 4 or 8; None when the weights are plain.
        group_size: input features that share a scale, one of `GROUPS`; None when the weights are plain.
        has_zero_points: the packed weight has zero points other than the middle.
        has_order: the packed weight's columns are the input features in another order.
        bias: whether a bias is added.
    """

    name: str
    parts: tuple[str, ...]
    in_features: int
    out_features: int
    bits: int | None
    group_size: int | None
    has_zero_points: bool
    has_order: bool
    bias: bool


class DecoderTensors:
    """The tensors of one decoder checkpoint, plain or quantized.

    Args:
        checkpoint: where they lie.
        dequantize: give packed weights as plain ones.

    Raises:
        ArtifactError: a tensor missing or of another shape (on use).
    """

    def __init__(self, checkpoint: Checkpoint, *, dequantize: bool = False) -> None:
        self.checkpoint, self.spec, self.dequantize = checkpoint, checkpoint.spec, dequantize
        self._last: tuple[tuple[str, ...], PackedWeight] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint has packed linears."""
        return self.checkpoint.is_quantized

    def linear(self, name: str, *parts: str, out_features: int, in_features: int) -> Linear:
        """Describe a linear; its parts are all plain or all packed in one way, with a bias or without."""
        biased = {f"{part}.bias" in self.checkpoint for part in parts}
        if len(biased) > 1:
            raise ArtifactError(f"{', '.join(parts)} differ in being biased", mend="give a checkpoint of this family")
        packings = [None if self.dequantize else self.checkpoint.packing(part) for part in parts]
        bits, group_size = _common(parts, packings)
        return Linear(
            name, parts, in_features, out_features, bits, group_size,
            has_zero_points=any(packing is not None and packing.has_zero_points for packing in packings),
            has_order=any(packing is not None and packing.has_order for packing in packings),
            bias=biased.pop(),
        )  # fmt: skip

    def head(self) -> Linear:
        """The output projection; a tied head is the embedding table."""
        tied = self.spec.tie_word_embeddings and not self.checkpoint.is_packed(HEAD)
        part = EMBEDDING if tied else HEAD
        return self.linear(HEAD, part, out_features=self.spec.vocab_size, in_features=self.spec.hidden_size)

    def dense(self, linear: Linear) -> NDArray[np.float32]:
        """Weights as fp32 `[out, in]`, dequantized when packed."""
        weights = [self.checkpoint.float32(f"{part}.weight") for part in linear.parts]
        return weights[0] if len(weights) == 1 else np.concatenate(weights)

    def packed(self, linear: Linear) -> PackedWeight:
        """A packed linear's weight, of all its parts; kept until the next: codes and scales come in turn.

        Raises:
            UnsupportedModelError: the parts order their columns differently.
        """
        if self._last is None or self._last[0] != linear.parts:
            assert linear.group_size is not None, f"{linear.name} is plain"
            weights = [self.checkpoint.packed(part).regrouped(linear.group_size) for part in linear.parts]
            self._last = linear.parts, _side_by_side(linear, weights)
        return self._last[1]

    def bias(self, linear: Linear) -> NDArray[np.float32]:
        """fp32 `[out]`."""
        return np.concatenate([self.checkpoint.float32(f"{part}.bias") for part in linear.parts])

    def embedding(self) -> NDArray[Any]:
        """The table `[vocab, hidden]` in its stored dtype."""
        return self.checkpoint.tensor(f"{EMBEDDING}.weight")

    def vector(self, name: str) -> NDArray[np.float32]:
        """The weight of what is no linear, fp32: of a norm, or of a convolution `[hidden, 1, conv_kernel_size]`."""
        return self.checkpoint.float32(f"{name}.weight")


def _common(parts: tuple[str, ...], packings: list[Packing | None]) -> tuple[int | None, int | None]:
    """Bits and group size of all parts."""
    bits = {None if packing is None else packing.bits for packing in packings}
    if len(bits) > 1:
        raise UnsupportedModelError(f"{', '.join(parts)} are quantized in different ways", mend=MEND)
    sizes = [packing.group_size for packing in packings if packing is not None]
    if not sizes:
        return None, None
    shared = math.gcd(*sizes)
    size = shared if shared in GROUPS else next((size for size in CUT if shared % size == 0), None)
    if size is None:
        raise UnsupportedModelError(f"{', '.join(parts)} have scales for {shared} input features each", mend=MEND)
    return bits.pop(), size


def _side_by_side(linear: Linear, weights: list[PackedWeight]) -> PackedWeight:
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(not _same(weight.order, first.order) for weight in weights):
        what = f"{', '.join(linear.parts)} order their input features differently (act-order)"
        raise UnsupportedModelError(what, mend=MEND)
    zero_points = None
    if any(weight.zero_points is not None for weight in weights):
        zero_points = np.concatenate([_zero_points(weight) for weight in weights])
    packed = np.concatenate([weight.packed for weight in weights])
    return PackedWeight(first.bits, packed, np.concatenate([w.scales for w in weights]), zero_points, first.order)


def _zero_points(weight: PackedWeight) -> NDArray[np.uint8]:
    if weight.zero_points is not None:
        return weight.zero_points
    return np.full(weight.scales.shape, middle(weight.bits), np.uint8)


def _same(one: NDArray[np.int32] | None, other: NDArray[np.int32] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)
