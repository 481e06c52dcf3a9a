"""Chats to training rows: token ids, and which of them the student is asked to predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orin_kit.data.chat import Chat
from orin_kit.tokenizer import ChatTokenizer

IGNORE = -100  # the label that cross-entropy skips, as in torch and transformers


@dataclass(frozen=True)
class Example:
    """One chat, or several packed into a row, as tokens.

    Attributes:
        ids: the tokens.
        trained: whether token i is an assistant's, to be predicted.
        lengths: of the chats in the row, in their order; empty for a single one.
    """

    ids: list[int]
    trained: list[bool]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length.

    Attributes:
        input_ids: int64 `[batch, length]`.
        labels: int64 `[batch, length]`, `labels[:, i]` is the token to predict *at* position i (already shifted),
            `IGNORE` where nothing is asked.
        attention_mask: int64 `[batch, length]`, 1 for real tokens, 0 for padding (on the right).
        position_ids: int64 `[batch, length]`, from 0 in every packed chat, and again in the padding.
        documents: int64 `[batch, length]`, the number in its row of the chat a token belongs to, -1 in the padding.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    documents: NDArray[np.int64]


def tokenize_chat(tokenizer: ChatTokenizer, chat: Chat) -> Example:
    """Tokens of a whole chat; assistant turns, up to and with what closes them, are the trained ones.

    Turns are found by rendering ever longer beginnings of the chat, so any chat template works that renders a
    beginning the same way alone as inside the whole; where a template does not, the whole rest counts as the turn.
    """
    ids: list[int] = []
    trained: list[bool] = []
    done = ""
    for turn, message in enumerate(chat):
        if message.role != "assistant":
            continue
        opened = tokenizer.render(chat[:turn], reply=True)
        closed = tokenizer.render(chat[: turn + 1])
        if not (opened.startswith(done) and closed.startswith(opened)):
            continue
        for text, is_reply in ((opened[len(done) :], False), (closed[len(opened) :], True)):
            part = tokenizer.encode(text)
            ids += part
            trained += [is_reply] * len(part)
        done = closed
    return Example(ids, trained)


def cut(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Examples in rows of their own, of at most `length` tokens."""
    for example in examples:
        yield from pack([example], length)


def pack(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Join examples in order into rows of at most `length` tokens; an example longer than a row is cut at its end."""
    ids: list[int] = []
    trained: list[bool] = []
    lengths: list[int] = []
    for example in examples:
        if ids and len(ids) + len(example.ids) > length:
            yield Example(ids, trained, tuple(lengths))
            ids, trained, lengths = [], [], []
        ids = ids + example.ids[:length]
        trained = trained + example.trained[:length]
        lengths.append(min(len(example.ids), length))
    if ids:
        yield Example(ids, trained, tuple(lengths))


def collate(rows: Sequence[Example], pad_id: int) -> Batch:
    """Pad rows on the right to the longest and shift the labels; no chat is asked for the first token of the next."""
    length = max(len(row.ids) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    labels = np.full((len(rows), length), IGNORE, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    position_ids = np.zeros((len(rows), length), np.int64)
    documents = np.full((len(rows), length), -1, np.int64)
    for i, row in enumerate(rows):
        n, lengths = len(row.ids), row.lengths or (len(row.ids),)
        ids = np.asarray(row.ids, np.int64)
        input_ids[i, :n] = ids
        attention_mask[i, :n] = 1
        position_ids[i] = np.concatenate([np.arange(part) for part in (*lengths, length - n)])
        documents[i, :n] = np.repeat(np.arange(len(lengths)), lengths)
        inside = documents[i, 1:n] == documents[i, : n - 1]
        labels[i, : n - 1] = np.where(np.asarray(row.trained[1:], bool) & inside, ids[1:], IGNORE)
    return Batch(input_ids, labels, attention_mask, position_ids, documents)
