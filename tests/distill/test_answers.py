"""Questions that the teacher answers: what is asked, what is kept, and that a kill does not ask twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from families import DEMO_TEACHER
from orin_kit.data.chat import Message, read_chats, write_chats
from orin_kit.data.scoring import exact_match
from orin_kit.data.tasks import distinct
from orin_kit.distill import Recipe, distill
from orin_kit.distill.accuracy import greedy_replies
from orin_kit.distill.answers import teacher_answers
from orin_kit.distill.dataset import load_dataset, load_questions
from orin_kit.distill.pair import load_model
from orin_kit.errors import ArtifactError, UserError
from orin_kit.tokenizer import ChatTokenizer

STAGES = {"features": None, "attention": None, "task": {"steps": 2, "lora": None}}


def recipe(tmp_path: Path, **data: object) -> Recipe:
    student = tmp_path / "student"
    if not student.is_dir():
        student.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO_TEACHER / name, student / name)
    fields = {"teacher": DEMO_TEACHER, "student": student, "stages": STAGES, "batch_size": 2, "test_items": 6}
    return Recipe.parse({**fields, "data": {"row_length": 64, **data}})


def test_the_demo_teacher_answers_mostly_right_and_only_once(tmp_path: Path) -> None:
    tasks = distinct("train", 5, 60)
    model, tokenizer = load_model(DEMO_TEACHER), ChatTokenizer(DEMO_TEACHER)
    asked: list[int] = []
    options = {"max_new_tokens": 96, "batch_size": 32, "advance": asked.append}
    prompts = [task.chat()[:-1] for task in tasks]
    chats = teacher_answers(model, tokenizer, prompts, tmp_path / "a.jsonl", **options)
    answers = {task.question: task.answer for task in tasks}
    right = sum(exact_match(chat[-1].content, answers[chat[0].content]) for chat in chats)
    assert right >= 48  # 93 % on the test split
    assert sum(asked) == 60
    assert teacher_answers(model, tokenizer, prompts, tmp_path / "a.jsonl", **options) == chats
    assert sum(asked) == 60


def test_replies_that_do_not_end_are_dropped(tmp_path: Path) -> None:
    prompts = [task.chat()[:-1] for task in distinct("train", 5, 8)]
    model, tokenizer = load_model(DEMO_TEACHER), ChatTokenizer(DEMO_TEACHER)
    with pytest.raises(UserError, match="none ends within 3 tokens"):
        teacher_answers(model, tokenizer, prompts, tmp_path / "a.jsonl", max_new_tokens=3, batch_size=8)
    assert not (tmp_path / "a.jsonl").exists()


# --- a kill ----------------------------------------------------------------------------------------------------------

PROMPTS = [task.chat()[:-1] for task in distinct("train", 11, 14)]
OPTIONS: dict[str, int] = {"max_new_tokens": 26, "batch_size": 4}  # some replies are longer and are dropped


class KilledError(Exception):
    """Stands for a kill between two batches."""


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return load_model(DEMO_TEACHER)


@pytest.fixture(scope="module")
def undisturbed(teacher: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "a.jsonl"
    teacher_answers(teacher, ChatTokenizer(DEMO_TEACHER), PROMPTS, path, **OPTIONS)
    return path


def killed(teacher: PreTrainedModel, path: Path, batches: int) -> Path:
    """Ask, and die after some batches; returns the partial file."""
    done: list[int] = []

    def advance(count: int) -> None:
        done.append(count)
        if len(done) == batches:
            raise KilledError

    with pytest.raises(KilledError):
        teacher_answers(teacher, ChatTokenizer(DEMO_TEACHER), PROMPTS, path, advance=advance, **OPTIONS)
    assert not path.exists()
    return path.with_name("a.partial.jsonl")


@pytest.fixture
def generated(teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of prompts of every batch that the teacher generates."""
    counts: list[int] = []
    generate = teacher.generate

    def counted(**given: Any) -> Any:
        counts.append(len(given["input_ids"]))
        return generate(**given)

    monkeypatch.setattr(teacher, "generate", counted)
    return counts


