"""What a model would take on the device, as it is stored and as `quantize` and `export` would make it."""

from __future__ import annotations

from collections.abc import Iterator

from orin_kit.inspect.inspection import Model, Prediction
from orin_kit.inspect.onnx_file import VALUE_BYTES
from orin_kit.inspect.tensors import GROUP, KindBytes, by_kind, planned
from orin_kit.models.spec import DecoderSpec
from orin_kit.profile.roofline import AGX_ORIN_64GB, Device, tpot, ttft, work_of
from orin_kit.profile.targets import GB, Targets

# Forms that a checkpoint can be brought to: name -> INT4, bits of the embedding.
FORMS = {
    "FP16": (False, 16),
    f"INT4, group {GROUP}, head too": (True, 16),
    "the same, INT4 embedding": (True, 4),
}
FP16_CACHE = 2  # bytes a cached value
STATES = 2  # copies of the convolution states that the runtime keeps: past and present take turns


def predictions(
    spec: DecoderSpec, model: Model, context: int, prompt_length: int, *, exported: bool
) -> list[Prediction]:
    """The model as it is stored; a plain checkpoint, not `exported` yet, also in the forms it can be brought to."""
    return [
        _prediction(form, spec, model, kinds, cache_value_bytes, context, prompt_length)
        for form, kinds, cache_value_bytes in _forms(spec, model, exported)
    ]


def assumptions(device: Device) -> list[str]:
    """What the predictions rest on, a line each."""
    return [
        *device.why,
        "a token reads every weight once (of an embedding that is not the head, one row) and the whole cache of its "
        "context; a prompt takes the longer of its arithmetic and its reading, logits of its last token alone",
        "batch 1; kernel launches, sampling, tokenizer and all that overlaps badly are left out",
        "memory is weights and the cache reserved for max_len; runtime, activations and operating system come on top",
    ]


def _forms(spec: DecoderSpec, model: Model, exported: bool) -> Iterator[tuple[str, list[KindBytes], int]]:
    if model.kinds:
        yield "as stored", model.kinds, VALUE_BYTES[model.cache_dtype]
    dtypes = {dtype for kind in model.kinds for dtype in kind.dtypes}
    if model.group_size or exported:
        return
    for form, (int4, embedding_bits) in FORMS.items():
        tensors = planned(spec, int4=int4, embedding_bits=embedding_bits)
        if tensors and not (form == "FP16" and dtypes and dtypes <= {"F16", "BF16"}):
            yield form, by_kind(tensors, spec), FP16_CACHE


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
