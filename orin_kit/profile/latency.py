"""The timed loop: one answer after another through a backend, every token's time kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from orin_kit.runtime.backend import Backend


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        batch_size: rows answered at once.
        prompt_length: tokens of each row's prompt.
        new_tokens: tokens of each answer, >= 2: the first comes from the prefill, each other from one decode step.
        warmup: answers that are not counted, first.
        repeats: answers that are.
        seed: of the prompts; every answer has a fresh one.
    """

    batch_size: int
    prompt_length: int
    new_tokens: int
    warmup: int
    repeats: int
    seed: int

    @property
    def context(self) -> int:
        """Tokens in the cache at the end; the last token of an answer is never fed back."""
        return self.prompt_length + self.new_tokens - 1


@dataclass
class Timings:
    """Seconds: `ttft` `[repeats]`, `tpot` `[repeats][new_tokens - 1]`."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[list[float]] = field(default_factory=list)


def measure(backend: Backend, work: Workload, vocab_size: int, on_answer: Callable[[], None] = lambda: None) -> Timings:
    """Time greedy answers to random prompts; stop tokens do not stop them.

    Args:
        backend: its cache has `work.batch_size` rows of at least `work.context` tokens.
        work: what to run.
        vocab_size: prompts are drawn evenly from the ids below it.
        on_answer: called after every answer, warm-up too, outside the timed part.
    """
    rng = np.random.default_rng(work.seed)
    timings = Timings()
    for answer in range(-work.warmup, work.repeats):
        prompts = rng.integers(0, vocab_size, (work.batch_size, work.prompt_length)).tolist()
        ttft, *tpot = _time_answer(backend, prompts, work.new_tokens)
        if answer >= 0:
            timings.ttft.append(ttft)
            timings.tpot.append(tpot)
        on_answer()
    return timings


def _time_answer(backend: Backend, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
    """Seconds that each token took, the choice of it (argmax) included; the first is the TTFT."""
    backend.reset()
    clock = time.perf_counter
    ticks = [clock()]
    tokens = backend.prefill(prompts).argmax(axis=1)
    ticks.append(clock())
    for _ in range(new_tokens - 1):
        tokens = backend.decode(tokens).argmax(axis=1)
        ticks.append(clock())
    return [after - before for before, after in itertools.pairwise(ticks)]
