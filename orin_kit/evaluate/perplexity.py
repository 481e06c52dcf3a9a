"""Perplexity of a deployed artifact, through any runtime backend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from orin_kit.data.chat import Chat
from orin_kit.data.packing import IGNORE, Batch, Example, collate, tokenize_chat
from orin_kit.errors import UserError
from orin_kit.runtime.runtime import Runtime

LOGITS_BYTES = 256 << 20  # of one call's logits, `[batch, sequence, vocab]` fp32: bounds memory with large vocabularies


def perplexity(runtime: Runtime, chats: Sequence[Chat]) -> float:
    """exp of the mean negative log likelihood of every assistant token, what closes a turn included.

    Each chat is a sequence of its own, every token given all before it, as in `orin_kit.quantize.perplexity`.

    Args:
        runtime: an opened artifact; its cache is empty afterwards, of as many rows as before.
        chats: what to score; each must fit the cache.

    Raises:
        UserError: no assistant token, a chat longer than the cache, or outputs that are not finite.
    """
    backend = runtime.backend
    examples = [tokenize_chat(runtime.tokenizer, chat) for chat in chats]
    if not any(any(example.trained[1:]) for example in examples):
        raise UserError("no assistant tokens to measure perplexity on", mend="give chats with assistant messages")
    longest = max(len(example.ids) for example in examples)
    if longest > backend.max_len:
        what = f"a chat has {longest} tokens and the context holds {backend.max_len}"
        raise UserError(what, mend="leave it out, or open the artifact with a longer max_len")
    total, count, rows_before = 0.0, 0, backend.batch_size
    try:
        for batch in _batches(examples, backend.vocab_size):
            asked = batch.labels != IGNORE
            logits = backend.score(batch.input_ids)
            for row in range(len(asked)):
                total += _nll(logits[row][asked[row]], batch.labels[row][asked[row]])
            count += int(asked.sum())
    finally:
        backend.reset(rows_before)
    if not math.isfinite(total):
        raise UserError(f"{runtime.directory}: the model's outputs are not finite", mend="make the artifact again")
    return math.exp(min(total / count, 700.0))


def _batches(examples: Sequence[Example], vocab_size: int) -> Iterator[Batch]:
    """Examples of like length together, as many as `LOGITS_BYTES` allows; those without a question left out."""
    rest = sorted((e for e in examples if any(e.trained[1:])), key=lambda e: len(e.ids), reverse=True)
    while rest:
        rows = max(1, LOGITS_BYTES // (len(rest[0].ids) * vocab_size * 4))
        yield collate(rest[:rows], pad_id=0)
        rest = rest[rows:]


def _nll(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Summed negative log likelihood of `labels` `[n]` under `logits` `[n, vocab]`."""
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64))
    return float((log_sum - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]).sum())
