"""A decoder checkpoint cut into the sections that are quantized one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec
from orin_kit.quantize.compressed import packed_entries
from orin_kit.quantize.int4 import check_group_size
from orin_kit.quantize.tensor_files import Plan


@dataclass(frozen=True)
class Section:
    """The embedding, one decoder layer, or the head with the norm before it.

    A table that embedding and head share is quantized with the embedding, which then has a linear: the head.

    Attributes:
        name: for reports.
        linears: what is quantized, without `.weight` -> `(out, in)`.
        plain: tensors kept as fp16 -> shape.
        scheme: of the linears.
        cache_scales: of the layer's KV cache: name -> dtype, shape.
    """

    name: str
    linears: dict[str, tuple[int, int]]
    plain: dict[str, tuple[int, ...]]
    scheme: WeightScheme = field(default_factory=WeightScheme)
    cache_scales: Plan = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        assert self.scheme.group_size is not None
        return self.scheme.group_size


@dataclass(frozen=True)
class Quantized:
    """A section's new tensors.

    Attributes:
        tensors: by name; packed linears as `compressed.packed_tensors` has them, the others in any float dtype.
        loss: squared error relative to what it should be, of the weights (rtn) or of the section's outputs (awq, gptq);
            None where nothing was quantized.
    """

    section: str
    tensors: dict[str, NDArray[Any]]
    loss: float | None = None


def sections(
    spec: DecoderSpec,
    scheme: WeightScheme,
    head: WeightScheme | None,
    *,
    tied: bool = False,
    cache_scales: Sequence[Plan] = (),
) -> list[Section]:
    """All of a checkpoint, in the order of computation.

    Args:
        spec: the checkpoint's.
        scheme: of the decoder layers' linears.
        head: of the head; None leaves it in fp16.
        tied: the quantized head is the embedding table too.
        cache_scales: of each layer's KV cache; empty without.
    """
    table = (spec.vocab_size, spec.hidden_size)
    packed_head = {} if head is None else {HEAD: table}
    of_head = head or scheme
    cut = [Section("embedding", packed_head if tied else {}, {f"{EMBEDDING}.weight": table}, of_head)]
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        linears = {f"{prefix}.{name}": shape for name, shape in spec.linear_shapes().items()}
        plain = {f"{prefix}.{name}": shape for name, shape in spec.plain_shapes().items()}
        cut.append(Section(f"layer {layer}", linears, plain, scheme, cache_scales[layer] if cache_scales else {}))
    norm: dict[str, tuple[int, ...]] = {f"{spec.layout.norm}.weight": (spec.hidden_size,)}
    if head is None and not spec.tie_word_embeddings:
        norm[f"{HEAD}.weight"] = table
    return [*cut, Section("head", {} if tied else packed_head, norm, of_head)]


def plan(cut: Sequence[Section]) -> Plan:
    """The tensors that the quantized sections will have.

    Raises:
        UserError: groups of this size do not fit a linear (the largest size that fits all is named).
    """
    common = int(np.gcd.reduce([shape[1] for section in cut for shape in section.linears.values()]))
    entries: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for section in cut:
        for name, shape in section.linears.items():
            check_group_size(name, shape[1], section.group_size, common=common)
            entries |= packed_entries(name, shape, section.scheme)
        entries |= {name: (np.float16, shape) for name, shape in section.plain.items()}
        entries |= section.cache_scales
    return entries
