"""The timed loop over a real backend: how often it calls what, with which prompts, and which call each time is of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orin_kit.profile.latency import Timings, Workload, measure
from orin_kit.runtime.backends.onnx import OnnxBackend

VOCAB = 300


class Counting:
    """A real backend that notes its calls and moves a clock on: 7 for a prefill, 3 for a decode step."""

    def __init__(self, artifact: Path, work: Workload) -> None:
        self.backend = OnnxBackend(artifact, max_len=work.context, batch_size=work.batch_size, threads=1)
        self.prompts: list[NDArray[np.int64]] = []
        self.decodes = 0
        self.now = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        assert not self.backend.lengths.any(), "a fresh prompt needs an empty cache"
        self.prompts.append(np.array(rows))
        self.now += 7
        return self.backend.prefill(rows)

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self.decodes += 1
        self.now += 3
        return self.backend.decode(tokens)


def run(artifact: Path, work: Workload, monkeypatch: pytest.MonkeyPatch) -> tuple[Counting, Timings, int]:
    backend, answers = Counting(artifact, work), []
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: backend.now)
        timings = measure(backend, work, VOCAB, lambda: answers.append(1))
    return backend, timings, len(answers)


@pytest.mark.parametrize(("warmup", "repeats", "new_tokens"), [(0, 1, 2), (2, 3, 5), (3, 1, 9)])
def test_every_count_is_honoured(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, warmup: int, repeats: int, new_tokens: int
) -> None:
    work = Workload(2, 11, new_tokens, warmup, repeats, seed=3)
    backend, timings, answers = run(artifact, work, monkeypatch)
    assert len(backend.prompts) == answers == warmup + repeats
    assert backend.decodes == (warmup + repeats) * (new_tokens - 1)
    assert timings.ttft == [7.0] * repeats
    assert timings.tpot == [[3.0] * (new_tokens - 1)] * repeats
    # The last answer filled the cache exactly: `context` is what is needed, no token more.
    assert backend.lengths.tolist() == [work.context] * 2


def test_prompts_are_fresh_seeded_and_in_the_vocabulary(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(seed: int) -> NDArray[np.int64]:
        return np.array(run(artifact, Workload(2, 40, 2, 1, 4, seed), monkeypatch)[0].prompts)

    first = prompts(5)
    assert first.shape == (5, 2, 40)
    assert first.min() >= 0
    assert first.max() < VOCAB
    assert len(np.unique(first.reshape(10, 40), axis=0)) == 10
    assert np.array_equal(first, prompts(5))
    assert not np.array_equal(first, prompts(6))
