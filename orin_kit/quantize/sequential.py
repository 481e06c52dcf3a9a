"""Decoder layers quantized one after another, each on what the quantized layers before it put out.

AWQ and GPTQ differ in what they read of a layer's inputs and in how they choose the codes: a `Method`. Which linears
read the same inputs, and what comes before them, is data (`FOLDS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import nn

from orin_kit.errors import UserError
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import EMBEDDING, HEAD
from orin_kit.quantize.compressed import packed_tensors
from orin_kit.quantize.kv_layout import Granularity, scale_tensors
from orin_kit.quantize.kv_scales import CacheRange, caching
from orin_kit.quantize.layerwise import LayerwiseDecoder
from orin_kit.quantize.rtn import round_to_nearest, shared_table
from orin_kit.quantize.sections import Quantized, Section

HEAD_BATCH = 8  # calibration rows that are normed together
HEAD_TOKENS = 512  # that the head's loss is measured on
HEAD_OUTPUTS = 2048  # logits that it is measured on, evenly spread


@dataclass(frozen=True)
class Fold:
    """Linears that read the same inputs, the `consumers`, and the one op that their inputs come from.

    A scale per channel leaves the model as it is: `producer`'s outputs / s, `consumers`' input weights * s.
    """

    producer: str
    consumers: tuple[str, ...]


DECODER = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)
CONV = (
    Fold("operator_norm", ("conv.in_proj",)),
    Fold("conv.conv", ("conv.out_proj",)),  # depthwise: its channels can be scaled as a linear's outputs
    Fold("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
    Fold("feed_forward.w3", ("feed_forward.w2",)),
)
FOLDS: dict[str, tuple[Fold, ...]] = {
    "qwen2": DECODER, "qwen3": DECODER, "llama": DECODER, "mistral": DECODER, "lfm2": CONV,
}  # fmt: skip
NORM_TO_HEAD = Fold("norm", (HEAD,))


class Statistics(Protocol):
    """What a method wants to know of the inputs of some linears."""

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs `[..., in]`."""
        ...


S = TypeVar("S", bound=Statistics)


class Method(Protocol[S]):
    """How the linears of a module are quantized once their inputs were seen."""

    def statistics(self, count: int, scheme: WeightScheme) -> S:
        """To be filled with `count` inputs."""
        ...

    def quantize(
        self, module: nn.Module, read: Mapping[Fold, S], scheme: WeightScheme, prefix: str
    ) -> dict[str, PackedWeight]:
        """Quantize all consumers, by their names in the module, and leave in it what a runtime computes with.

        Raises:
            UserError: weights are NaN or infinite; `prefix` and the linear's name say which.
        """
        ...


class Unread:
    """`Statistics` of a method that asks nothing of the inputs."""

    def add(self, x: torch.Tensor) -> None:
        pass


class Nearest:
    """Rounding to nearest as a `Method`, where the layers have to be run anyway."""

    def statistics(self, count: int, scheme: WeightScheme) -> Unread:
        return Unread()

    def quantize(
        self, module: nn.Module, read: Mapping[Fold, Unread], scheme: WeightScheme, prefix: str
    ) -> dict[str, PackedWeight]:
        quantized: dict[str, PackedWeight] = {}
        for name in (name for fold in read for name in fold.consumers):
            weight = module.get_submodule(name).get_parameter("weight")
            quantized[name] = round_to_nearest(weight.cpu().numpy(), scheme, prefix + name)
            weight.copy_(torch.from_numpy(quantized[name].dense()))
        return quantized


def quantize_sequentially(
    checkpoint: Checkpoint,
    cut: Sequence[Section],
    rows: NDArray[Any],
    method: Method[S],
    cache: Granularity | None = None,
) -> Iterator[Quantized]:
    """Quantize section by section, one decoder layer in memory at a time.

    Args:
        checkpoint: with plain weights.
        cut: its sections.
        rows: calibration token ids int64 `[samples, sample_length]`.
        method: chooses the codes.
        cache: how finely the scales of an int8 KV cache are kept; None without.

    Raises:
        UserError: weights, or what the layers make of the rows, are NaN or infinite.
        ArtifactError: a tensor is missing or of another shape.
    """
    decoder = LayerwiseDecoder(checkpoint)
    embedding, *layers, head = cut
    if embedding.linears:
        tensors = shared_table(checkpoint, embedding)
        hidden = decoder.embed(torch.from_numpy(rows), tensors[f"{EMBEDDING}.weight"])
        yield Quantized(embedding.name, tensors)
        del tensors
    else:
        yield Quantized(embedding.name, {name: checkpoint.tensor(name) for name in embedding.plain})
        hidden = decoder.embed(torch.from_numpy(rows))
    for index, section in enumerate(layers):
        yield _layer(decoder, index, section, hidden, method, cache)
    yield _head(decoder, head, hidden, method)


