"""Batches as Hugging Face tokenizers make them, padded on either side with a mask, for a backend that takes rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UserError
from orin_kit.runtime.backend import Backend


def unpadded(ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> list[list[int]]:
    """The rows `[batch, sequence]` without their padding, for `Backend.prefill`.

    Args:
        ids: token ids, padded on the left, on the right, or on both sides.
        mask: 1 where there is a token, 0 where there is padding; all tokens when None.

    Raises:
        UserError: the mask has another shape, a row without tokens, or padding between tokens.
    """
    return [ids[row, start:stop].tolist() for row, (start, stop) in enumerate(_spans(ids, mask))]


def score_padded(
    backend: Backend, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Logits of every position of a padded batch, fp32 `[batch, sequence, vocab]`; zeros at padding. Empties the cache.

    Raises:
        UserError: see `unpadded`; or the longest row does not fit the cache.
    """
    spans = _spans(ids, mask)
    longest = max(stop - start for start, stop in spans)
    left = np.zeros((len(ids), longest), np.int64)  # each row's tokens first: right padding is never attended to
    for row, (start, stop) in enumerate(spans):
        left[row, : stop - start] = ids[row, start:stop]
    scored = backend.score(left)
    logits = np.zeros((*ids.shape, scored.shape[-1]), np.float32)
    for row, (start, stop) in enumerate(spans):
        logits[row, start:stop] = scored[row, : stop - start]
    return logits


def _spans(ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> Sequence[tuple[int, int]]:
    """Where each row's tokens begin and end."""
    if mask is None:
        return [(0, ids.shape[1])] * len(ids)
    if mask.shape != ids.shape:
        what = f"the attention mask is {list(mask.shape)}, the ids are {list(ids.shape)}"
        raise UserError(what, mend="give both as the tokenizer returned them")
    spans = []
    for row, tokens in enumerate(np.asarray(mask, bool)):
        places = np.flatnonzero(tokens)
        if not len(places):
            raise UserError(f"row {row} of the batch has no tokens", mend="leave it out")
        start, stop = int(places[0]), int(places[-1]) + 1
        if stop - start != len(places):
            raise UserError(f"row {row} of the batch has padding between its tokens", mend="pad at the ends only")
        spans.append((start, stop))
    return spans
