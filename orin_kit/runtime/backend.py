"""What every runtime backend can do: one of the project's three joints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orin_kit.runtime.lora import Adapter


class Backend(Protocol):
    """A decoder with its cache, preallocated for `batch_size` rows of `max_len` tokens.

    The cache holds the keys and values of layers that attend, and the states of layers that convolve.

    Implementations: `backends/onnx.py` (onnxruntime), `backends/tensorrt.py`.
    """

    name: str  # what runs, for reports: "onnxruntime 1.32.0 CPUExecutionProvider, 2 threads"
    vocab_size: int
    batch_size: int
    max_len: int
    lengths: NDArray[np.int64]  # [batch], tokens of each row in the cache

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append a piece of prompt to every row.

        Args:
            rows: `batch_size` lists of token ids, of any lengths >= 1. When the cache is not empty, batch must be 1.

        Returns:
            fp32 logits `[batch, vocab]` after each row's last token.

        Raises:
            UserError: a row would be longer than `max_len`; nothing has changed then.
        """
        ...

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token `[batch]` to every row; fp32 logits `[batch, vocab]` for the next one.

        Raises:
            UserError: the cache is full.
        """
        ...

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of every position, fp32 `[batch, sequence, vocab]`, of rows `[batch, sequence]`; empties the cache."""
        ...

    def truncate(self, length: int) -> int:
        """Forget all but the first `length` tokens of every row: a shared prefix is kept, not computed again.

        A convolution's state cannot go back: there a row of more than `length` tokens forgets all of them.

        Returns:
            The tokens that the longest row holds now, `length` at most.
        """
        ...

    def reset(self, batch_size: int | None = None) -> None:
        """Empty the cache, and reallocate it when `batch_size` changes."""
        ...

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Use a LoRA adapter from here on, or none. Empties the cache, whose tokens were read with another.

        Raises:
            UserError: it changes a linear that the graph has no input for; nothing has changed then.
        """
        ...

    def memory(self) -> dict[str, int]:
        """Bytes by kind: `weights` (files on disk), `kv_cache` (reserved, convolution states among it)."""
        ...
