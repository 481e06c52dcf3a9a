"""A recipe's data: rows to train on, rows to watch the held-out loss on, and questions for the final score."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from orin_kit.data.augment import Change, Rates, augment
from orin_kit.data.chat import Chat, read_chats
from orin_kit.data.packing import IGNORE, Example, collate, cut, pack, tokenize_chat
from orin_kit.data.questions import read_questions
from orin_kit.data.scoring import final_answer
from orin_kit.data.tasks import Task, distinct
from orin_kit.distill.recipe import General as GeneralSection
from orin_kit.distill.recipe import Recipe, Tasks
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
class General:
    """What the student should not forget: rows to rehearse, rows to watch, questions for the report."""

    rehearsed: list[Example]
    watched: list[Example]
    test: list[Question]


@dataclass(frozen=True)
class Dataset:
    """Rows for training and for the held-out loss, test questions; no chat is in two of them.

    `prompts` are the training chats up to their last reply, as tokens, for a student that answers them itself;
    `changes` what augmentation did to the chats it copied.
    """

    train: list[Example]
    watched: list[Example]
    test: list[Question]
    general: General | None = None
    prompts: list[list[int]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


def load_questions(recipe: Recipe) -> list[Chat]:
    """The chats, up to a reply, that the recipe asks the teacher to answer; none of them is held out.

    Raises:
        UserError: the chat file is missing or broken.
    """
    questions, tasks = recipe.data.questions, recipe.data.tasks
    if questions is None:
        return []
    if questions.chats is not None:
        prompts = dict.fromkeys(question.prompt for question in read_questions(questions.chats))
        held = _held_out(recipe)
        return [prompt for prompt in prompts if prompt not in held]
    assert tasks is not None
    assert questions.tasks is not None
    seed = recipe.seed if tasks.seed is None else tasks.seed
    further = distinct("train", seed, tasks.count + questions.tasks, tasks.kinds)[tasks.count :]
    return [task.chat()[:-1] for task in further]


def load_dataset(
    recipe: Recipe, tokenizer: ChatTokenizer, answered: Sequence[Chat] = (), translations: Path | None = None
) -> Dataset:
    """Read or generate a recipe's data; `answered` chats are trained on as well.

    Args:
        recipe: whose data.
        tokenizer: the student's.
        answered: chats with replies of the teacher.
        translations: a file that keeps what back-translation, which takes long, has done so far.

    Raises:
        UserError: the chat file is missing, broken, or too small to hold some of it out.
    """
    data = recipe.data
    train, watched, test = _split(
        data.tasks, data.chats, data.held_out, recipe.seed, items=recipe.watched_items, questions=recipe.test_items
    )
    held = _held_out(recipe)  # of the general set as well, and the other way round
    train = [chat for chat in train if _from_chat(chat).prompt not in held]
    copies, changes = _changed_copies(recipe, train, translations)
    length, packing = data.row_length, data.packing
    rows = [_rows(tokenizer, part, length, packing) for part in ([*train, *answered, *copies], watched)]
    if not all(any(any(row.trained[1:]) for row in part) for part in rows):
        raise UserError("data: no assistant token fits into data.row_length", mend="raise data.row_length")
    prompts: list[list[int]] = []
    if recipe.stages.task.on_policy:
        asked = dict.fromkeys(_from_chat(chat).prompt for chat in [*train, *answered])
        prompts = [ids for ids in (tokenizer.encode_chat(prompt, reply=True) for prompt in asked) if len(ids) < length]
        if not prompts:
            what = f"stages.task.on_policy: no question leaves room for a reply in rows of {length} tokens"
            raise UserError(what, mend="raise data.row_length")
    general = None if data.general is None else _general(data.general, recipe, tokenizer)
    return Dataset(rows[0], rows[1], test, general, prompts, changes)


def _general(section: GeneralSection, recipe: Recipe, tokenizer: ChatTokenizer) -> General:
    train, watched, test = _split(
        section.tasks, section.chats, section.held_out, recipe.seed, items=section.items, questions=section.items
    )
    length, packing, held = recipe.data.row_length, recipe.data.packing, _held_out(recipe)
    train = [chat for chat in train if _from_chat(chat).prompt not in held]
    rehearsed = _rows(tokenizer, train, length, packing) if section.rehearsal else []
    seen = _rows(tokenizer, watched, length, packing)
    for part in ([rehearsed] if section.rehearsal else []) + [seen]:
        if not any(any(row.trained[1:]) for row in part):
            raise UserError("data.general: no assistant token fits into data.row_length", mend="raise data.row_length")
    return General(rehearsed, seen, test)


def _held_out(recipe: Recipe) -> set[Chat]:
    """Prompts of the chats that are watched or tested; tasks keep theirs apart by themselves."""
    held: set[Chat] = set()
    for section in (recipe.data, recipe.data.general):
        if section is not None and section.chats is not None:
            _, watched, test = split_chats(read_chats(section.chats), section.held_out)
            held |= {_from_chat(chat).prompt for chat in [*watched, *test]}
    return held


def _split(
    tasks: Tasks | None, chats: Path | None, held_out: float, seed: int, *, items: int, questions: int
) -> tuple[list[Chat], list[Chat], list[Question]]:
    """Chats to train on, `items` chats to watch, and test questions."""
    if tasks is not None:
        own = seed if tasks.seed is None else tasks.seed
        train = [t.chat() for t in distinct("train", own, tasks.count, tasks.kinds)]
        watched = [t.chat() for t in distinct("calibration", TEST_SEED, items, tasks.kinds)]
        return train, watched, [_from_task(t) for t in distinct("test", TEST_SEED, questions, tasks.kinds)]
    assert chats is not None
    train, watched, held = split_chats(read_chats(chats), held_out)
    return train, watched[:items], [_from_chat(chat) for chat in held[:questions]]


def _changed_copies(
    recipe: Recipe, chats: Sequence[Chat], translations: Path | None
) -> tuple[list[Chat], list[Change]]:
    """Changed copies of training chats, and what was changed in them."""
    copies: list[Chat] = []
    changes: list[Change] = []
    if rules := recipe.data.augment:
        rates = Rates(rules.replace, rules.swap, rules.delete)
        copies, changes = augment(chats, rates, copies=rules.copies, seed=recipe.seed)
    if models := recipe.data.back_translation:
        from orin_kit.data.back_translation import back_translate

        said_anew = back_translate(chats, models.there, models.back, store=translations)
        changes += [replace(change, chat=change.chat + len(copies)) for change in said_anew.changes]
        copies += said_anew.chats
    return copies, changes


def split_chats(chats: Sequence[Chat], held_out: float) -> tuple[list[Chat], list[Chat], list[Chat]]:
    """Chats without duplicates, in a fixed random order: to train on, to watch, to test; a prompt is in one part alone.

    Raises:
        UserError: there are fewer than three different prompts.
    """
    by_prompt: dict[Chat, dict[Chat, None]] = {}
    for chat in chats:
        by_prompt.setdefault(_from_chat(chat).prompt, {})[chat] = None
    groups = [list(group) for group in by_prompt.values()]
    if len(groups) < 3:
        raise UserError("data.chats: fewer than three different chats", mend="bring more: some are held out")
    random.Random(0).shuffle(groups)
    half = max(1, round(len(groups) * held_out / 2))
    half = min(half, (len(groups) - 1) // 2)
    parts = groups[2 * half :], groups[:half], groups[half : 2 * half]
    train, watched, test = ([chat for group in part for chat in group] for part in parts)
    return train, watched, test


def _from_task(task: Task) -> Question:
    return Question(task.kind, task.chat()[:-1], task.answer)


def _from_chat(chat: Chat) -> Question:
    last = max(turn for turn, message in enumerate(chat) if message.role == "assistant")
    return Question("chats", chat[:last], final_answer(chat[last].content))


def _rows(tokenizer: ChatTokenizer, chats: Iterable[Chat], length: int, packing: bool) -> list[Example]:
    examples = (tokenize_chat(tokenizer, chat) for chat in chats)
    return list(pack(examples, length) if packing else cut(examples, length))


class Rows:
    """Rows in a new random order every epoch: the one at a position is the same in every run of a seed."""

    def __init__(self, rows: Sequence[Example], *seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, position: int) -> Example:
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([*self.seed, epoch]).permutation(len(self.rows))
        return self.rows[int(self._order[place])]


class Batches:
    """Training batches: batch `n` is the same in every run of a seed, so a resumed run needs to know `n` alone.

    Args:
        data: its training rows, and the rows to rehearse, which make up the share `rehearsal` of every stretch of rows.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, device: torch.device, rehearsal: float = 0.0) -> None:
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.rows = Rows(data.train, seed)
        self.rehearsed = Rows(data.general.rehearsed if data.general else (), seed, 1)
        self.rehearsal = rehearsal if self.rehearsed.rows else 0.0
        self.prompts = data.prompts

    def batch(self, index: int) -> TensorBatch:
        return to_tensors([self._row(index * self.batch_size + i) for i in range(self.batch_size)], self.device)

    def questions(self, index: int) -> list[list[int]]:
        """Prompts for the student to answer itself, as many as a batch has rows."""
        chosen = np.random.default_rng([self.seed, 2, index]).integers(len(self.prompts), size=self.batch_size)
        return [self.prompts[i] for i in chosen]

    def _row(self, position: int) -> Example:
        before, after = int(position * self.rehearsal), int((position + 1) * self.rehearsal)
        return self.rehearsed[before] if after > before else self.rows[position - before]


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
        rows=tuple(rows),
        input_ids=torch.from_numpy(batch.input_ids).to(device),
        positions=torch.from_numpy(batch.position_ids).to(device),
        documents=torch.from_numpy(batch.documents).to(device),
        asked=asked,
        labels=labels[asked],
    )