def observe(
    decoder: LayerwiseDecoder,
    layer: nn.Module,
    hidden: torch.Tensor,
    folds: Sequence[Fold],
    statistics: Callable[[int], S],
) -> tuple[dict[Fold, S], torch.Tensor]:
    """Run a layer on hidden states `[rows, length, hidden]`: what each fold's consumers read, and what comes out."""
    read = {fold: statistics(hidden.shape[0] * hidden.shape[1]) for fold in folds}
    outputs = torch.empty_like(hidden)
    with ExitStack() as hooks:
        for fold, seen in read.items():
            first = layer.get_submodule(fold.consumers[0])  # all consumers read the same

            def collect(_: nn.Module, args: tuple[torch.Tensor, ...], seen: S = seen) -> None:
                seen.add(args[0])

            hooks.callback(first.register_forward_pre_hook(collect).remove)
        for batch, out in decoder.run(layer, hidden):
            outputs[batch] = out
    return read, outputs


def _layer(
    decoder: LayerwiseDecoder,
    index: int,
    section: Section,
    hidden: torch.Tensor,
    method: Method[S],
    cache: Granularity | None,
) -> Quantized:
    """Quantize a layer; `hidden` becomes what it puts out."""
    layer, scheme, prefix = decoder.layer(index), section.scheme, f"model.layers.{index}."
    folds = FOLDS[decoder.checkpoint.spec.model_type]
    read, expected = observe(decoder, layer, hidden, folds, lambda count: method.statistics(count, scheme))
    tensors: dict[str, NDArray[Any]] = {}
    for name, packed in method.quantize(layer, read, scheme, prefix).items():
        tensors |= packed_tensors(prefix + name, packed, symmetric=scheme.symmetric)
    for name in section.plain:
        tensors[name] = layer.get_parameter(name.removeprefix(prefix)).cpu().numpy()
    error = change = 0.0
    ranges = CacheRange()
    with nullcontext() if cache is None else caching(ranges.add):
        for batch, out in decoder.run(layer, hidden):
            error += float((out - expected[batch]).square().sum())
            change += float((expected[batch] - hidden[batch]).square().sum())
            hidden[batch] = out
    if not math.isfinite(error):
        what = f"the outputs of {section.name} are not finite on the calibration text"
        raise UserError(what, mend="get the checkpoint again or train it again")
    if cache is not None:
        tensors |= scale_tensors(index, *ranges.scales(), cache)
    return Quantized(section.name, tensors, error / change if change else None)


def _head(decoder: LayerwiseDecoder, section: Section, hidden: torch.Tensor, method: Method[S]) -> Quantized:
    """The last norm, and the head where it is quantized."""
    tensors = {name: decoder.checkpoint.tensor(name) for name in section.plain}
    if not section.linears:
        return Quantized(section.name, tensors)
    norm, head = decoder.norm(), nn.Linear(1, 1, bias=False, device="meta")
    head.weight = nn.Parameter(decoder.head(), requires_grad=False)
    count = hidden.shape[0] * hidden.shape[1]
    seen = method.statistics(count, section.scheme)
    for batch in torch.split(hidden, HEAD_BATCH):
        seen.add(norm(batch.to(decoder.device)))
    sampled = hidden.flatten(0, 1)[:: -(-count // HEAD_TOKENS)].to(decoder.device)
    outputs = slice(None, None, max(1, len(head.weight) // HEAD_OUTPUTS))
    expected = norm(sampled) @ head.weight[outputs].T
    both = nn.ModuleDict({"norm": norm, HEAD: head})
    packed = method.quantize(both, {NORM_TO_HEAD: seen}, section.scheme, "")[HEAD]
    tensors |= packed_tensors(HEAD, packed, symmetric=section.scheme.symmetric)
    tensors[f"{decoder.checkpoint.spec.layout.norm}.weight"] = norm.get_parameter("weight").cpu().numpy()
    lost = (norm(sampled) @ head.weight[outputs].T - expected).square().sum()
    return Quantized(section.name, tensors, float(lost / expected.square().sum().clamp_min(1e-30)))
