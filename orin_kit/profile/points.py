"""What is known of one point of a profile: one batch size and one prompt length, measured in one process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from orin_kit.profile.latency import Timings, Workload


class Spread(BaseModel):
    """A time in milliseconds: median, 95th percentile (linear between samples) and every sample, in order."""

    median: float
    p95: float
    samples: list[float]

    @classmethod
    def of_seconds(cls, seconds: Sequence[float]) -> Spread:
        samples = np.asarray(seconds, np.float64) * 1e3
        median, p95 = np.percentile(samples, (50, 95)).tolist()
        return cls(median=median, p95=p95, samples=[round(s, 4) for s in samples.tolist()])


class Memory(BaseModel):
    """Bytes by kind.

    Attributes:
        weights: the model's files on disk.
        kv_cache: reserved for the cache, for all rows of the full context.
        baseline: resident in the process with numpy and onnxruntime imported, before the model is opened.
        loaded: resident after the model was opened.
        load_peak: the most that was resident until then.
        peak: the most that was resident until the last token, everything included.
    """

    weights: int
    kv_cache: int
    baseline: int
    loaded: int
    load_peak: int
    peak: int


class Point(BaseModel):
    """One batch size and prompt length.

    Attributes:
        ttft_ms: `[repeats]` times from a fresh prompt to its first token (prefill and argmax).
        tpot_ms: `[repeats * (new_tokens - 1)]` times of one decode step and argmax, which gives every row a token.
        prefill_tokens_per_s, decode_tokens_per_s: all rows' tokens over the sum of those times.
        load_s: opening the artifact, in this point's process.
    """

    batch_size: int
    prompt_length: int
    ttft_ms: Spread
    tpot_ms: Spread
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_s: float
    memory: Memory

    @property
    def place(self) -> str:
        return f"batch {self.batch_size}, prompt {self.prompt_length}"


def point(work: Workload, timings: Timings, load_s: float, memory: Memory) -> Point:
    """Sum up what one worker measured."""
    steps = [step for answer in timings.tpot for step in answer]
    prompt_tokens = work.batch_size * work.prompt_length * len(timings.ttft)
    return Point(
        batch_size=work.batch_size,
        prompt_length=work.prompt_length,
        ttft_ms=Spread.of_seconds(timings.ttft),
        tpot_ms=Spread.of_seconds(steps),
        prefill_tokens_per_s=prompt_tokens / sum(timings.ttft),
        decode_tokens_per_s=work.batch_size * len(steps) / sum(steps),
        load_s=load_s,
        memory=memory,
    )
