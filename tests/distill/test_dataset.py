"""Data: nothing held out is trained on, and batch n depends on n and the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orin_kit.data.chat import Message, write_chats
from orin_kit.distill.dataset import Batches, load_dataset, split_chats
from orin_kit.distill.recipe import Recipe
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer

CPU = torch.device("cpu")


def chats(count: int) -> list[tuple[Message, ...]]:
    return [(Message("user", f"Say {i}."), Message("assistant", f"{i} it is.")) for i in range(count)]


@pytest.mark.parametrize("count", [3, 10, 101])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_chats_are_split_once(count: int, share: float) -> None:
    parts = split_chats([*chats(count), *chats(count)], share)
    assert all(parts)
    assert sorted(c[0].content for part in parts for c in part) == sorted(c[0].content for c in chats(count))


def test_users_chats(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path) -> None:
    write_chats(tmp_path / "c.jsonl", chats(40))
    recipe = make_recipe(data={"chats": str(tmp_path / "c.jsonl"), "held_out": 0.2, "row_length": 64})
    tokenizer = ChatTokenizer(pair_dirs[0])
    data = load_dataset(recipe, tokenizer)
    asked = {q.prompt[0].content: q.answer for q in data.test}
    assert len(asked) == 4
    assert all(answer == f"{prompt[4:-1]} it is." for prompt, answer in asked.items())
    trained = " ".join(tokenizer.decode(row.ids) for row in data.train)
    assert not any(prompt in trained for prompt in asked)


def test_test_questions_of_tasks_are_never_trained_on(
    make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]
) -> None:
    tokenizer = ChatTokenizer(pair_dirs[0])
    data = load_dataset(make_recipe(data={"tasks": {"count": 400}, "row_length": 256}, test_items=60), tokenizer)
    trained = " ".join(tokenizer.decode(row.ids) for row in data.train)
    assert len({q.prompt for q in data.test}) == 60
    assert not any(q.prompt[0].content in trained for q in data.test)
    other = load_dataset(make_recipe(data={"tasks": {"count": 400}, "row_length": 256}, seed=1), tokenizer)
    assert other.train != data.train
    assert other.watched == data.watched


def test_batches_depend_on_number_and_seed(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    rows = load_dataset(make_recipe(), ChatTokenizer(pair_dirs[0])).train
    one, other = Batches(rows, 4, seed=5, device=CPU), Batches(rows, 4, seed=5, device=CPU)
    expected = [one.batch(i).input_ids for i in range(30)]
    for i in (29, 3, 17):  # out of order: a resumed run begins anywhere
        assert torch.equal(other.batch(i).input_ids, expected[i])
    seeds = [torch.equal(Batches(rows, 4, seed=s, device=CPU).batch(0).input_ids, expected[0]) for s in range(6, 12)]
    assert not all(seeds)


def test_an_epoch_is_every_row_once(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    rows = load_dataset(make_recipe(), ChatTokenizer(pair_dirs[0])).train
    batches = Batches(rows, 1, seed=0, device=CPU)
    for epoch in range(2):
        seen = [batches.batch(epoch * len(rows) + i).input_ids[0].tolist() for i in range(len(rows))]
        assert sorted(seen) == sorted(row.ids for row in rows)


def test_labels_are_assistant_tokens(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    tokenizer = ChatTokenizer(pair_dirs[0])
    batch = Batches(load_dataset(make_recipe(), tokenizer).train, 1, seed=0, device=CPU).batch(0)
    text = tokenizer.decode(batch.labels.tolist())
    assert text.startswith("<think>") and "user" not in text
    positions = batch.asked[0].nonzero()[:, 0]
    shifted = positions + 1 < batch.input_ids.shape[1]
    assert torch.equal(batch.input_ids[0, positions[shifted] + 1], batch.labels[shifted])


def test_too_few_chats(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path) -> None:
    write_chats(tmp_path / "c.jsonl", chats(2))
    with pytest.raises(UserError, match="fewer than three"):
        load_dataset(make_recipe(data={"chats": str(tmp_path / "c.jsonl")}), ChatTokenizer(pair_dirs[0]))


def test_rows_too_short_for_an_answer(
    make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    write_chats(
        tmp_path / "c.jsonl", [(Message("user", f"word {i} " * 50), Message("assistant", "no")) for i in range(9)]
    )
    recipe = make_recipe(data={"chats": str(tmp_path / "c.jsonl"), "row_length": 8})
    with pytest.raises(UserError, match=r"data\.row_length"):
        load_dataset(recipe, ChatTokenizer(pair_dirs[0]))
