"""What is read from a model in one pass, teacher and student alike: hidden states, attention maps, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TensorBatch:
    """Rows on the device.

    Attributes:
        input_ids: int64 `[batch, length]`, padded on the right.
        mask: bool `[batch, length]`, true for real tokens.
        asked: bool `[batch, length]`, true where the next token is an assistant's, `positions` in number.
        labels: int64 `[positions]`, those next tokens.
    """

    input_ids: Tensor
    mask: Tensor
    asked: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Wants:
    """What to read: hidden states and attention maps after which layers (from 0), and whether logits."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    logits: bool = False

    def __bool__(self) -> bool:
        return bool(self.hidden or self.attention or self.logits)


@dataclass(frozen=True)
class Signal:
    """What was read.

    Attributes:
        hidden: for each wanted layer `[batch, length, hidden]`.
        attention: for each wanted layer `[batch, heads, length, length]`.
        logits: `[positions, vocab]` at the asked positions alone: the head is the most costly part of a small model.
    """

    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


class Teacher(Protocol):
    """Where the teacher's knowledge comes from: the live model here; stored logits can stand in for it."""

    def __call__(self, batch: TensorBatch, wants: Wants) -> Signal: ...


class LiveTeacher:
    """A teacher that is run beside the student."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: TensorBatch, wants: Wants) -> Signal:
        return read_signal(self.model, batch, wants)


def read_signal(model: PreTrainedModel, batch: TensorBatch, wants: Wants) -> Signal:
    """One forward pass.

    Padding is on the right and attention is causal, so real tokens never see it: no attention mask is passed, which
    keeps SDPA on its fast causal path. Attention maps come from transformers' eager attention, the only one that
    returns them; it is switched on for this pass alone, and costs `heads x length^2` of every layer, not only of the
    wanted ones (recomputing maps of the wanted layers from hooked q and k would spare that).
    """
    chosen = "eager" if wants.attention else "sdpa"
    if model.config._attn_implementation != chosen:
        model.set_attn_implementation(chosen)
    out = model.get_decoder()(
        input_ids=batch.input_ids,
        output_hidden_states=bool(wants.hidden),
        output_attentions=bool(wants.attention),
        use_cache=False,
    )
    return Signal(
        # hidden_states[0] is the embedding; the last one is after the final norm.
        hidden=tuple(out.hidden_states[layer + 1] for layer in wants.hidden),
        attention=tuple(out.attentions[layer] for layer in wants.attention),
        logits=model.get_output_embeddings()(out.last_hidden_state[batch.asked]) if wants.logits else None,
    )
