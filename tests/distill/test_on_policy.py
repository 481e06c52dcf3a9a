"""The student's own replies: what is trained of them, and that their loss is the teacher's alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orin_kit.distill import Recipe, distill
from orin_kit.distill.on_policy import sample_replies
from orin_kit.distill.pair import load_model
from orin_kit.distill.recipe import OnPolicy
from orin_kit.errors import UserError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [300]]


def test_rows_are_prompt_and_reply(pair_dirs: tuple[Path, Path]) -> None:
    student = load_model(pair_dirs[1]).train()
    stops = set(range(0, 2048, 9))  # a random model meets one soon
    rules = OnPolicy(max_new_tokens=12)
    torch.manual_seed(0)
    rows = sample_replies(student, PROMPTS, stops, rules)
    assert student.training
    ended = 0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        reply = row.ids[len(prompt) :]
        assert row.ids[: len(prompt)] == prompt and 1 <= len(reply) <= 12
        assert row.trained == [False] * len(prompt) + [True] * len(reply)
        assert not any(token in stops for token in reply[:-1])
        ended += reply[-1] in stops
    assert ended
    torch.manual_seed(0)
    assert sample_replies(student, PROMPTS, stops, rules) == rows
    torch.manual_seed(1)
    assert sample_replies(student, PROMPTS, stops, rules) != rows


def test_almost_cold_sampling_is_greedy_whatever_the_padding(pair_dirs: tuple[Path, Path]) -> None:
    student = load_model(pair_dirs[1]).eval()
    rows = sample_replies(student, PROMPTS, (), OnPolicy(temperature=1e-4, max_new_tokens=6))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(6):
            ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], 1)
        assert row.ids == ids[0].tolist()


def test_a_run_with_half_its_batches_on_policy(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    stages = {
        "features": None,
        "attention": None,
        "task": {
            "steps": 8,
            "lora": None,
            "divergence": "jsd",
            "on_policy": {"share": 0.5, "max_new_tokens": 6},
            "teacher_weight": {"start": 0.0, "low": 0.0, "every": 100},
        },
    }
    distill(make_recipe(stages=stages), tmp_path / "out", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out/train.log.jsonl").read_text().splitlines()]
    # The data's batches have the cross-entropy as their loss (the teacher's weight is 0), the student's own the KD.
    kinds = ["data" if abs(x["loss"] - x["ce"]) < 1e-5 else "own" for x in lines]
    assert {"data", "own"} == set(kinds)
    for line, kind in zip(lines, kinds, strict=True):
        if kind == "own":
            assert line["loss"] == pytest.approx(line["kd"], rel=1e-5)


def test_prompts_that_leave_no_room_are_left_out(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    task = {"steps": 2, "on_policy": {"share": 1.0, "max_new_tokens": 4}}
    recipe = make_recipe(
        stages={"features": None, "attention": None, "task": task}, data={"tasks": {}, "row_length": 8}
    )
    with pytest.raises(UserError, match=r"data\.row_length"):
        distill(recipe, tmp_path / "out", progress=False)
