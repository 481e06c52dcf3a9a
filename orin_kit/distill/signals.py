"""What is read from a model in one pass, teacher and student alike: hidden states, attention, and what gives logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orin_kit.data.packing import Example
from orin_kit.distill.logits import Dense, TopK
from orin_kit.distill.record import Projections, recorded_attention


@dataclass(frozen=True)
class TensorBatch:
    """Rows on the device.

    Attributes:
        rows: what the tensors were made from, for a teacher whose knowledge lies on disk by row.
        input_ids: int64 `[batch, length]`, padded on the right.
        positions: int64 `[batch, length]`, from 0 in every packed chat: transformers reads from it who sees whom.
        documents: int64 `[batch, length]`, the number in its row of the chat a token belongs to, -1 for padding.
        asked: bool `[batch, length]`, true where the next token is an assistant's, `asked positions` in number.
        labels: int64 `[asked positions]`, those next tokens.
    """

    rows: tuple[Example, ...]
    input_ids: Tensor
    positions: Tensor
    documents: Tensor
    asked: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        """bool `[batch, length]`, true for real tokens."""
        return self.documents >= 0


@dataclass(frozen=True)
class Wants:
    """What to read: hidden states and attention of which layers (from 0), the embeddings, and whether logits."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    embeddings: bool = False
    logits: bool = False

    def __bool__(self) -> bool:
        return bool(self.hidden or self.attention or self.embeddings or self.logits)


@dataclass(frozen=True)
class Signal:
    """What was read.

    Attributes:
        hidden: for each wanted layer what leaves it, `[batch, length, hidden]`; after the last norm for the last one.
        attention: for each wanted layer, what its attention is computed from.
        embeddings: `[batch, length, hidden]`.
        logits: at the asked positions alone, and never as a tensor of all of them: see `logits.Dense`.
    """

    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Projections, ...] = ()
    embeddings: Tensor | None = None
    logits: Dense | TopK | None = None


class Teacher(Protocol):
    """Where the teacher's knowledge comes from: the live model here, or its logits on disk (`teacher_logits.py`)."""

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

    No attention mask is passed: padding is on the right, where causal attention never looks, and positions that begin
    anew in every packed chat make transformers' mask one of blocks. Queries, keys and values of the wanted layers are
    recorded on their way into SDPA; nothing of size `length^2` is kept.
    """
    deep = bool(wants.hidden or wants.embeddings)
    recording: AbstractContextManager[dict[int, Projections]]
    recording = recorded_attention(model, wants.attention) if wants.attention else nullcontext(dict[int, Projections]())
    with recording as recorded:
        out = model.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.positions, output_hidden_states=deep, use_cache=False
        )
    return Signal(
        # hidden_states[0] is the embedding; the last one is after the final norm.
        hidden=tuple(out.hidden_states[layer + 1] for layer in wants.hidden),
        attention=tuple(recorded[layer] for layer in wants.attention),
        embeddings=out.hidden_states[0] if wants.embeddings else None,
        logits=logits_of(model, out.last_hidden_state[batch.asked]) if wants.logits else None,
    )


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Dense:
    """The logits of final hidden states `[positions, hidden]`."""
    head = model.get_output_embeddings()
    return Dense(hidden, head.weight, head.bias)
