"""What the tensors of a decoder are for, whether in a checkpoint, in an ONNX file, or only planned."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel

from orin_kit.export.options import DEFAULT_GROUP, EMBEDDING_GROUP
from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec

# Parts of packed linears and tables, by the last part of the name, as compressed-tensors and the exporter call them.
PACKED, TILES, SCALE, SHAPE = "weight_packed", "weight_tiles", "weight_scale", "weight_shape"
ZERO_POINT, ORDER = "weight_zero_point", "order"
BESIDE = (SCALE, ZERO_POINT, "weight_g_idx", ORDER)  # what packed weights are read with
CACHE_SCALES = ("k_scale", "v_scale")  # of an int8 KV cache
ZERO_BIAS = "zero_bias"  # what the zeros are called here that AutoGPTQ gives linears without a bias
# The first are rotary frequencies of old checkpoints.
HARMLESS = ("inv_freq", *CACHE_SCALES, "k_zero_point", "v_zero_point", ZERO_BIAS)
KINDS = ("embedding", "head", "mixer", "mlp", "norms_and_biases", "cache_scales", "rotary", "other")
OF_PARAMETERS = KINDS[:5]


@dataclass(frozen=True)
class Codes:
    """How a packed weight is packed.

    Attributes:
        bits: of a code.
        group_size: input features that share a scale; None where that is not known.
        zero_points: codes that mean zero are stored, and are not all the middle one.
        order: the columns are the input features in another order (GPTQ's act-order).
    """

    bits: int
    group_size: int | None
    zero_points: bool = False
    order: bool = False


@dataclass(frozen=True)
class Tensor:
    """A stored tensor.

    Attributes:
        name: whatever the format, packed linears' parts are called as compressed-tensors calls them.
        dtype: as safetensors calls it.
        shape: outputs first; of packed weights in checkpoints that of the weight itself.
        bytes: as stored.
        codes: of packed weights; None for all other tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    codes: Codes | None = None

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
        token_bytes: what one decoded token must read: of an embedding one row, and all of it too where it is the head.
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


class Packing(BaseModel):
    """The packed weights that are packed in one way; see `Codes`.

    Attributes:
        count: of them.
        kinds: what they are for.
    """

    bits: int
    group_size: int | None
    zero_points: bool
    order: bool
    count: int
    kinds: list[str]


def packings(tensors: Iterable[Tensor], spec: DecoderSpec) -> list[Packing]:
    """The ways in which weights are packed, the decoder layers' first."""
    found: dict[Codes, Packing] = {}
    packed = [(tensor.codes, kind_of(tensor.name, spec)) for tensor in tensors if tensor.codes is not None]
    for codes, kind in sorted(packed, key=lambda of: of[1] in ("embedding", "head")):
        row = found.setdefault(codes, Packing(**asdict(codes), count=0, kinds=[]))
        row.count += 1
        _note(row.kinds, kind)
    return list(found.values())


def by_kind(tensors: Sequence[Tensor], spec: DecoderSpec) -> list[KindBytes]:
    """Sort tensors by what they are for; kinds without any are left out."""
    tensors = _tables_apart(tensors)
    found: dict[str, KindBytes] = {}
    for tensor in tensors:
        kind = kind_of(tensor.name, spec)
        row = found.setdefault(kind, KindBytes(kind=kind))
        if tensor.codes is not None:
            row.packed_bytes += tensor.bytes
            row.parameters += tensor.bytes * 8 // tensor.codes.bits
            _note(row.dtypes, f"INT{tensor.codes.bits}")
        elif tensor.part in BESIDE:
            row.scale_bytes += tensor.bytes
        else:
            row.plain_bytes += tensor.bytes
            if kind in OF_PARAMETERS:
                row.parameters += math.prod(tensor.shape)
            if kind != "other":
                _note(row.dtypes, tensor.dtype)
    has_head = "head" in found
    for kind, row in found.items():
        row.token_bytes = row.bytes
        if kind == "embedding":
            row.token_bytes = row.bytes // spec.vocab_size + (0 if has_head else row.bytes)
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
    if part in CACHE_SCALES:
        return "cache_scales"
    if part not in ("weight", "bias", PACKED, TILES, *BESIDE):
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

    A tied head and an embedding of 4 bits become one table, here the embedding's. None where the groups do not divide
    the features.
    """
    shapes = spec.tensor_shapes()
    if not int4:
        return [Tensor(name, "F16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]
    linears = {f"model.layers.{layer}.{n}" for layer in range(spec.num_hidden_layers) for n in spec.linear_shapes()}
    packed = dict.fromkeys([*linears, HEAD], Codes(4, DEFAULT_GROUP))
    shapes[f"{HEAD}.weight"] = shapes[f"{EMBEDDING}.weight"]
    if embedding_bits == 4 and spec.tie_word_embeddings:
        del shapes[f"{HEAD}.weight"]
        packed[EMBEDDING] = packed.pop(HEAD)
    elif embedding_bits < 16:
        packed[EMBEDDING] = Codes(embedding_bits, EMBEDDING_GROUP)
    tensors: list[Tensor] = []
    for name, shape in shapes.items():
        codes = packed.get(name.removesuffix(".weight"))
        if codes is None:
            tensors.append(Tensor(name, "F16", shape, 2 * math.prod(shape)))
        elif shape[-1] % (codes.group_size or 1):
            return None
        else:
            tensors += packed_tensors(name.removesuffix(".weight"), shape, codes)
    return tensors


def packed_tensors(module: str, shape: tuple[int, ...], codes: Codes) -> list[Tensor]:
    """Codes and fp16 scales of a weight `[out, in]`."""
    assert codes.group_size is not None
    packed, scales = (shape[0], shape[1] * codes.bits // 8), (shape[0], shape[1] // codes.group_size)
    return [
        Tensor(f"{module}.{PACKED}", "U8", packed, math.prod(packed), codes),
        Tensor(f"{module}.{SCALE}", "F16", scales, 2 * math.prod(scales)),
    ]


def mismatches(tensors: Iterable[Tensor], rows: Sequence[KindBytes], spec: DecoderSpec, *, names: bool) -> list[str]:
    """What the config says and the files do not hold, one line each; empty when all is well.

    Args:
        tensors: what is stored.
        rows: the same by kind.
        spec: the config's.
        names: also compare names and shapes, for checkpoints, whose packed tensors have the shape of their weight; in
            graphs q, k and v are one tensor.
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
    for kind in OF_PARAMETERS:
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
        if tensor.codes is not None:
            shapes[f"{tensor.module}.weight"] = tensor.shape
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


def _note(seen: list[str], name: str) -> None:
    if name not in seen:
        seen.append(name)
