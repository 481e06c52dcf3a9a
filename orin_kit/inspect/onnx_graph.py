"""An exported graph's side of an inspection: tensors, each counted once, operators, and the adapters it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from orin_kit.inspect.inspection import Adapters, Graph, Initializers, Port
from orin_kit.inspect.onnx_file import DTYPES, VALUE_BYTES, Initializer, OnnxFile, Value, external_files
from orin_kit.inspect.tensors import ORDER, PACKED, SCALE, ZERO_POINT, Codes, Tensor, kind_of
from orin_kit.models.fused import fused_linears, lora_names
from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec

# Operators that write keys and values where the past lies.
IN_PLACE = {("com.microsoft", "GroupQueryAttention"), ("orin_kit", "KvAttention"), ("trt", "TRT_KVCacheUpdate")}
# Without a manifest, a dialect is known by its operator set.
DIALECTS = {"com.microsoft": "ort", "orin_kit": "trt_plugin", "trt": "trt_native"}


def stored_tensors(onnx: OnnxFile, spec: DecoderSpec) -> tuple[list[Tensor], dict[str, str]]:
    """The weights, those that are other weights' bytes left out, and these: name -> whose bytes they are.

    A packed table that is both embedding and head is called the embedding's, as plain ones are. It is one when the two
    lie in the same place, or when nothing but the head is there to gather rows from.
    """
    shared: dict[str, str] = {}
    places: dict[tuple[str, int, int], str] = {}
    by_head_first = sorted(onnx.initializers, key=lambda stored: not stored.name.startswith(f"{HEAD}."))
    for stored in by_head_first:
        if stored.file and stored.bytes:
            first = places.setdefault((stored.file, stored.start, stored.bytes), stored.name)
            if first != stored.name:
                shared[stored.name] = first
    kept = {stored.name: stored for stored in onnx.initializers if stored.name not in shared}
    tensors = [_tensor(stored, kept) for stored in kept.values()]
    one_table = any(_of(name, EMBEDDING) and _of(first, HEAD) for name, first in shared.items())
    if one_table or not any(_of(name, EMBEDDING) for name in kept):
        tensors = [_as_embedding(tensor) for tensor in tensors]
    return tensors, shared


def graph_of(
    onnx: OnnxFile, tensors: Sequence[Tensor], shared: dict[str, str], spec: DecoderSpec, settings: dict[str, Any]
) -> Graph:
    """The graph, with the tensors and shared bytes that `stored_tensors` found and the manifest's settings."""
    ops: dict[str, dict[str, int]] = {}
    for (domain, op), count in sorted(onnx.ops.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        ops.setdefault(domain or "ai.onnx", {})[op] = count
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        key = kind_of(tensor.name, spec), tensor.dtype
        counts[key] += 1
        sizes[key] += tensor.bytes
    by_opset = (dialect for domain, dialect in DIALECTS.items() if domain in onnx.opsets)
    return Graph(
        producer=onnx.producer,
        ir_version=onnx.ir_version,
        dialect=str(settings.get("dialect") or next(by_opset, "reference")),
        opsets={domain or "ai.onnx": version for domain, version in onnx.opsets.items()},
        ops=ops,
        inputs=[_port(value) for value in onnx.inputs],
        outputs=[_port(value) for value in onnx.outputs],
        initializers=[Initializers(kind=k, dtype=d, count=counts[k, d], bytes=sizes[k, d]) for k, d in sorted(counts)],
        shared=shared,
        adapters=_adapters(onnx.inputs, spec),
        external_files=external_files(onnx),
        copies_cache=spec.layout.mixer == "attention" and not IN_PLACE & onnx.ops.keys(),
    )


def caches(onnx: OnnxFile, prefix: str = "past_") -> list[Value]:
    """The inputs that hold keys and values ("past_key_values.") or convolution states ("past_conv.")."""
    known = ("past_key_values.", "past_conv.")
    return [value for value in onnx.inputs if value.name.startswith(known) and value.name.startswith(prefix)]


def fixed_bytes(value: Value) -> int:
    """Bytes of an input whose named dimensions are 1."""
    return VALUE_BYTES[value.dtype] * math.prod(size for size in value.shape if isinstance(size, int))


def _tensor(stored: Initializer, others: dict[str, Initializer]) -> Tensor:
    module, _, part = stored.name.rpartition(".")
    bits, group_size = stored.bits, stored.group_size
    if bits is None and part == PACKED:  # gathered and multiplied by standard operators
        bits = next(bits for name, bits in DTYPES.values() if name == stored.dtype)
        scales = others.get(f"{module}.{SCALE}")
        group_size = math.prod(stored.shape) // (math.prod(scales.shape) or 1) if scales else None
    codes = None
    if bits is not None:
        codes = Codes(bits, group_size, f"{module}.{ZERO_POINT}" in others, f"{module}.{ORDER}" in others)
    return Tensor(stored.name, stored.dtype, stored.shape, stored.bytes, codes)


def _of(name: str, module: str) -> bool:
    return name.rpartition(".")[0] == module


def _as_embedding(tensor: Tensor) -> Tensor:
    return replace(tensor, name=f"{EMBEDDING}.{tensor.part}") if tensor.module == HEAD else tensor


def _adapters(inputs: Sequence[Value], spec: DecoderSpec) -> Adapters | None:
    """What LoRA adapters may change: every part of a linear that has inputs for them."""
    by_name = {value.name: value for value in inputs}
    targets: list[str] = []
    found = list(_adapted(by_name, spec))
    for _, parts in found:
        targets += [part for part in (name.rpartition(".")[2] for name in parts) if part not in targets]
    if not found:
        return None
    sides = [by_name[name] for linear, _ in found for name in lora_names(linear)]
    return Adapters(
        targets=targets,
        linears=len(found),
        dtype=sides[0].dtype,
        bytes_per_rank=sum(map(fixed_bytes, sides)),
    )


def _adapted(by_name: dict[str, Value], spec: DecoderSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    for layer in range(spec.num_hidden_layers):
        for name, parts in fused_linears(spec.layout).items():
            linear = f"model.layers.{layer}.{name}"
            if all(side in by_name for side in lora_names(linear)):
                yield linear, parts


def _port(value: Value) -> Port:
    return Port(name=value.name, dtype=value.dtype, shape=list(value.shape))
