"""A recipe's data: rows to train on, rows to watch the held-out loss on, and questions for the final score."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from orin_kit.data.chat import Chat, read_chats
from orin_kit.data.packing import IGNORE, Example, collate, pack, tokenize_chat
from orin_kit.data.scoring import final_answer
from orin_kit.data.tasks import Task, distinct
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.signals import TensorBatch
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer

TEST_SEED = 1


@dataclass(frozen=True)
class Question:
    """One test item: the chat up to the reply, and the answer that counts."""

    kind: str
    prompt: Chat
    answer: str


@dataclass(frozen=True)
class Dataset:
    """Packed rows for training and for the held-out loss, test questions; no chat is in two of them."""

    train: list[Example]
    watched: list[Example]
    test: list[Question]


def load_questions(recipe: Recipe) -> list[Chat]:
    """The chats, up to a reply, that the recipe asks the teacher to answer; none of them is held out.

    Raises:
        UserError: the chat file is missing or broken.
    """
    questions, tasks = recipe.data.questions, recipe.data.tasks
    if questions is None:
        return []
    if questions.chats is not None:
        return list(dict.fromkeys(_from_chat(chat).prompt for chat in read_chats(questions.chats)))
    assert tasks is not None
    assert questions.tasks is not None
    further = distinct("train", _task_seed(recipe), tasks.count + questions.tasks, tasks.kinds)[tasks.count :]
    return [task.chat()[:-1] for task in further]


def load_dataset(recipe: Recipe, tokenizer: ChatTokenizer, answered: Sequence[Chat] = ()) -> Dataset:
    """Read or generate a recipe's data; `answered` chats are trained on as well.

    Raises:
        UserError: the chat file is missing, broken, or too small to hold some of it out.
    """
    if recipe.data.tasks is not None:
        tasks = recipe.data.tasks
        train = [t.chat() for t in distinct("train", _task_seed(recipe), tasks.count, tasks.kinds)]
        watched = [t.chat() for t in distinct("calibration", TEST_SEED, recipe.watched_items, tasks.kinds)]
        test = [_from_task(t) for t in distinct("test", TEST_SEED, recipe.test_items, tasks.kinds)]
    else:
        assert recipe.data.chats is not None
        train, watched, held = split_chats(read_chats(recipe.data.chats), recipe.data.held_out)
        test = [_from_chat(chat) for chat in held[: recipe.test_items]]
    parts = ([*train, *answered], watched[: recipe.watched_items])
    rows = [_rows(tokenizer, part, recipe.data.row_length) for part in parts]
    if not all(any(any(row.trained[1:]) for row in part) for part in rows):
        raise UserError("data: no assistant token fits into data.row_length", mend="raise data.row_length")
    return Dataset(rows[0], rows[1], test)


def split_chats(chats: Sequence[Chat], held_out: float) -> tuple[list[Chat], list[Chat], list[Chat]]:
    """Chats without duplicates, in a fixed random order: to train on, to watch, to test.

    Raises:
        UserError: there are fewer than three.
    """
    distinct_chats = list(dict.fromkeys(chats))
    if len(distinct_chats) < 3:
        raise UserError("data.chats: fewer than three different chats", mend="bring more: some are held out")
    random.Random(0).shuffle(distinct_chats)
    half = max(1, round(len(distinct_chats) * held_out / 2))
    half = min(half, (len(distinct_chats) - 1) // 2)
    return distinct_chats[2 * half :], distinct_chats[:half], distinct_chats[half : 2 * half]


def _task_seed(recipe: Recipe) -> int:
    tasks = recipe.data.tasks
    return recipe.seed if tasks is None or tasks.seed is None else tasks.seed


def _from_task(task: Task) -> Question:
    return Question(task.kind, task.chat()[:-1], task.answer)


def _from_chat(chat: Chat) -> Question:
    last = max(turn for turn, message in enumerate(chat) if message.role == "assistant")
    return Question("chats", chat[:last], final_answer(chat[last].content))


def _rows(tokenizer: ChatTokenizer, chats: Iterable[Chat], length: int) -> list[Example]:
    return list(pack((tokenize_chat(tokenizer, chat) for chat in chats), length))


class Batches:
    """Training rows in a new random order every epoch; batch `n` is the same in every run of a seed.

    Nothing is kept between batches, so a resumed run needs to know `n` alone.
    """

    def __init__(self, rows: Sequence[Example], batch_size: int, seed: int, device: torch.device) -> None:
        self.rows, self.batch_size, self.seed, self.device = rows, batch_size, seed, device
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def batch(self, index: int) -> TensorBatch:
        start = index * self.batch_size
        return to_tensors([self._row(start + i) for i in range(self.batch_size)], self.device)

    def _row(self, position: int) -> Example:
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self.rows[int(self._order[place])]


def in_batches(rows: Sequence[Example], batch_size: int, device: torch.device) -> Iterator[TensorBatch]:
    """All rows once, in their order."""
    for start in range(0, len(rows), batch_size):
        yield to_tensors(rows[start : start + batch_size], device)


def to_tensors(rows: Sequence[Example], device: torch.device) -> TensorBatch:
    # Id 0 as padding: causal attention never shows it to a real token, and no loss reads it.
    batch = collate(rows, pad_id=0)
    labels = torch.from_numpy(batch.labels).to(device)
    asked = labels != IGNORE
    return TensorBatch(
        input_ids=torch.from_numpy(batch.input_ids).to(device),
        mask=torch.from_numpy(batch.attention_mask).to(device).bool(),
        asked=asked,
        labels=labels[asked],
    )
