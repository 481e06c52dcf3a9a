"""Distillation on a user's chats and changed copies of them: what is trained on, what is logged, what stays apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import Any

import pytest

from marian import save_marian
from orin_kit.data.augment import Change, apply_changes
from orin_kit.data.chat import Chat, Message, read_chats, write_chats
from orin_kit.data.packing import Example, tokenize_chat
from orin_kit.distill import Recipe, distill, run
from orin_kit.distill.dataset import Dataset, split_chats
from orin_kit.manifest import read_manifest
from orin_kit.tokenizer import ChatTokenizer

# sentence, what the first model makes of it, what the second makes of that
SENTENCES = (
    ("Then the baker sells fresh bread near the river.", "Ensuite le boulanger vend du pain au bord du fleuve.",
     "Afterwards the baker offers fresh bread beside the river."),
    ("Please tell me about the garden behind the house.", "Parlez moi du jardin qui est par la maison.",
     "Kindly speak about the garden next to the house."),
    ("The teacher reads a story to the children.", "Le professeur lit un conte aux enfants.",
     "The teacher tells the children a story."),
    ("Some birds sing softly in the green trees.", "Des oiseaux chantent doucement dans les arbres.",
     "Some birds sing quietly among green trees."),
    ("It rains today.", "Il pleut.", "It rains today."),
)  # fmt: skip
HELD_OUT = 0.3
CASES = {
    "none": {},
    "augment": {"augment": {"copies": 2, "replace": 0.4, "swap": 0.3, "delete": 0.5}},
    "back_translation": {"back_translation": True},
    "both": {"augment": {"replace": 0.4, "swap": 0.3, "delete": 0.5}, "back_translation": True},
}


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("marian")
    save_marian(home / "there", [(old, pivot) for old, pivot, _ in SENTENCES])
    save_marian(home / "back", [(pivot, new) for _, pivot, new in SENTENCES])
    return {"there": str(home / "there"), "back": str(home / "back")}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's chats; each has a number of its own, which nothing may change."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    said = [f"{first} {second}" for (first, *_), (second, *_) in permutations(SENTENCES, 2)]
    write_chats(
        path, [(Message("user", f"Case {n}.\n{text}"), Message("assistant", f"{n}")) for n, text in enumerate(said)]
    )
    return path


@dataclass
class Finished:
    """A run: what it wrote, and the data that its trainer was given."""

    out: Path
    data: Dataset

    @property
    def changes(self) -> list[Change]:
        return [Change(**json.loads(line)) for line in (self.out / "augmented.jsonl").read_text().splitlines()]


@pytest.fixture
def finished(
    request: pytest.FixtureRequest, make_recipe: Callable[..., Recipe], translators: dict[str, str], chats: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> Finished:  # fmt: skip
    """The run of a case."""
    given: list[Dataset] = []
    trainer = run.Trainer

    def told(recipe: Recipe, pair: Any, data: Dataset, store: Any) -> run.Trainer:
        given.append(data)
        return trainer(recipe, pair, data, store)

    monkeypatch.setattr(run, "Trainer", told)
    case = dict(CASES[request.param])
    if "back_translation" in case:
        case["back_translation"] = translators
    recipe = make_recipe(
        data={"chats": str(chats), "held_out": HELD_OUT, "row_length": 200, **case},
        stages={"features": None, "attention": None, "task": {"steps": 3, "lora": None}},
    )
    distill(recipe, tmp_path / "out", progress=False)
    return Finished(tmp_path / "out", given[0])


def documents(rows: Iterable[Example]) -> list[tuple[int, ...]]:
    """The chats in rows, as tokens."""
    found = []
    for row in rows:
        ends = [sum(row.lengths[: i + 1]) for i in range(len(row.lengths))]
        found += [tuple(row.ids[end - length : end]) for end, length in zip(ends, row.lengths, strict=True)]
    return found


def numbers(texts: Iterable[str]) -> Counter[int]:
    """How often each chat of the file, or what was made of it, is there."""
    return Counter(int(re.search(r"Case (\d+)\.\n", text)[1]) for text in texts)  # type: ignore[index]


def changed_chats(changes: list[Change], train: list[Chat]) -> list[Chat]:
    """What the log says was made; raises ValueError where it does not fit the chat it names."""
    groups = [list(group) for _, group in groupby(changes, key=lambda change: change.chat)]
    assert [group[0].chat for group in groups] == list(range(len(groups)))
    assert all(len({change.source for change in group}) == 1 for group in groups)
    return [apply_changes(train[group[0].source], group) for group in groups]


@pytest.mark.parametrize("finished", ["none"], indirect=True)
def test_nothing_is_changed_unless_it_is_asked_for(finished: Finished, chats: Path) -> None:
    train, _, _ = split_chats(read_chats(chats), HELD_OUT)
    assert len(documents(finished.data.train)) == len(train)
    assert not (finished.out / "augmented.jsonl").exists()


@pytest.mark.parametrize(
    ("finished", "kinds"),
    [
        ("augment", {"replace", "swap", "delete"}),
        ("back_translation", {"back_translation"}),
        ("both", {"replace", "swap", "delete", "back_translation"}),
    ],
    indirect=["finished"],
)
def test_the_log_says_what_was_trained_on(finished: Finished, kinds: set[str], chats: Path) -> None:
    manifest = read_manifest(finished.out, "model", verify=True)
    assert "augmented.jsonl" in manifest.files
    assert ("there" in manifest.inputs) == ("back" in manifest.inputs) == ("back_translation" in kinds)
    assert {change.kind for change in finished.changes} == kinds
    train, _, _ = split_chats(read_chats(chats), HELD_OUT)
    made = changed_chats(finished.changes, train)
    assert len(made) >= len(train) // 2
    assert not set(made) & set(read_chats(chats))
    tokenizer = ChatTokenizer(finished.out)
    expected = [tuple(tokenize_chat(tokenizer, chat).ids) for chat in [*train, *made]]
    assert Counter(documents(finished.data.train)) == Counter(expected)


@pytest.mark.parametrize("finished", ["both"], indirect=True)
def test_nothing_of_what_is_held_out_is_trained_on(finished: Finished, chats: Path) -> None:
    tokenizer, data = ChatTokenizer(finished.out), finished.data
    trained = numbers(tokenizer.decode(list(ids)) for ids in documents(data.train))
    watched = numbers(tokenizer.decode(list(ids)) for ids in documents(data.watched))
    tested = numbers(question.prompt[-1].content for question in data.test)
    assert max(trained.values()) > 1  # copies
    assert set(watched.values()) == set(tested.values()) == {1}
    assert not trained.keys() & (watched.keys() | tested.keys())
    assert trained.keys() | watched.keys() | tested.keys() == set(range(len(read_chats(chats))))
