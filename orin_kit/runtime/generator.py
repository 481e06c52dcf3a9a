"""One conversation's tokens: prefill what is new in a prompt, then decode token by token."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UserError
from orin_kit.runtime.backend import Backend
from orin_kit.runtime.sampler import Sampler, Sampling

Tokens = abc.Generator[int, None, None]  # an iterator that can be closed


@dataclass(frozen=True)
class GenerationStats:
    """What one answer cost. The time its consumer takes between tokens is in none of the figures.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: those of them that were in the KV cache already.
        new_tokens: tokens given out, without the stop token.
        ttft_seconds: time to first token: from the request to the first choice, prefill and sampling.
        tpot_seconds: median time of the later tokens, decode and sampling; 0 when there were none.
        tokens_per_second: mean rate of the later tokens; 0 when there were none.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    tokens_per_second: float


class Generator:
    """Generates from a backend of batch 1 and keeps its KV cache from one prompt to the next.

    Args:
        backend: used by nobody else meanwhile, else the cache would not hold what `Generator` remembers.
        stop_ids: tokens that end an answer.

    Attributes:
        finish_reason: how the latest answer ended: "stop" (a stop token), "length" (`max_new_tokens`), "full" (the
            cache holds `max_len` tokens), "cancelled" (the iterator was closed, or an exception came); None before.
        stats: the latest answer's figures, once it has ended; None when it did before its first token.
    """

    def __init__(self, backend: Backend, stop_ids: Collection[int]) -> None:
        if backend.batch_size != 1:
            raise ValueError(f"Generator needs a backend of batch 1, not {backend.batch_size}")
        self.backend = backend
        self.stop_ids = frozenset(stop_ids)
        self.finish_reason: str | None = None
        self.stats: GenerationStats | None = None
        self._cached: list[int] = []  # always a prefix of what the backend's cache holds, so an exception cannot hurt

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values are in the cache: a prompt that begins with them costs only its rest."""
        return tuple(self._cached)

    def stream(self, ids: Sequence[int], sampling: Sampling, *, max_new_tokens: int) -> Tokens:
        """Continue `ids`; gives the tokens one by one, without the stop token.

        Closing the iterator, or an exception at any point, leaves the cache good for the next call.

        Raises:
            UserError: `ids` is empty or longer than the cache; the cache is untouched then.
        """
        prompt = [int(token) for token in ids]
        if not prompt:
            raise UserError("the prompt has no tokens", mend="write something to answer")
        if len(prompt) > self.backend.max_len:
            what = f"the prompt has {len(prompt)} tokens and the context holds {self.backend.max_len}"
            raise UserError(what, mend="shorten it, or raise --max-len")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}", mend="give 1 or more")
        return self._generate(prompt, Sampler(sampling, prompt), max_new_tokens)

    def _generate(self, prompt: list[int], sampler: Sampler, max_new_tokens: int) -> Tokens:
        self.finish_reason, self.stats = "cancelled", None  # until the answer ends otherwise
        reused, new_tokens, seconds = 0, 0, []
        try:
            started = time.perf_counter()
            reused, logits = self._prefill(prompt)
            while True:
                token = sampler.next(logits)
                seconds.append(time.perf_counter() - started)
                if token in self.stop_ids:
                    self.finish_reason = "stop"
                    return
                new_tokens += 1
                yield token
                if new_tokens == max_new_tokens:
                    self.finish_reason = "length"
                    return
                if len(self._cached) == self.backend.max_len:
                    self.finish_reason = "full"
                    return
                started = time.perf_counter()
                logits = self._decode(token)
        finally:
            if seconds:
                self.stats = _stats(len(prompt), reused, new_tokens, seconds)

    def _prefill(self, prompt: list[int]) -> tuple[int, NDArray[np.float32]]:
        """Feed what the cache lacks of `prompt`, at least its last token; return how many were there, and logits."""
        known = min(len(self._cached), int(self.backend.lengths[0]), len(prompt) - 1)
        reused = next((i for i in range(known) if self._cached[i] != prompt[i]), known)
        self._cached = self._cached[:reused]
        reused = self.backend.truncate(reused)
        self._cached = self._cached[:reused]
        logits: NDArray[np.float32] = self.backend.prefill([prompt[reused:]])[0]
        self._cached = list(prompt)
        return reused, logits

    def _decode(self, token: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.backend.decode(np.array([token], dtype=np.int64))[0]
        self._cached.append(token)
        return logits


def _stats(prompt_tokens: int, reused_tokens: int, new_tokens: int, seconds: list[float]) -> GenerationStats:
    ttft, later = seconds[0], seconds[1:]
    return GenerationStats(
        prompt_tokens=prompt_tokens,
        reused_tokens=reused_tokens,
        new_tokens=new_tokens,
        ttft_seconds=ttft,
        tpot_seconds=median(later) if later else 0.0,
        tokens_per_second=len(later) / sum(later) if later else 0.0,
    )
