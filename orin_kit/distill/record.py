"""What attention is computed from, recorded while the model computes it as fast as ever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orin_kit.errors import UserError

SHARDED = (FSDPModule, FullyShardedDataParallel)


@dataclass(frozen=True)
class Projections:
    """What one attention layer computes attention from.

    Attributes:
        query: `[batch, heads, length, head_dim]`, after norms and rotary embedding.
        key: `[batch, kv_heads, length, head_dim]`, the same; head `h` reads key `h // (heads / kv_heads)`.
        value: `[batch, kv_heads, length, head_dim]`, as projected.
        scaling: what scores are multiplied by, `head_dim ** -0.5` as a rule.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@contextmanager
def recorded_attention(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Projections]]:
    """Record queries, keys and values of some layers in forward passes of `model`, by layer; the last pass stays.

    The function that transformers' table of attention functions has under the model's implementation (SDPA, flash,
    eager) is covered by one that takes notes and calls it, so the model computes what it always does. Other models pass
    through. Notes are taken while the decoder runs forward, hence not when gradient checkpointing runs a layer again
    in the backward pass. What is recorded belongs to the graph: losses on it have gradients.

    Args:
        model: as transformers makes it, with adapters or not; what wraps it (DDP, FSDP) does not matter.
        layers: of the decoder, from 0.

    Raises:
        UserError: the model has no such layer, or no attention in it; when run, rows outgrow its sliding window.

    Example:
        with recorded_attention(model, [6, 7]) as recorded:
            model(input_ids, use_cache=False)
        recorded[6].query  # [batch, heads, length, head_dim]
    """
    decoder, name = model.get_decoder(), model.config._attn_implementation
    chosen = {_attention(model, decoder, layer): layer for layer in layers}
    sharded = {decoder.layers[layer]: layer for layer in layers if isinstance(decoder.layers[layer], SHARDED)}
    recorded: dict[int, Projections] = {}
    running = False

    def run(*_: object) -> None:
        nonlocal running
        running = True

    def rest(*_: object) -> None:
        nonlocal running
        running = False

    def order(module: nn.Module, _: object, output: Tensor) -> None:
        if running and output.requires_grad:
            found = recorded[sharded[module]]
            after: Callable[..., tuple[Tensor, Tensor, Tensor]] = _After.apply
            query, key, value = after(output, found.query, found.key, found.value)
            recorded[sharded[module]] = Projections(query, key, value, found.scaling)

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        if running and module in chosen:
            _check_window(chosen[module], query.shape[2], options.get("sliding_window"))
            recorded[chosen[module]] = Projections(query, key, value, options["scaling"])
        attend = covered or _eager(module)
        return attend(module, query, key, value, *args, **options)

    # transformers' modules carry their eager function themselves: the table has none, but is asked first.
    covered: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name)
    hooks = [decoder.register_forward_pre_hook(run), decoder.register_forward_hook(rest, always_call=True)]
    hooks += [layer.register_forward_hook(order) for layer in sharded]
    ALL_ATTENTION_FUNCTIONS[name] = record
    try:
        yield recorded
    finally:
        rest()  # an interrupt leaves a forward pass without its hooks
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not covered:  # it was an override itself: a recording around this one
            ALL_ATTENTION_FUNCTIONS[name] = covered
        for hook in hooks:
            hook.remove()


class _After(torch.autograd.Function):
    """Passes tensors of a layer on, with gradients that wait for the layer's output to have one, be it zero.

    FSDP brings a layer's weights back when the gradient of its output arrives. A loss made of recorded tensors alone
    does not depend on the output of the last recorded layer, and would find no weights there.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *recorded: Tensor) -> tuple[Tensor, ...]:
        ctx.zero = output.new_zeros(()).expand_as(output)
        return tuple(tensor.view_as(tensor) for tensor in recorded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return ctx.zero, *gradients


def _attention(model: PreTrainedModel, decoder: nn.Module, layer: int) -> nn.Module:
    """The attention module of a layer, which every family calls `self_attn`."""
    whose = f"{model.config.model_type} model"
    assert isinstance(decoder.layers, nn.ModuleList)
    stack = list(decoder.layers)
    if not 0 <= layer < len(stack):
        raise UserError(
            f"attention of layer {layer}: the {whose} has layers 0 to {len(stack) - 1}", mend="name layers it has"
        )
    module = getattr(stack[layer], "self_attn", None)
    if module is None:
        having = [i for i, other in enumerate(stack) if hasattr(other, "self_attn")]
        mend = f"name some of layers {', '.join(map(str, having))}" if having else "leave attention distillation out"
        raise UserError(f"attention of layer {layer}: the {whose} has no attention there", mend=mend)
    assert isinstance(module, nn.Module)
    return module


def _check_window(layer: int, length: int, window: int | None) -> None:
    if window is not None and window < length:
        what = f"layer {layer} looks back {window} tokens only, and rows are {length} long: their maps differ in shape"
        raise UserError(what, mend=f"make rows of at most {window} tokens, or choose layers without sliding window")


def _eager(module: nn.Module) -> Callable[..., Any]:
    attend: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return attend