def test_replies_are_those_of_all_prompts_at_once(teacher: PreTrainedModel, undisturbed: Path) -> None:
    tokenizer = ChatTokenizer(DEMO_TEACHER)
    replies = [(i, ids, tokenizer.decode(ids)) for i, ids in greedy_replies(teacher, tokenizer, PROMPTS, **OPTIONS)]
    ended = [(i, text) for i, ids, text in replies if len(ids) < 26 and ("<think>" in text) == ("</think>" in text)]
    assert 0 < len(ended) < len(PROMPTS)
    assert read_chats(undisturbed) == [(*PROMPTS[i], Message("assistant", text)) for i, text in ended]
    assert [file.name for file in undisturbed.parent.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(("torn", "again"), [(0, [2]), (7, [4, 2])])
def test_a_killed_teacher_answers_what_is_missing_and_ends_with_the_same_bytes(
    tmp_path: Path, teacher: PreTrainedModel, undisturbed: Path, generated: list[int], torn: int, again: list[int]
) -> None:
    partial = killed(teacher, tmp_path / "a.jsonl", 3)
    assert generated == [4, 4, 4]
    data = partial.read_bytes()
    assert len(data.splitlines()) == 1 + 12
    partial.write_bytes(data[: len(data) - torn])  # the last line half written
    generated.clear()
    done: list[int] = []
    tokenizer = ChatTokenizer(DEMO_TEACHER)
    chats = teacher_answers(teacher, tokenizer, PROMPTS, tmp_path / "a.jsonl", advance=done.append, **OPTIONS)
    assert generated == again
    assert done == [4, 4, 4, 2]
    assert (tmp_path / "a.jsonl").read_bytes() == undisturbed.read_bytes()
    assert chats == read_chats(undisturbed)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_kill_in_the_first_line(tmp_path: Path, teacher: PreTrainedModel, undisturbed: Path) -> None:
    partial = killed(teacher, tmp_path / "a.jsonl", 1)
    partial.write_bytes(partial.read_bytes()[:20])
    teacher_answers(teacher, ChatTokenizer(DEMO_TEACHER), PROMPTS, tmp_path / "a.jsonl", **OPTIONS)
    assert (tmp_path / "a.jsonl").read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize(
    ("prompts", "options"),
    [(PROMPTS[::-1], {}), (PROMPTS[:-1], {}), (PROMPTS, {"max_new_tokens": 27}), (PROMPTS, {"batch_size": 5})],
)
def test_replies_to_other_questions_are_not_used(
    tmp_path: Path, teacher: PreTrainedModel, generated: list[int], prompts: list[Any], options: dict[str, int]
) -> None:
    killed(teacher, tmp_path / "a.jsonl", 3)
    generated.clear()
    teacher_answers(teacher, ChatTokenizer(DEMO_TEACHER), prompts, tmp_path / "a.jsonl", **OPTIONS | options)
    assert sum(generated) == len(prompts)


def test_damaged_replies_are_said(tmp_path: Path, teacher: PreTrainedModel) -> None:
    partial = killed(teacher, tmp_path / "a.jsonl", 1)
    partial.write_bytes(partial.read_bytes().replace(b'"reply"', b'"rep\0y"'))
    with pytest.raises(ArtifactError, match=r"a\.partial\.jsonl cannot be read.*delete"):
        teacher_answers(teacher, ChatTokenizer(DEMO_TEACHER), PROMPTS, tmp_path / "a.jsonl", **OPTIONS)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_questions_are_further_problems_of_the_train_split(tmp_path: Path) -> None:
    asked = load_questions(recipe(tmp_path, tasks={"count": 30, "seed": 3}, questions={"tasks": 20}))
    labelled = {task.question for task in distinct("train", 3, 30)}
    assert len(asked) == 20
    assert not labelled & {chat[0].content for chat in asked}
    assert asked == [task.chat()[:-1] for task in distinct("train", 3, 50)[30:]]


def test_a_file_of_questions_loses_its_replies(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_chats(
        path,
        [
            (Message("user", "1 + 1?"), Message("assistant", "a secret")),
            (Message("user", "2?"), Message("assistant", "")),
        ],
    )
    write_chats(tmp_path / "c.jsonl", [(Message("user", str(n)), Message("assistant", "yes")) for n in range(9)])
    chosen = recipe(tmp_path, chats=tmp_path / "c.jsonl", questions={"chats": path})
    assert load_questions(chosen) == [(Message("user", "1 + 1?"),), (Message("user", "2?"),)]


def test_answered_questions_are_trained_on_and_kept_and_the_plain_student_has_none(tmp_path: Path) -> None:
    chosen = recipe(tmp_path, tasks={"count": 12}, questions={"tasks": 12})
    tokenizer = ChatTokenizer(DEMO_TEACHER)
    without, with_answers = (
        sum(len(row.ids) for row in load_dataset(chosen, tokenizer, extra).train)
        for extra in ((), [task.chat() for task in distinct("train", 0, 24)[12:]])
    )
    assert with_answers > 1.5 * without
    assert chosen.without_teacher().data.questions is None
    distill(chosen, tmp_path / "out", progress=False)
    kept = read_chats(tmp_path / "out" / "answers.jsonl")
    assert 0 < len(kept) <= 12
    assert not (tmp_path / ".out.checkpoint").exists()


def test_chats_with_task_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"questions\.tasks"):
        recipe(tmp_path, chats=tmp_path / "c.jsonl", questions={"tasks": 3})
    with pytest.raises(UserError, match="either tasks or chats"):
        recipe(tmp_path, tasks={"count": 3}, questions={})
