"""Questions from users' files and from the synthetic tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orin_kit.data.chat import Message
from orin_kit.data.questions import Question, read_questions, task_questions
from orin_kit.errors import UserError


def test_all_shapes_with_and_without_answers(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Line\u2028end 1 + 1?"},
                      {"role": "assistant", "content": "<think>easy</think>\n2"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "c"}]},
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": "3 + 3?"},
        {"question": "4 + 4?", "answer": "8"},
        {"question": "5 + 5?"},
        {"question": "2 + 2?", "answer": "five"},
    ]  # fmt: skip
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_questions(path) == [
        Question((Message("system", "Be brief."), Message("user", "Line\u2028end 1 + 1?")), "2"),
        Question((Message("user", "a"), Message("assistant", "b"), Message("user", "c"))),
        Question((Message("user", "2 + 2?"),), "4"),
        Question((Message("user", "3 + 3?"),)),
        Question((Message("user", "4 + 4?"),), "8"),
        Question((Message("user", "5 + 5?"),)),
    ]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": 5}', '{"question": "a", "answer": 5}', '{"messages": []}', '{"messages": 3}',
     '{"messages": [{"role": "assistant", "content": "a"}]}', '{"messages": [{"role": "judge", "content": "a"}]}',
     '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "system", "content": "a"}]}'],
)  # fmt: skip
def test_lines_that_are_no_questions_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match="line 2"):
        read_questions(path)


def test_files_without_questions(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    for name, words in (("absent.jsonl", "no such"), ("empty.jsonl", "no questions"), ("latin.jsonl", "UTF-8")):
        with pytest.raises(UserError, match=words):
            read_questions(tmp_path / name)


def test_tasks_are_different_and_of_the_training_split() -> None:
    found = task_questions(200, (), seed=3)
    assert len({question.prompt for question in found}) == 200
    assert found == task_questions(200, (), seed=3) != task_questions(200, (), seed=4)
    assert all(question.answer for question in task_questions(20, ["logic", "strings"], 0))


def test_a_kind_that_runs_out_ends_with_an_error() -> None:
    with pytest.raises(UserError, match=r"100000 different problems of conversion: there are about \d+"):
        task_questions(100_000, ["conversion"], 0)
    with pytest.raises(UserError, match="no such kind of task: poems"):
        task_questions(5, ["logic", "poems"], 0)
