"""What a training step keeps for its backward pass, counted without running it.

The real modules run once on fake tensors (`torch._subclasses.FakeTensorMode`: shapes and dtypes, no data), and every
tensor that autograd saves is counted once by its storage. That is the per-layer sum of Korthikanti et al.
(arXiv:2205.05198, section 4), with the terms taken from the modules themselves, so that it holds for gated MLPs,
grouped queries, SDPA (which keeps no `length^2` scores), convolutions, adapters and autocast alike. With full
recomputation it is, as there, what enters each layer, and one layer as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

OUTSIDE = -1


@dataclass
class Saved:
    """Bytes by where they were saved.

    Attributes:
        by_layer: of each decoder layer; `OUTSIDE` for embeddings, last norm and losses.
        inputs: of what enters each decoder layer.
    """

    by_layer: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)

    @property
    def everything(self) -> int:
        """Kept when nothing is computed again."""
        return sum(self.by_layer.values())

    @property
    def largest_layer(self) -> int:
        return max((size for layer, size in self.by_layer.items() if layer != OUTSIDE), default=0)

    @property
    def recomputed(self) -> int:
        """Kept when each decoder layer is computed again in the backward pass."""
        return sum(self.inputs.values()) + self.largest_layer + self.by_layer.get(OUTSIDE, 0)


@dataclass(frozen=True)
class Kept:
    """A step's saved bytes as a line in the number of rows: `copies + rows x per_row`.

    Attributes:
        per_row: what grows with the batch: activations.
        copies: what does not: the weights, cast by autocast for every multiplication.
    """

    per_row: Saved
    copies: Saved


def count_saved(forward: Callable[[int], Iterable[Tensor]], model: nn.Module, layers: Iterable[nn.Module]) -> Kept:
    """Run `forward(rows)` with one row and with two; sizes are linear in rows, so two points tell them for any number.

    Args:
        forward: runs the forward pass and returns what else must stay alive until the backward pass.
        model: everything that learns; its own parameters and buffers cost nothing as saved tensors.
        layers: its decoder layers, whose first argument is the hidden state that enters them.
    """
    layers, own = list(layers), [*model.parameters(), *model.buffers()]
    one, two = (_saved(forward, rows, layers, own) for rows in (1, 2))
    per_row, copies = Saved(), Saved()
    for name in ("by_layer", "inputs"):
        first, second = getattr(one, name), getattr(two, name)
        getattr(per_row, name).update({layer: second[layer] - first[layer] for layer in first})
        getattr(copies, name).update({layer: 2 * first[layer] - second[layer] for layer in first})
    return Kept(per_row, copies)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share a storage count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def on_fake_cpu(*models: nn.Module) -> Iterator[None]:
    """Inside, tensors are fake ones on the CPU, and so are the parameters and buffers of models on the meta device.

    On the meta device itself SDPA would choose its plain kernel, which keeps all scores, and autocast does nothing.
    """
    places = [
        part.__dict__[kind] for model in models for part in model.modules() for kind in ("_parameters", "_buffers")
    ]
    before = [dict(place) for place in places]
    made: dict[Tensor, Tensor] = {}
    with FakeTensorMode():
        for place in places:
            for key, old in place.items():
                if old is not None:
                    if old not in made:  # a tied table stays one
                        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                        made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    place[key] = made[old]
        try:
            yield
        finally:
            for place, content in zip(places, before, strict=True):
                place.update(content)


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CPU autocast, which fake tensors on the CPU obey; nothing where dtype is None."""
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        yield


def _saved(forward: Callable[[int], Iterable[Tensor]], rows: int, layers: list[nn.Module], own: list[Tensor]) -> Saved:
    found = Saved({OUTSIDE: 0}, {})
    place = [OUTSIDE]
    known = {p.untyped_storage()._cdata for p in own}
    alive: list[Any] = []  # a storage that dies would lend its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(storage)
            found.by_layer[place[0]] = found.by_layer.get(place[0], 0) + storage.nbytes()
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            place[0], found.inputs[index] = index, args[0].untyped_storage().nbytes()
            found.by_layer.setdefault(index, 0)

        return hook

    def leave(*_: object) -> None:
        place[0] = OUTSIDE

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(enter(index)).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        for tensor in forward(rows):
            pack(tensor)
    return found
