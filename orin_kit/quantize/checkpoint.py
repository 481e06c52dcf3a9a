"""A decoder checkpoint cut into the sections that are quantized one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec, read_spec
from orin_kit.models.weights import WeightSource
from orin_kit.quantize.compressed import Int4Config, packed_entries, read_packed
from orin_kit.quantize.int4 import check_group_size, dequantize, unpack
from orin_kit.quantize.tensor_files import Plan


@dataclass(frozen=True)
class Section:
    """The embedding, one decoder layer, or the head with the norm before it.

    Attributes:
        name: for reports.
        linears: what becomes INT4, without `.weight` -> `(out, in)`.
        plain: tensors kept as fp16 -> shape.
    """

    name: str
    linears: dict[str, tuple[int, int]]
    plain: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Quantized:
    """A section's new tensors.

    Attributes:
        tensors: by name; packed linears as `compressed.packed_tensors` has them, the others in any float dtype.
        loss: squared error relative to what it should be, of the weights (rtn) or of the section's outputs (awq);
            None where nothing was quantized.
    """

    section: str
    tensors: dict[str, NDArray[Any]]
    loss: float | None = None


class Checkpoint:
    """A model directory's spec and weights, plain or INT4.

    Raises:
        ArtifactError: config or weights missing or broken, or tensors that the config does not explain.
        UnsupportedModelError: a family, field or quantization that orin-kit does not know.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.spec = read_spec(directory)
        config = self.spec.quantization_config
        self.int4 = None if config is None else Int4Config.from_config(config)
        self.source = WeightSource(directory)
        self._shapes = _plain_shapes(self.spec)

    def tensor(self, name: str) -> NDArray[Any]:
        """A plain tensor in its stored dtype, a view of mapped memory; a tied head is the embedding table.

        Raises:
            ArtifactError: it is missing or of another shape than the config says.
        """
        stored = f"{EMBEDDING}.weight" if name == f"{HEAD}.weight" and self.spec.tie_word_embeddings else name
        return self._checked(name, self.source.get(stored))

    def float32(self, name: str) -> NDArray[np.float32]:
        """A tensor as a fresh fp32 array, dequantized when it is stored as INT4."""
        linear = name.removesuffix(".weight")
        if self.int4 is None or f"{linear}.weight_packed" not in self.source:
            return np.array(self.tensor(name), np.float32)
        stored = read_packed(self.source, linear)
        return self._checked(name, dequantize(unpack(stored.packed), stored.scales, self.int4.group_size))

    def check_complete(self) -> None:
        """Say that the weights are not those of the config.

        Raises:
            ArtifactError: a tensor is missing, or of another shape.
            UnsupportedModelError: there are tensors that this family does not have.
        """
        for name in self._shapes:
            self.tensor(name)
        # Tied checkpoints may repeat the head, and old ones hold the rotary frequencies.
        extra = sorted(n for n in self.source.names if n not in self._shapes and not n.endswith("rotary_emb.inv_freq"))
        if extra:
            what = f"{self.directory} has {len(extra)} tensors that {self.spec.model_type} does not, e.g. {extra[0]}"
            raise UnsupportedModelError(what, mend="give a plain checkpoint (merge adapters into it first)")

    def _checked(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        if tensor.shape != self._shapes[name]:
            what = f"{self.directory}: {name} is {list(tensor.shape)}, config.json says {list(self._shapes[name])}"
            raise ArtifactError(what, mend="the weights do not belong to this config.json; get both from one model")
        return tensor


def sections(spec: DecoderSpec, *, lm_head: bool) -> list[Section]:
    """All of a checkpoint, in the order of computation; `lm_head` says whether the head becomes INT4."""
    table = (spec.vocab_size, spec.hidden_size)
    cut = [Section("embedding", {}, {f"{EMBEDDING}.weight": table})]
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        linears = {f"{prefix}.{name}": shape for name, shape in spec.linear_shapes().items()}
        plain = {f"{prefix}.{name}": shape for name, shape in spec.plain_shapes().items()}
        cut.append(Section(f"layer {layer}", linears, plain))
    norm: dict[str, tuple[int, ...]] = {f"{spec.layout.norm}.weight": (spec.hidden_size,)}
    if not lm_head and not spec.tie_word_embeddings:
        norm[f"{HEAD}.weight"] = table
    cut.append(Section("head", {HEAD: table} if lm_head else {}, norm))
    return cut


def plan(cut: Sequence[Section], group_size: int) -> Plan:
    """The tensors that the quantized sections will have.

    Raises:
        UserError: groups of this size do not fit a linear (the largest size that fits all is named).
    """
    linears = {name: shape for section in cut for name, shape in section.linears.items()}
    common = int(np.gcd.reduce([shape[1] for shape in linears.values()]))
    for name, shape in linears.items():
        check_group_size(name, shape[1], group_size, common=common)
    entries: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for section in cut:
        entries |= {name: (np.float16, shape) for name, shape in section.plain.items()}
        for name, shape in section.linears.items():
            entries |= packed_entries(name, shape, group_size)
    return entries


def _plain_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the unquantized checkpoint, the head among them even where it is tied."""
    shapes: dict[str, tuple[int, ...]] = {}
    for section in sections(spec, lm_head=True):
        shapes |= section.plain
        shapes |= {f"{name}.weight": shape for name, shape in section.linears.items()}
    return shapes
