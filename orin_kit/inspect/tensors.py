"""What the tensors of a decoder are for, whether in a checkpoint, in an ONNX file, or only planned."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec

# Parts of packed linears and tables, by the last part of the name, as compressed-tensors and the exporter call them.
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
BESIDE = (SCALE, "weight_zero_point", "weight_g_idx", "order")  # what packed weights are read with
# Rotary frequencies of old checkpoints; scales of an int8 KV cache.
HARMLESS = ("inv_freq", "k_scale", "v_scale", "k_zero_point", "v_zero_point")
KINDS = ("embedding", "head", "mixer", "mlp", "norms_and_biases", "rotary", "other")
GROUP, TABLE_GROUP = 128, 32  # what quantize and export do by default: linears, embedding


@dataclass(frozen=True)
class Tensor:
    """A stored tensor.

    Attributes:
        name: whatever the format, packed linears' parts are called as compressed-tensors calls them.
        dtype: as safetensors calls it.
        shape: outputs first.
        bytes: as stored.
        bits: of packed weights where they are known; see `bits_of`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    bits: int | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def part(self) -> str:
        return self.name.rpartition(".")[2]


class KindBytes(BaseModel):
    """The tensors of one kind.

    Attributes:
        kind: one of `KINDS`; "mixer" is what lets positions see each other, the convolution's own kernel among it.
        parameters: weights and biases, packed ones counted one by one, scales not at all.
        dtypes: of the weights, packed ones as INT4 or INT8.
        packed_bytes, scale_bytes, plain_bytes: packed weights, their scales, zero points and order, everything else.
        token_bytes: what one decoded token must read: of an embedding one row, unless it is the head too.
    """

    kind: str
    parameters: int = 0
    dtypes: list[str] = []
    packed_bytes: int = 0
    scale_bytes: int = 0
    plain_bytes: int = 0
    token_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.packed_bytes + self.scale_bytes + self.plain_bytes


