"""Data: nothing held out is trained on, and batch n depends on n and the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orin_kit.data.chat import Message, write_chats
from orin_kit.data.packing import Example
from orin_kit.distill.dataset import Batches, Dataset, load_dataset, load_questions, split_chats, to_tensors
from orin_kit.distill.pair import load_model
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


def test_a_prompt_is_in_one_part_alone(
    make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two replies to every prompt, and the same file as questions: what is tested is neither trained on nor asked."""
    twice = [(prompt, Message("assistant", f"{n} {reply.content}")) for prompt, reply in chats(30) for n in range(2)]
    for part in (0, 1, 2):
        others = [c for i, p in enumerate(split_chats(twice, 0.4)) if i != part for c in p]
        assert not {c[0] for c in split_chats(twice, 0.4)[part]} & {c[0] for c in others}
    path = tmp_path / "c.jsonl"
    write_chats(path, twice)
    general = {"chats": str(path), "held_out": 0.7, "items": 5}
    fields = {"chats": str(path), "held_out": 0.4, "row_length": 64, "questions": {"chats": str(path)}}
    for data in (fields, fields | {"general": general}):
        recipe = make_recipe(data=data)
        loaded = load_dataset(recipe, ChatTokenizer(pair_dirs[0]))
        held = {q.prompt for q in loaded.test} | ({q.prompt for q in loaded.general.test} if loaded.general else set())
        trained = " ".join(ChatTokenizer(pair_dirs[0]).decode(row.ids) for row in loaded.train)
        if loaded.general:
            trained += " ".join(ChatTokenizer(pair_dirs[0]).decode(row.ids) for row in loaded.general.rehearsed)
        assert held and not any(prompt[0].content in trained for prompt in held)
        assert not held & set(load_questions(recipe))


def test_questions_need_no_replies(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    write_chats(tmp_path / "c.jsonl", chats(9))
    (tmp_path / "q.jsonl").write_text('{"prompt": "Why?"}\n{"messages": [{"role": "user", "content": "How?"}]}\n')
    data = {"chats": str(tmp_path / "c.jsonl"), "questions": {"chats": str(tmp_path / "q.jsonl")}}
    assert load_questions(make_recipe(data=data)) == [(Message("user", "Why?"),), (Message("user", "How?"),)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general": {"chats": "LONG", "held_out": 0.5}}, r"data\.general: no assistant token"),
        ({"on_policy": True}, r"stages\.task\.on_policy: no question leaves room"),
    ],
)
def test_chats_that_leave_nothing(
    fields: dict[str, Any], words: str, make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    long = [(Message("user", f"word {i} " * 90), Message("assistant", "no")) for i in range(9)]
    turns = [(*chat, Message("user", "word " * 90), Message("assistant", "no")) for chat in chats(9)]
    write_chats(tmp_path / "long.jsonl", long)
    write_chats(tmp_path / "c.jsonl", turns if "on_policy" in fields else chats(9))
    data = {"chats": str(tmp_path / "c.jsonl"), "row_length": 48}
    if "general" in fields:
        data["general"] = fields["general"] | {"chats": str(tmp_path / "long.jsonl")}
    stages = {"task": {"on_policy": {"share": 0.5}}} if "on_policy" in fields else {}
    with pytest.raises(UserError, match=words):
        load_dataset(make_recipe(data=data, stages=stages), ChatTokenizer(pair_dirs[0]))


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
    one, other = (
        Batches(Dataset(rows, [], []), 4, seed=5, device=CPU),
        Batches(Dataset(rows, [], []), 4, seed=5, device=CPU),
    )
    expected = [one.batch(i).input_ids for i in range(30)]
    for i in (29, 3, 17):  # out of order: a resumed run begins anywhere
        assert torch.equal(other.batch(i).input_ids, expected[i])
    seeds = [
        torch.equal(Batches(Dataset(rows, [], []), 4, seed=s, device=CPU).batch(0).input_ids, expected[0])
        for s in range(6, 12)
    ]
    assert not all(seeds)


def test_an_epoch_is_every_row_once(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    rows = load_dataset(make_recipe(), ChatTokenizer(pair_dirs[0])).train
    batches = Batches(Dataset(rows, [], []), 1, seed=0, device=CPU)
    for epoch in range(2):
        seen = [batches.batch(epoch * len(rows) + i).input_ids[0].tolist() for i in range(len(rows))]
        assert sorted(seen) == sorted(row.ids for row in rows)


def test_labels_are_assistant_tokens(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    tokenizer = ChatTokenizer(pair_dirs[0])
    batch = Batches(load_dataset(make_recipe(), tokenizer), 1, seed=0, device=CPU).batch(0)
    text = tokenizer.decode(batch.labels.tolist())
    assert text.startswith("<think>") and "user" not in text
    positions = batch.asked[0].nonzero()[:, 0]
    shifted = positions + 1 < batch.input_ids.shape[1]
    assert torch.equal(batch.input_ids[0, positions[shifted] + 1], batch.labels[shifted])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37])
def test_rehearsal_is_a_share_of_the_rows(
    share: float, make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]
) -> None:
    tokenizer = ChatTokenizer(pair_dirs[0])
    general = {"tasks": {"count": 30, "kinds": ["logic"]}, "items": 5, "rehearsal": share}
    data = load_dataset(
        make_recipe(data={"tasks": {"count": 60, "kinds": ["strings"]}, "row_length": 64, "general": general}),
        tokenizer,
    )
    assert data.general is not None and len(data.general.test) == 5
    batches = Batches(data, 10, 0, CPU, share)
    old = [row in data.general.rehearsed for n in range(40) for row in batches.batch(n).rows]
    assert sum(old) == int(400 * share)
    assert max((b - a for a, b in pairwise([i for i, o in enumerate(old) if o])), default=1) <= 1 / max(share, 0.01) + 1
    fresh = [row for n in range(40) for row in batches.batch(n).rows if row not in data.general.rehearsed]
    first = fresh[: len(data.train)]
    assert sorted(row.ids for row in first) == sorted(row.ids for row in data.train)  # an epoch of the rest is whole


def test_packed_chats_do_not_see_each_other(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    """A row's chats give the logits that each gives alone."""
    tokenizer, model = ChatTokenizer(pair_dirs[0]), load_model(pair_dirs[1]).eval()
    data = load_dataset(make_recipe(data={"tasks": {"count": 20}, "row_length": 200}), tokenizer)
    row = next(row for row in data.train if len(row.lengths) > 2)
    batch = to_tensors([row, Example(row.ids[:5], row.trained[:5])], CPU)
    with torch.no_grad():
        packed = model.get_decoder()(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)[0][0]
        start = 0
        for length in row.lengths:
            alone = model.get_decoder()(input_ids=torch.tensor([row.ids[start : start + length]]))[0][0]
            torch.testing.assert_close(packed[start : start + length], alone, atol=2e-5, rtol=1e-4)
            start += length
    assert batch.documents[0].unique_consecutive(return_counts=True)[1].tolist() == list(row.lengths)
    ends = np.cumsum(row.lengths) - 1
    assert not batch.asked[0, ends].any()  # nobody is asked for the first token of the next chat


def test_without_packing_a_row_is_a_chat(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]) -> None:
    recipe = make_recipe(data={"tasks": {"count": 20}, "row_length": 200, "packing": False})
    data = load_dataset(recipe, ChatTokenizer(pair_dirs[0]))
    assert len(data.train) == 20 and all(len(row.lengths) == 1 for row in data.train)


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
