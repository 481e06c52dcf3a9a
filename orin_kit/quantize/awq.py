"""AWQ: scale up the input channels that matter before rounding, and scale the layer before them down.

Activation-aware Weight Quantization, arXiv 2306.00978; the reference is mit-han-lab/llm-awq. What is scaled together
is data (`FOLDS`), one algorithm walks it. Each layer sees the outputs of the already quantized layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orin_kit.errors import UserError
from orin_kit.models.spec import HEAD
from orin_kit.quantize.checkpoint import Checkpoint, Quantized, Section
from orin_kit.quantize.compressed import packed_tensors
from orin_kit.quantize.int4 import dequantize, quantize_groups
from orin_kit.quantize.layerwise import LayerwiseDecoder

RATIOS = 20  # tried, from 0 (no scaling) to 1
SEARCH_TOKENS = 512  # inputs that a search computes outputs for
SEARCH_ROWS = 2048  # output channels that a search computes, evenly spread
HEAD_ROWS = 8  # calibration rows that are normed together
LEAST = 1e-4  # of the mean: a silent channel is not scaled further down than this


@dataclass(frozen=True)
class Fold:
    """A scale per channel that leaves the model as it is: `producer`'s outputs / s, `consumers`' input weights * s."""

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


@dataclass
class Inputs:
    """What the consumers of a fold read, collected batch by batch.

    Attributes:
        count: inputs in all, known before.
        group_size: channels that will share a scale.
        magnitude: mean absolute value of each channel `[in]`.
        gram: mean of `x_g x_g^T` for each group of channels `[groups, group_size, group_size]`.
        sampled: every so many-th input, in pieces `[n, in]`.
    """

    count: int
    group_size: int
    magnitude: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    gram: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    sampled: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add inputs `[..., in]`."""
        x = x.flatten(0, -2)
        groups = x.view(len(x), -1, self.group_size).transpose(0, 1)
        self.magnitude = self.magnitude.to(x.device) + x.abs().sum(0) / self.count
        self.gram = self.gram.to(x.device) + groups.mT @ groups / self.count
        self.sampled.append(x[:: -(-self.count // SEARCH_TOKENS)].clone())

    def gram_after(self, scale: torch.Tensor) -> torch.Tensor:
        """`gram`, were the inputs divided by `scale` `[in]`."""
        s = scale.view(-1, self.group_size)
        return self.gram / (s[:, :, None] * s[:, None, :])

    def divide(self, scale: torch.Tensor) -> None:
        """Follow the producer, whose outputs were divided by `scale` `[in]`."""
        self.gram = self.gram_after(scale)
        self.magnitude = self.magnitude / scale
        self.sampled = [x / scale for x in self.sampled]


def awq(
    checkpoint: Checkpoint, cut: Sequence[Section], group_size: int, rows: NDArray[np.int64]
) -> Iterator[Quantized]:
    """Quantize section by section, one decoder layer in memory at a time.

    Args:
        checkpoint: with plain weights.
        cut: its sections.
        group_size: of the INT4 groups.
        rows: calibration token ids `[samples, sample_length]`.

    Raises:
        UserError: weights, or what the layers make of the rows, are NaN or infinite.
        ArtifactError: a tensor is missing or of another shape.
    """
    decoder = LayerwiseDecoder(checkpoint)
    embedding, *layers, head = cut
    yield Quantized(embedding.name, {name: checkpoint.tensor(name) for name in embedding.plain})
    hidden = decoder.embed(torch.from_numpy(rows))
    for index, section in enumerate(layers):
        layer = decoder.layer(index)
        inputs, expected = observe(decoder, layer, hidden, FOLDS[checkpoint.spec.model_type], group_size)
        for fold, read in inputs.items():
            apply_fold(layer, fold, read, checkpoint.spec.head_dim)
        tensors: dict[str, NDArray[Any]] = {}
        for fold, read in inputs.items():
            for name in fold.consumers:
                linear = layer.get_submodule(name)
                tensors |= quantize_linear(linear, read, f"model.layers.{index}.{name}")
        for name in section.plain:
            tensors[name] = layer.get_parameter(name.removeprefix(f"model.layers.{index}.")).cpu().numpy()
        error = change = 0.0
        for batch, out in decoder.run(layer, hidden):
            error += float((out - expected[batch]).square().sum())
            change += float((expected[batch] - hidden[batch]).square().sum())
            hidden[batch] = out
        if not math.isfinite(error):
            what = f"the outputs of {section.name} are not finite on the calibration text"
            raise UserError(what, mend="get the checkpoint again or train it again")
        yield Quantized(section.name, tensors, error / change if change else None)
    yield _head(decoder, head, hidden, group_size)


def observe(
    decoder: LayerwiseDecoder, layer: nn.Module, hidden: torch.Tensor, folds: Sequence[Fold], group_size: int
) -> tuple[dict[Fold, Inputs], torch.Tensor]:
    """Run a layer on hidden states `[rows, length, hidden]`: what each fold's consumers read, and what comes out."""
    inputs = {fold: Inputs(hidden.shape[0] * hidden.shape[1], group_size) for fold in folds}
    outputs = torch.empty_like(hidden)
    with ExitStack() as hooks:
        for fold, read in inputs.items():
            first = layer.get_submodule(fold.consumers[0])  # all consumers read the same

            def collect(_: nn.Module, args: tuple[torch.Tensor, ...], read: Inputs = read) -> None:
                read.add(args[0])

            hooks.callback(first.register_forward_pre_hook(collect).remove)
        for batch, out in decoder.run(layer, hidden):
            outputs[batch] = out
    return inputs, outputs


@torch.no_grad()
def apply_fold(layer: nn.Module, fold: Fold, inputs: Inputs, head_dim: int) -> None:
    """Search a fold's scales and fold them into the layer's weights and biases, and into `inputs`."""
    producer = layer.get_submodule(fold.producer)
    consumers = [layer.get_submodule(name).get_parameter("weight") for name in fold.consumers]
    channels = producer.get_parameter("weight").shape[0]
    owner = channel_owners(channels, consumers[0].shape[1], head_dim).to(inputs.magnitude.device)
    scale = search_scale(consumers, inputs, owner)
    for parameter in producer.parameters():  # [out, ...], of a norm, a linear or a depthwise convolution
        parameter.div_(scale.view(-1, *[1] * (parameter.ndim - 1)))
    for weight in consumers:
        weight.mul_(scale[owner])
    inputs.divide(scale[owner])


def channel_owners(channels: int, in_features: int, head_dim: int) -> torch.Tensor:
    """The producer's channel that each input feature comes from, int64 `[in_features]`.

    They differ for o_proj in grouped-query attention alone, where several query heads read one value head.
    """
    heads = torch.arange(channels).view(-1, head_dim if channels != in_features else 1)
    return heads.repeat_interleave(in_features // channels, dim=0).view(-1)


@torch.no_grad()
def search_scale(weights: Sequence[torch.Tensor], inputs: Inputs, owner: torch.Tensor) -> torch.Tensor:
    """The scale `[channels]`, a power of the inputs' magnitude, with which rounding changes the outputs least.

    Each try rounds as `quantize_linear` will, clip search included: on the demo teacher (half trained) the divergence
    from fp16 was 4.2e-3 so, 4.6e-3 with a clip search that looks at weights alone, 4.9e-3 with plain rounding.

    Args:
        weights: of the linears `[out, in]` that read the inputs.
        inputs: see `Inputs`.
        owner: see `channel_owners`.
    """
    x = torch.cat(inputs.sampled)
    weights = [w[:: max(1, len(w) // SEARCH_ROWS)] for w in weights]
    sizes = [(x @ w.T).square().sum().clamp_min(1e-30) for w in weights]
    magnitude = torch.bincount(owner, weights=inputs.magnitude) / torch.bincount(owner)
    magnitude = (magnitude / magnitude.mean()).float().nan_to_num(1.0).clamp_min(LEAST)
    best, least = torch.ones_like(magnitude), float("inf")
    for ratio in np.linspace(0, 1, RATIOS):
        scale = magnitude ** float(ratio)
        scale /= (scale.max() * scale.min()).sqrt()
        gram, loss = inputs.gram_after(scale[owner]).cpu().numpy(), 0.0
        for w, size in zip(weights, sizes, strict=True):
            q, scales = quantize_groups((w * scale[owner]).cpu().numpy(), inputs.group_size, gram=gram)
            rounded = torch.from_numpy(dequantize(q, scales, inputs.group_size)).to(w.device)
            changed = rounded / scale[owner] - w
            loss += float((x @ changed.T).square().sum() / size)
        if loss < least:
            best, least = scale, loss
    return best


def quantize_linear(linear: nn.Module, inputs: Inputs, name: str) -> dict[str, NDArray[Any]]:
    """Quantize a linear for its inputs, and leave in the module what a runtime will compute with."""
    weight = linear.get_parameter("weight")
    q, scales = quantize_groups(weight.cpu().numpy(), inputs.group_size, gram=inputs.gram.cpu().numpy(), name=name)
    weight.copy_(torch.from_numpy(dequantize(q, scales, inputs.group_size)))
    return packed_tensors(name, q, scales)


def _head(decoder: LayerwiseDecoder, section: Section, hidden: torch.Tensor, group_size: int) -> Quantized:
    """The last norm, and the head where it is quantized: one more fold."""
    tensors = {name: decoder.checkpoint.tensor(name) for name in section.plain}
    if not section.linears:
        return Quantized(section.name, tensors)
    norm, head = decoder.norm(), nn.Linear(1, 1, bias=False, device="meta")
    head.weight = nn.Parameter(decoder.head(), requires_grad=False)
    inputs = Inputs(hidden.shape[0] * hidden.shape[1], group_size)
    for batch in torch.split(hidden, HEAD_ROWS):
        inputs.add(norm(batch.to(decoder.device)))
    both = nn.ModuleDict({"norm": norm, HEAD: head})
    apply_fold(both, Fold("norm", (HEAD,)), inputs, 1)
    x = torch.cat(inputs.sampled)
    rows = slice(None, None, max(1, len(head.weight) // SEARCH_ROWS))
    expected = x @ head.weight[rows].T
    tensors |= quantize_linear(head, inputs, HEAD)
    tensors[f"{decoder.checkpoint.spec.layout.norm}.weight"] = norm.get_parameter("weight").cpu().numpy()
    loss = (x @ head.weight[rows].T - expected).square().sum() / expected.square().sum().clamp_min(1e-30)
    return Quantized(section.name, tensors, float(loss))
