"""The synthetic tasks: right answers, disjoint splits, all kinds; and the scorer."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from orin_kit.data import tasks
from orin_kit.data.scoring import exact_match
from orin_kit.data.tasks import KINDS, SPLITS, Task, distinct, generate, split_of
from orin_kit.errors import UserError


def test_six_kinds_in_turn() -> None:
    assert len(KINDS) >= 6
    assert [task.kind for task in islice(generate("train", 3), len(KINDS))] == list(KINDS)


def test_same_seed_same_stream() -> None:
    assert list(islice(generate("test", 5), 50)) == list(islice(generate("test", 5), 50))
    assert list(islice(generate("test", 5), 50)) != list(islice(generate("test", 6), 50))


def test_no_test_question_is_ever_in_train() -> None:
    """By question text, over many draws, though the split is made by key."""
    questions = {split: {task.question for task in islice(generate(split, 1), 12_000)} for split in SPLITS}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["calibration"]
    assert not questions["calibration"] & questions["test"]
    assert all(split_of(task.kind, task.key) == "test" for task in islice(generate("test", 9), 600))


def test_distinct_has_no_key_twice() -> None:
    tasks = distinct("test", seed=1, count=600)
    assert len({(task.kind, task.key) for task in tasks}) == len(tasks) == 600


def solve(task: Task) -> str | None:
    """Answers found again from the question alone, for the kinds where that takes few lines."""
    q = task.question
    if task.kind == "counting":
        word = re.search(r"(?:times does|word) (\w+)", q)
        assert word
        return str(re.findall(r"\w+", q.split(": ")[1]).count(word[1]))
    if task.kind == "arithmetic":
        return solve_arithmetic(q)
    if task.kind == "ordering":
        numbers = [int(n) for n in re.findall(r"\d+", q)]
        if q.startswith("Sort"):
            return ", ".join(map(str, sorted(numbers, reverse="from largest" in q)))
        rank = next((r for r, word in enumerate(("second", "third"), 1) if word in q), 0)
        return str(sorted(numbers, reverse="largest" in q)[rank])
    return None


def solve_arithmetic(q: str) -> str:
    opening, events = q.split(". ")[:2]
    boxes = re.search(r"has (\d+) boxes with (\d+)", opening)
    total = int(boxes[1]) * int(boxes[2]) if boxes else int(re.findall(r"\d+", opening)[0])
    for part in events.split(" and then "):
        amount = int(re.findall(r"\d+", part)[0])
        total += amount if "more" in part else -amount
    return str(total)


@pytest.mark.parametrize("kind", ["counting", "arithmetic", "ordering"])
def test_answers_are_right(kind: str) -> None:
    for task in islice(generate("train", 11, [kind]), 500):
        assert task.answer == solve(task), task


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_equations_are_right(kind: str) -> None:
    for task in islice(generate("train", 12, [kind]), 300):
        for left, right in re.findall(r"([\d+x -]+) = (\d+)", task.steps):
            assert eval(left.replace("x", "*")) == int(right), task  # our own digits and signs


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_response_scores(kind: str) -> None:
    for task in islice(generate("train", 2, [kind]), 50):
        assert exact_match(task.response, task.answer)
        assert not exact_match(task.response + "0", task.answer)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("<think>1 + 1 = 2.</think>\n2", "2", True),
        (" 2 \n", "2", True),
        ("<think>2</think>", "2", False),
        ("<think>2", "2", False),
        ("<think>a</think>\nd  c\nb", "d c b", True),
        ("<think>x</think>3</think>\n4", "4", True),
        ("Two", "two", False),
        ("", "2", False),
    ],
)
def test_exact_match(response: str, answer: str, right: bool) -> None:
    assert exact_match(response, answer) is right


def test_more_problems_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "EXHAUSTED", 500)
    few = {"few": lambda rng: Task("few", str(rng.randrange(40)), "q", "s", "a")}
    monkeypatch.setattr(tasks, "KINDS", few)
    there = len({str(n) for n in range(40) if tasks.split_of("few", str(n)) == "train"})
    assert len(tasks.distinct("train", 0, there)) == there
    with pytest.raises(UserError, match=f"{there + 1} different problems of few: there are about {there}"):
        tasks.distinct("train", 0, there + 1)
