"""A checkpoint's tensors as the exporter asks for them: by role, read only when the file is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError
from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec
from orin_kit.models.weights import WeightSource
from orin_kit.quantize.compressed import Int4Config, read_packed
from orin_kit.quantize.int4 import dequantize, unpack


@dataclass(frozen=True)
class Linear:
    """One linear, or several that read the same input, their outputs side by side (q, k, v; gate, up).

    Attributes:
        name: what it is called in the graph.
        parts: checkpoint names, without `.weight`.
        in_features, out_features: of all parts together.
        group_size: input features that share a scale; None when the weights are plain.
        bias: whether a bias is added.
    """

    name: str
    parts: tuple[str, ...]
    in_features: int
    out_features: int
    group_size: int | None
    bias: bool


class DecoderTensors:
    """The tensors of one decoder checkpoint, plain or INT4.

    Args:
        directory: the checkpoint.
        spec: its spec.
        dequantize: give INT4 weights as plain ones.

    Raises:
        ArtifactError: weights missing or cut short (on opening), a tensor missing or of another shape (on use).
    """

    def __init__(self, directory: str | Path, spec: DecoderSpec, *, dequantize: bool = False) -> None:
        self.spec, self.dequantize = spec, dequantize
        self.source = WeightSource(directory)
        self.int4 = Int4Config.from_config(spec.quantization_config) if spec.quantization_config else None

    def linear(self, name: str, *parts: str, out_features: int, in_features: int) -> Linear:
        """Describe a linear; all its parts are plain or all are packed, with a bias or without."""
        packed = {self._is_packed(part) for part in parts}
        biased = {f"{part}.bias" in self.source for part in parts}
        if len(packed) > 1 or len(biased) > 1:
            raise ArtifactError(f"{', '.join(parts)} differ in being quantized or biased", mend="quantize them alike")
        is_packed = packed.pop()
        if is_packed and self.int4 is None:
            raise ArtifactError(f"{parts[0]} is packed, but config.json has no quantization_config", mend="restore it")
        group_size = self.int4.group_size if self.int4 and is_packed and not self.dequantize else None
        return Linear(name, parts, in_features, out_features, group_size, biased.pop())

    def head(self) -> Linear:
        """The output projection; a tied head is the embedding table."""
        tied = self.spec.tie_word_embeddings and not self._is_packed(HEAD)
        part = EMBEDDING if tied else HEAD
        return self.linear(HEAD, part, out_features=self.spec.vocab_size, in_features=self.spec.hidden_size)

    def dense(self, linear: Linear) -> NDArray[np.float32]:
        """Weights as fp32 `[out, in]`, dequantized when packed."""
        weight = np.concatenate([self._dense(part) for part in linear.parts])
        return _checked(weight, (linear.out_features, linear.in_features), linear.parts)

    def packed(self, linear: Linear) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
        """INT4 weights int32 `[out, in / 8]` in the canonical packing, their scales fp16 `[out, in / group_size]`."""
        read = [read_packed(self.source, part) for part in linear.parts]
        packed = np.concatenate([part.packed for part in read])
        _checked(packed, (linear.out_features, linear.in_features // 8), linear.parts)
        return packed, np.concatenate([part.scales for part in read])

    def bias(self, linear: Linear) -> NDArray[np.float32]:
        """fp32 `[out]`."""
        return np.concatenate([self.source.float32(f"{part}.bias") for part in linear.parts])

    def embedding(self) -> NDArray[Any]:
        """The table `[vocab, hidden]` in its stored dtype."""
        table = self.source.get(f"{EMBEDDING}.weight")
        return _checked(table, (self.spec.vocab_size, self.spec.hidden_size), (EMBEDDING,))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight, fp32."""
        return self.source.float32(f"{name}.weight")

    def conv(self, name: str) -> NDArray[np.float32]:
        """A depthwise convolution's weight, fp32 `[hidden, 1, conv_kernel_size]`."""
        shape = (self.spec.hidden_size, 1, self.spec.conv_kernel_size)
        return _checked(self.source.float32(f"{name}.weight"), shape, (name,))

    def _is_packed(self, part: str) -> bool:
        return f"{part}.weight_packed" in self.source

    def _dense(self, part: str) -> NDArray[np.float32]:
        if not self._is_packed(part):
            return self.source.float32(f"{part}.weight")
        assert self.int4 is not None
        read = read_packed(self.source, part)
        return dequantize(unpack(read.packed), read.scales, self.int4.group_size)


def _checked(array: NDArray[Any], shape: tuple[int, ...], parts: tuple[str, ...]) -> NDArray[Any]:
    if array.shape != shape:
        what = f"{', '.join(parts)}: the weights have shape {array.shape}, config.json says {shape}"
        raise ArtifactError(what, mend="the weights do not belong to this config.json; get both from one model")
    return array
