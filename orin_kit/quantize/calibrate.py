"""The text that quantization looks at: rows to calibrate on, and other chats to measure on."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orin_kit import shipped
from orin_kit.data.chat import Chat, read_chats
from orin_kit.data.packing import Example, tokenize_chat
from orin_kit.data.tasks import distinct, generate
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer

SETS = ("chat", "reasoning")  # that come along, calibration/NAME.jsonl
TASKS = "tasks"  # the synthetic ones
HELD_OUT = 128  # chats that perplexity is measured on, at most
HELD_OUT_SHARE = 5  # of a user's chats every fifth is held out
ENOUGH_TOKENS = 1024  # to calibrate on, fewer only where fewer are asked for


@dataclass(frozen=True)
class Samples:
    """What a model is calibrated and measured on; no chat is in both.

    Attributes:
        rows: token ids int64 `[samples, sample_length]`, chats end to end, without padding.
        held_out: chats, cut to `sample_length` tokens, each with assistant tokens to predict.
    """

    rows: NDArray[np.int64]
    held_out: list[Example]


def chat_file(calibration: str | Path | None) -> Path | None:
    """The file of chats that is meant by a set's name or a path; None for the synthetic tasks."""
    if calibration is None or calibration == TASKS:
        return None
    return shipped.calibration() / f"{calibration}.jsonl" if calibration in SETS else Path(calibration)


def read_samples(
    tokenizer: ChatTokenizer, chats: str | Path | None, *, samples: int, sample_length: int, seed: int, vocab_size: int
) -> Samples:
    """Tokenize a user's chats (jsonl, see `read_chats`) or, without a file, the synthetic reasoning tasks.

    Args:
        tokenizer: the model's, with a chat template.
        chats: the file, or None.
        samples: rows wanted; a short file gives fewer.
        sample_length: tokens a row.
        seed: of the order of the chats, or of the tasks.
        vocab_size: the model's.

    Raises:
        UserError: the file is missing, broken or too short, the tokenizer is another model's, or a number is not
            positive.
    """
    for name, value in (("samples", samples), ("sample length", sample_length)):
        if value < 1:
            raise UserError(f"{name} is {value}", mend="it must be at least 1")
    if chats is None:
        calibration: Iterable[Chat] = (task.chat() for task in generate("calibration", seed))
        measured = [task.chat() for task in distinct("test", seed, HELD_OUT)]
        source = "the synthetic tasks"
    else:
        calibration, measured = _divide(read_chats(chats), seed)
        source = str(chats)
    rows = _rows(tokenizer, calibration, samples, sample_length, source)
    held_out = [_cut(tokenize_chat(tokenizer, chat), sample_length) for chat in measured]
    held_out = [example for example in held_out if any(example.trained[1:])]
    if not held_out:
        what = f"in {source} no held-out chat's answer begins within {sample_length} tokens"
        raise UserError(what, mend="raise --sample-length or give more chats")
    largest = max(int(rows.max()), *(max(example.ids) for example in held_out))
    if largest >= vocab_size:
        what = f"the tokenizer gives token {largest}, the model knows {vocab_size}"
        raise UserError(what, mend="the tokenizer is another model's; copy the right tokenizer.json")
    return Samples(rows, held_out)


def _divide(chats: list[Chat], seed: int) -> tuple[list[Chat], list[Chat]]:
    """Calibration chats and held-out ones; equal chats always go to the same side."""
    chats = list(dict.fromkeys(chats))
    random.Random(seed).shuffle(chats)
    count = min(HELD_OUT, max(1, len(chats) // HELD_OUT_SHARE))
    return chats[count:], chats[:count]


def _rows(tokenizer: ChatTokenizer, chats: Iterable[Chat], samples: int, length: int, source: str) -> NDArray[np.int64]:
    wanted = samples * length
    ids = list(islice((token for chat in chats for token in tokenizer.encode_chat(chat)), wanted))
    count = len(ids) // length
    if count * length < min(wanted, ENOUGH_TOKENS):
        what = f"{source} gives {len(ids)} tokens to calibrate on, {min(wanted, ENOUGH_TOKENS)} are needed"
        raise UserError(what, mend="give more chats, or lower --sample-length")
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)


def _cut(example: Example, length: int) -> Example:
    return Example(example.ids[:length], example.trained[:length])
