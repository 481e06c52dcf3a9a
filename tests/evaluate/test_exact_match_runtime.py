"""Batched greedy against one by one and against transformers' generate; scores against answers known beforehand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from orin_kit.data.tasks import KINDS, Task, distinct
from orin_kit.errors import UserError
from orin_kit.evaluate.exact_match import answer, exact_match
from orin_kit.runtime.runtime import open_runtime

NO_STOP: frozenset[int] = frozenset()


def prompts_of(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(3, 2048, length).tolist() for length in lengths]


def reference(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)  # type: ignore[operator]
    return [int(i) for i in out[0, len(prompt) :]]


def test_batched_greedy_is_one_by_one_and_transformers(deployed: SimpleNamespace) -> None:
    prompts = prompts_of([3, 60, 1, 17, 32])
    backend = deployed.runtime.backend
    batched = answer(backend, prompts, NO_STOP, 40)
    assert batched == [answer(backend, [prompt], NO_STOP, 40)[0] for prompt in prompts]
    assert batched == [reference(deployed.model, prompt, 40) for prompt in prompts]


def test_rows_stop_each_at_its_own_stop_token(deployed: SimpleNamespace) -> None:
    prompts = prompts_of([5, 40, 20, 9])
    free = [reference(deployed.model, prompt, 24) for prompt in prompts]
    stops = {free[0][0], free[1][7], free[2][15]}
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), 24)] for row in free]
    assert len({len(row) for row in expected}) > 2
    assert answer(deployed.runtime.backend, prompts, stops, 24) == expected


def test_a_full_row_ends_and_does_not_hurt_the_others(deployed: SimpleNamespace) -> None:
    runtime = open_runtime(deployed.onnx, max_len=32, threads=1)
    prompts = prompts_of([30, 4, 32])
    free = [reference(deployed.model, prompt, 40) for prompt in prompts]
    # A token needs no room of its own to be said, only to be continued: 32 - length + 1.
    expected = [row[: 33 - len(prompt)] for row, prompt in zip(free, prompts, strict=True)]
    assert answer(runtime.backend, prompts, NO_STOP, 40) == expected
    with pytest.raises(UserError):
        answer(runtime.backend, prompts_of([33, 4]), NO_STOP, 5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_count_exactly_the_tasks_that_the_model_answers(deployed: SimpleNamespace, batch_size: int) -> None:
    """Every second task is given the answer that transformers generates, so exactly those must match."""
    runtime = deployed.runtime
    tasks: list[Task] = []
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for i, task in enumerate(distinct("test", seed=5, count=24)):
        said = reference(deployed.model, runtime.tokenizer.encode_chat(task.chat()[:1], reply=True), 12)
        stop = next((k for k, token in enumerate(said) if token in runtime.tokenizer.stop_ids), len(said))
        text = runtime.tokenizer.decode(said[:stop])
        if "<think>" not in text and "</think>" not in text:
            right[task.kind].append(i % 2 == 0)
            tasks.append(replace(task, answer=text if i % 2 == 0 else f"{text}!"))
    runtime.backend.reset(3)
    scores = exact_match(runtime, tasks, batch_size=batch_size, max_new_tokens=12)
    expected = {kind: sum(found) / len(found) for kind, found in right.items() if found}
    assert scores == pytest.approx(expected | {"all": sum(map(sum, right.values())) / len(tasks)})
    assert 0 < scores["all"] < 1
    assert runtime.backend.batch_size == 3
    assert not runtime.backend.lengths.any()


def test_no_tasks_is_an_error(deployed: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="no tasks"):
        exact_match(deployed.runtime, [])
