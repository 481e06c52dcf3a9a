"""AWQ: scale up the input channels that matter before rounding, and scale the layer before them down.

Activation-aware Weight Quantization, arXiv 2306.00978; the reference is mit-han-lab/llm-awq. What is scaled together
is data (`sequential.FOLDS`), one algorithm walks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.packing import PackedWeight
from orin_kit.quantize.int4 import quantize_groups
from orin_kit.quantize.sequential import Fold

# Powers of the inputs' magnitude that are tried: these, then twice halfway to the neighbours of the best. It finds what
# 20 even steps find, in half the time.
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
REFINEMENTS = (0.1, 0.05)
# A search computes the outputs of that many inputs and channels, evenly spread. Tokens matter more: on the demo student
# the divergence from fp16 is 3.6e-3 with 512 (for one seed 4.3e-3), 3.2e-3 with 8192.
SEARCH_TOKENS = 2048
SEARCH_ROWS = 512
LEAST = 1e-4  # of the mean: a silent channel is not scaled further down than this


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


@dataclass(frozen=True)
class Awq:
    """See `sequential.Method`.

    Attributes:
        head_dim: of the attention; any number for models without.
    """

    head_dim: int

    def statistics(self, count: int, scheme: WeightScheme) -> Inputs:
        assert scheme.group_size is not None
        return Inputs(count, scheme.group_size)

    @torch.no_grad()
    def quantize(
        self, module: nn.Module, read: Mapping[Fold, Inputs], scheme: WeightScheme, prefix: str
    ) -> dict[str, PackedWeight]:
        for fold, inputs in read.items():
            apply_fold(module, fold, inputs, self.head_dim, scheme)
        quantized: dict[str, PackedWeight] = {}
        for fold, inputs in read.items():
            for name in fold.consumers:
                weight = module.get_submodule(name).get_parameter("weight")
                quantized[name] = rounded(weight, inputs.gram, scheme, prefix + name)
                weight.copy_(torch.from_numpy(quantized[name].dense()))
        return quantized


@torch.no_grad()
def apply_fold(module: nn.Module, fold: Fold, inputs: Inputs, head_dim: int, scheme: WeightScheme) -> None:
    """Search a fold's scales and fold them into the module's weights and biases, and into `inputs`."""
    producer = module.get_submodule(fold.producer)
    consumers = [module.get_submodule(name).get_parameter("weight") for name in fold.consumers]
    channels = producer.get_parameter("weight").shape[0]
    owner = channel_owners(channels, consumers[0].shape[1], head_dim).to(inputs.magnitude.device)
    scale = search_scale(consumers, inputs, owner, scheme)
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
def search_scale(
    weights: Sequence[torch.Tensor], inputs: Inputs, owner: torch.Tensor, scheme: WeightScheme
) -> torch.Tensor:
    """The scale `[channels]`, a power of the inputs' magnitude, with which rounding changes the outputs least.

    Each try rounds as the linears will be, clip search included: on the demo teacher (half trained) the divergence
    from fp16 was 4.2e-3 so, 4.6e-3 with a clip search that looks at weights alone, 4.9e-3 with plain rounding.

    Args:
        weights: of the linears `[out, in]` that read the inputs.
        inputs: see `Inputs`.
        owner: see `channel_owners`.
        scheme: what the linears become.
    """
    x = torch.cat(inputs.sampled)
    weights = [w[:: max(1, len(w) // SEARCH_ROWS)] for w in weights]
    sizes = [(x @ w.T).square().sum().clamp_min(1e-30) for w in weights]
    magnitude = torch.bincount(owner, weights=inputs.magnitude) / torch.bincount(owner)
    magnitude = (magnitude / magnitude.mean()).float().nan_to_num(1.0).clamp_min(LEAST)

    def scale_of(ratio: float) -> torch.Tensor:
        scale = magnitude**ratio
        return scale / (scale.max() * scale.min()).sqrt()

    def loss_of(ratio: float) -> float:
        scale, loss = scale_of(ratio)[owner], 0.0
        gram = inputs.gram_after(scale)
        for w, size in zip(weights, sizes, strict=True):
            packed = rounded(w * scale, gram, scheme)
            changed = torch.from_numpy(packed.dense()).to(w.device) / scale - w
            loss += float((x @ changed.T).square().sum() / size)
        return loss

    losses = {ratio: loss_of(ratio) for ratio in RATIOS}
    for step in REFINEMENTS:
        best = min(losses, key=lambda ratio: losses[ratio])
        losses |= {ratio: loss_of(ratio) for ratio in (best - step, best + step) if 0 <= ratio <= 1}
    best = min(losses, key=lambda ratio: losses[ratio])
    return scale_of(best) if losses[best] < float("inf") else torch.ones_like(magnitude)


def rounded(weight: torch.Tensor, gram: torch.Tensor, scheme: WeightScheme, name: str = "weight") -> PackedWeight:
    """Quantize a weight `[out, in]` for inputs with this `gram` (see `Inputs`)."""
    assert scheme.group_size is not None
    return quantize_groups(
        weight.cpu().numpy(), scheme.group_size, bits=scheme.bits, symmetric=scheme.symmetric,
        gram=gram.cpu().numpy(), name=name,
    )  # fmt: skip
