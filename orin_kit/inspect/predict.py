"""What a model would take on the device, as it is stored and as `quantize` and `export` would make it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orin_kit.export.options import DEFAULT_GROUP, EMBEDDING_GROUP
from orin_kit.inspect.inspection import Graph, Model, Prediction
from orin_kit.inspect.onnx_file import VALUE_BYTES
from orin_kit.inspect.tensors import Codes, KindBytes, by_kind, packed_tensors, planned
from orin_kit.models.spec import EMBEDDING, DecoderSpec
from orin_kit.profile.roofline import AGX_ORIN_64GB, Device, tpot, ttft, work_of
from orin_kit.profile.targets import GB, Targets

FP16_CACHE = 2  # bytes a cached value
STATES = 2  # copies of the convolution states that the runtime keeps: past and present take turns


def predictions(
    spec: DecoderSpec,
    model: Model,
    context: int,
    prompt_length: int,
    *,
    exported: bool,
    settings: Mapping[str, Any],
) -> list[Prediction]:
    """The model as it is stored; a checkpoint, not `exported` yet, also in the forms it can be brought to.

    Args:
        spec: the decoder.
        model: what was found of it.
        context: tokens before the one whose time is predicted.
        prompt_length: tokens of the prompt whose time is predicted.
        exported: it is an ONNX artifact.
        settings: of the manifest of a checkpoint that `quantize` made; empty for others.
    """
    return [
        _prediction(form, spec, model, kinds, cache_value_bytes, context, prompt_length)
        for form, kinds, cache_value_bytes in _forms(spec, model, exported, settings)
    ]


def assumptions(device: Device, graph: Graph | None) -> list[str]:
    """What the predictions rest on, a line each."""
    more = []
    if graph is not None and graph.copies_cache:
        more.append("this graph copies its whole cache at every step and attends to all of it: neither is counted")
    if graph is not None and graph.adapters is not None:
        more.append("an adapter's own weights and arithmetic are left out")
    return [
        *device.why,
        "a token reads every weight once (of the embedding one row; a table that is the head too also as a whole) and "
        "the whole cache of its context; a prompt takes the longer of its arithmetic and its reading, logits of its "
        "last token alone",
        "batch 1; kernel launches, sampling, tokenizer and all that overlaps badly are left out",
        "memory is weights and the cache reserved for max_len; runtime, activations and operating system come on top",
        *more,
    ]


def _forms(
    spec: DecoderSpec, model: Model, exported: bool, settings: Mapping[str, Any]
) -> Iterator[tuple[str, list[KindBytes], int]]:
    """Name, tensors by kind, bytes of a cached value."""
    stored_value = VALUE_BYTES[model.cache_dtype]
    if model.kinds:
        yield "as stored", model.kinds, stored_value
    if exported:
        return
    if model.packings:
        bits, one = int(settings.get("embedding_bits", 16)), bool(settings.get("tied_table"))
        if one:
            yield "exported, one table", _with_one_table(spec, model), stored_value
        elif bits < 16 and spec.hidden_size % EMBEDDING_GROUP == 0:
            yield f"exported, INT{bits} embedding", _with_packed_embedding(spec, model, bits), stored_value
        return
    dtypes = {dtype for kind in model.kinds for dtype in kind.dtypes}
    if not (dtypes and dtypes <= {"F16", "BF16"}):
        yield "FP16", by_kind(planned(spec, int4=False) or [], spec), FP16_CACHE
    with_table = "one INT4 table" if spec.tie_word_embeddings else "INT4 embedding"
    for form, bits in ((f"INT4, group {DEFAULT_GROUP}, head too", 16), (f"the same, {with_table}", 4)):
        tensors = planned(spec, int4=True, embedding_bits=bits)
        if tensors:
            yield form, by_kind(tensors, spec), FP16_CACHE


def _with_one_table(spec: DecoderSpec, model: Model) -> list[KindBytes]:
    """A quantized checkpoint's tensors once export reads the embedding from the packed head."""
    rows = {row.kind: row for row in model.kinds}
    head = rows.pop("head")
    read = head.bytes + head.bytes // spec.vocab_size
    rows["embedding"] = head.model_copy(update={"kind": "embedding", "token_bytes": read})
    return list(rows.values())


def _with_packed_embedding(spec: DecoderSpec, model: Model, bits: int) -> list[KindBytes]:
    """A quantized checkpoint's tensors once export has packed the embedding; a plain table that is the head stays."""
    rows = {row.kind: row for row in model.kinds}
    if "head" not in rows:
        plain = rows["embedding"]
        rows["head"] = plain.model_copy(update={"kind": "head", "token_bytes": plain.bytes})
    codes = Codes(bits, EMBEDDING_GROUP)
    [table] = by_kind(packed_tensors(EMBEDDING, (spec.vocab_size, spec.hidden_size), codes), spec)
    rows["embedding"] = table.model_copy(update={"token_bytes": table.bytes // spec.vocab_size})
    return list(rows.values())


def _prediction(
    form: str, spec: DecoderSpec, model: Model, kinds: list[KindBytes], cache_value_bytes: int, context: int,
    prompt_length: int,
) -> Prediction:  # fmt: skip
    work = work_of(spec, sum(kind.token_bytes for kind in kinds), cache_value_bytes)
    weights = sum(kind.bytes for kind in kinds)
    memory = weights + model.max_len * work.cache_bytes + STATES * work.state_bytes
    target = int((Targets().memory_gb or 0) * GB)
    return Prediction(
        form=form,
        context=context,
        prompt_length=prompt_length,
        weights_bytes=weights,
        decode_bytes=work.decode_bytes(context),
        tpot=tpot(work, context, AGX_ORIN_64GB),
        ttft=ttft(work, prompt_length, AGX_ORIN_64GB),
        memory_bytes=memory,
        memory_target_bytes=target,
        fits=memory <= target,
    )