def by_kind(tensors: Sequence[Tensor], spec: DecoderSpec) -> list[KindBytes]:
    """Sort tensors by what they are for; kinds without any are left out."""
    tensors = _tables_apart(tensors)
    found: dict[str, KindBytes] = {}
    for tensor in tensors:
        kind = kind_of(tensor.name, spec)
        row = found.setdefault(kind, KindBytes(kind=kind))
        if tensor.part == PACKED:
            bits = bits_of(tensor, spec)
            row.packed_bytes += tensor.bytes
            row.parameters += tensor.bytes * 8 // bits
            _note(row.dtypes, f"INT{bits}")
        elif tensor.part in BESIDE:
            row.scale_bytes += tensor.bytes
        else:
            row.plain_bytes += tensor.bytes
            if kind in KINDS[:5]:
                row.parameters += math.prod(tensor.shape)
            if kind != "other":
                _note(row.dtypes, tensor.dtype)
    has_head = "head" in found
    for kind, row in found.items():
        row.token_bytes = row.bytes
        if kind == "embedding" and has_head:
            row.token_bytes = row.bytes // spec.vocab_size
        elif kind == "rotary":  # the tables' rows are positions
            row.token_bytes = sum(t.bytes // max(1, t.shape[0]) for t in tensors if kind_of(t.name, spec) == kind)
        elif kind == "other":
            row.token_bytes = 0
    return [found[kind] for kind in KINDS if kind in found]


def kind_of(name: str, spec: DecoderSpec) -> str:
    """One of `KINDS`."""
    layout = spec.layout
    module, _, part = re.sub(r"^model\.layers\.\d+\.", "", name).rpartition(".")
    norms = {layout.mixer_norm, layout.mlp_norm, layout.norm, "self_attn.q_norm", "self_attn.k_norm"}
    if part not in ("weight", "bias", PACKED, *BESIDE):
        return "rotary" if module == "rotary" else "other"
    if part == "bias" or module in norms:
        return "norms_and_biases"
    if module in (EMBEDDING, HEAD):
        return "embedding" if module == EMBEDDING else "head"
    inside = module.partition(".")[0]
    blocks = {layout.mixer_out.partition(".")[0]: "mixer", layout.gate.partition(".")[0]: "mlp"}
    return blocks.get(inside, "other") if module.count(".") == 1 else "other"


def planned(spec: DecoderSpec, *, int4: bool, embedding_bits: int = 16) -> list[Tensor] | None:
    """The tensors that a model has in FP16, or after `quantize` and `export --activations fp16`: INT4 with its head.

    None where the groups do not divide the features.
    """
    shapes = spec.tensor_shapes()
    if not int4:
        return [Tensor(name, "F16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]
    linears = {f"model.layers.{layer}.{n}" for layer in range(spec.num_hidden_layers) for n in spec.linear_shapes()}
    shapes[f"{HEAD}.weight"] = shapes[f"{EMBEDDING}.weight"]
    tensors: list[Tensor] = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        bits, group = (4, GROUP) if module in linears or module == HEAD else (16, 1)
        if module == EMBEDDING and embedding_bits < 16:
            bits, group = embedding_bits, TABLE_GROUP
        if shape[-1] % group:
            return None
        if bits == 16:
            tensors.append(Tensor(name, "F16", shape, 2 * math.prod(shape)))
            continue
        packed, scales = (shape[0], shape[1] * bits // 8), (shape[0], shape[1] // group)
        tensors.append(Tensor(f"{module}.{PACKED}", "U8", packed, math.prod(packed), bits))
        tensors.append(Tensor(f"{module}.{SCALE}", "F16", scales, 2 * math.prod(scales)))
    return tensors


def mismatches(tensors: Iterable[Tensor], rows: Sequence[KindBytes], spec: DecoderSpec, *, names: bool) -> list[str]:
    """What the config says and the files do not hold, one line each; empty when all is well.

    Args:
        tensors: what is stored.
        rows: the same by kind.
        spec: the config's.
        names: also compare names and shapes, for checkpoints; in graphs q, k and v are one tensor.
    """
    said: list[str] = []
    expected = spec.tensor_shapes()
    found = {row.kind: row.parameters for row in rows}
    if "head" in found and spec.tie_word_embeddings:  # stored beside the table all the same
        expected[f"{HEAD}.weight"] = expected[f"{EMBEDDING}.weight"]
    wanted: dict[str, int] = {}
    for name, shape in expected.items():
        kind = kind_of(name, spec)
        wanted[kind] = wanted.get(kind, 0) + math.prod(shape)
    for kind in KINDS[:5]:
        if found.get(kind, 0) != wanted.get(kind, 0):
            label = kind.replace("_", " ")
            said.append(
                f"{label}: config.json says {wanted.get(kind, 0):,} parameters, files hold {found.get(kind, 0):,}"
            )
    if names:
        said += _compare_names(tensors, expected)
    return said


def _compare_names(tensors: Iterable[Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if tensor.part == PACKED:
            columns = 8 * tensor.bytes // (tensor.bits or 4) // max(1, tensor.shape[0])
            shapes[f"{tensor.module}.weight"] = (tensor.shape[0], columns)
        elif tensor.part not in (SHAPE, *BESIDE, *HARMLESS):
            shapes[tensor.name] = tensor.shape
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    said = [f"{len(names)} tensors {what}, e.g. {names[0]}"
            for what, names in (("are missing", missing), ("do not belong to the family", extra)) if names]  # fmt: skip
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != expected[name]:
            said.append(f"{name} is {list(shapes[name])}, config.json says {list(expected[name])}")
            break
    return said


def _tables_apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A plain table beside a packed one, both the embedding's, is the tied head's: the exporter stores it twice."""
    names = {tensor.name for tensor in tensors}
    table = f"{EMBEDDING}.weight"
    if f"{EMBEDDING}.{PACKED}" not in names or table not in names:
        return list(tensors)
    return [Tensor(f"{HEAD}.weight", t.dtype, t.shape, t.bytes) if t.name == table else t for t in tensors]


def bits_of(tensor: Tensor, spec: DecoderSpec) -> int:
    """Bits of a packed weight, by how many input features its rows have."""
    if tensor.bits is not None:
        return tensor.bits
    linears = spec.linear_shapes()
    narrow = (linears[name][1] for name in (spec.layout.mixer_out, spec.layout.down) if tensor.module.endswith(name))
    return 8 * tensor.bytes // (tensor.shape[0] * next(narrow, spec.hidden_size)) if math.prod(tensor.shape) else 4


def _note(dtypes: list[str], dtype: str) -> None:
    if dtype not in dtypes:
        dtypes.append(dtype)
