"""The teacher as an ONNX artifact, run by our own runtime: no torch, each row with a random generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from orin_kit.runtime.runtime import open_runtime
from orin_kit.runtime.sampler import Sampler, Sampling
from orin_kit.traces.teacher import Reply


class OnnxTeacher:
    """See `Teacher`."""

    def __init__(
        self, directory: Path, *, max_len: int, batch_size: int, threads: int | None, provider: str = "cpu"
    ) -> None:
        runtime = open_runtime(directory, max_len=max_len, batch_size=batch_size, threads=threads, provider=provider)
        self._backend, self._stop_ids = runtime.backend, runtime.tokenizer.stop_ids

    def reply(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], max_new_tokens: int
    ) -> list[Reply]:
        backend = self._backend
        samplers = [Sampler(replace(sampling, seed=seed), prompt) for seed, prompt in zip(seeds, prompts, strict=True)]
        replies: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        running = list(range(len(prompts)))
        tokens = np.zeros(len(prompts), np.int64)
        backend.reset(len(prompts))
        logits = backend.prefill(prompts)
        for step in range(1, max_new_tokens + 1):
            for row in running:
                tokens[row] = samplers[row].next(logits[row])
                finished[row] = int(tokens[row]) in self._stop_ids
                if not finished[row]:
                    replies[row].append(int(tokens[row]))
            running = [row for row in running if not finished[row] and backend.lengths[row] < backend.max_len]
            if not running or step == max_new_tokens:
                break
            # Every row takes a token, ended ones too: those at the end of their cache overwrite their last one.
            backend.truncate(backend.max_len - 1)
            logits = backend.decode(tokens)
        return [Reply(ids, ended) for ids, ended in zip(replies, finished, strict=True)]
