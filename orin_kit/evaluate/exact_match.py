"""Exact match of a deployed artifact: greedy answers to tasks, batched, through any runtime backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orin_kit.data.scoring import exact_match as is_match
from orin_kit.data.tasks import Task
from orin_kit.errors import UserError
from orin_kit.runtime.backend import Backend
from orin_kit.runtime.runtime import Runtime


def exact_match(
    runtime: Runtime, tasks: Sequence[Task], *, batch_size: int = 1, max_new_tokens: int = 96
) -> dict[str, float]:
    """Share of exact matches by kind of task, and over `all` of them.

    Args:
        runtime: an opened artifact; its cache is empty afterwards, of as many rows as before.
        tasks: what to ask (see `orin_kit.data.tasks.distinct`).
        batch_size: tasks answered at once; it changes the speed and, but for rounding, no answer.
        max_new_tokens: of an answer, its stop token included; a longer one is cut, and then seldom right.

    Raises:
        UserError: no tasks, a prompt longer than the cache, or no chat template.
    """
    if not tasks:
        raise UserError("no tasks to score", mend="give at least one")
    backend, tokenizer = runtime.backend, runtime.tokenizer
    prompts = [tokenizer.encode_chat(task.chat()[:1], reply=True) for task in tasks]
    # Answers of one kind are alike in length, so few rows wait for others to end.
    order = sorted(range(len(tasks)), key=lambda i: (tasks[i].kind, len(prompts[i])))
    hits: dict[str, list[bool]] = {kind: [] for kind in sorted({task.kind for task in tasks})}
    rows_before = backend.batch_size
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        scoring = bar.add_task("score", total=len(tasks))
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                replies = answer(backend, [prompts[i] for i in chosen], tokenizer.stop_ids, max_new_tokens)
                for i, reply in zip(chosen, replies, strict=True):
                    hits[tasks[i].kind].append(is_match(tokenizer.decode(reply), tasks[i].answer))
                bar.advance(scoring, len(chosen))
        finally:
            backend.reset(rows_before)
    scores = {kind: sum(found) / len(found) for kind, found in hits.items()}
    return {**scores, "all": sum(map(sum, hits.values())) / len(tasks)}


def answer(
    backend: Backend, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """Greedy replies to prompts of any lengths, without the stop token; a row ends where its cache is full, too.

    Raises:
        UserError: a prompt is longer than the cache.
    """
    backend.reset(len(prompts))
    replies: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(prompts), bool)
    stops = np.fromiter(stop_ids, np.int64)
    tokens: NDArray[np.int64] = backend.prefill(prompts).argmax(axis=1)
    for step in range(1, max_new_tokens + 1):
        running &= ~np.isin(tokens, stops)
        for row in np.flatnonzero(running):
            replies[row].append(int(tokens[row]))
        running &= backend.lengths < backend.max_len
        if not running.any() or step == max_new_tokens:
            break
        # Every row takes a token, ended ones too: those at the end of their cache overwrite their last one.
        backend.truncate(backend.max_len - 1)
        tokens = backend.decode(tokens).argmax(axis=1)
    return replies
