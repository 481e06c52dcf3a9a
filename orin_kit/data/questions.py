"""What the teacher is asked: a user's questions or synthetic tasks, with the right answer where one is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orin_kit.data.chat import ROLES, Chat, Message
from orin_kit.data.scoring import final_answer
from orin_kit.data.tasks import KINDS, distinct
from orin_kit.errors import UserError

SHAPES = (
    'each line must be {"messages": [{"role", "content"}, ...]}, {"prompt": ...} or {"question": ...}; a last '
    'assistant message, "response" or "answer" is the right answer, and may be missing'
)


@dataclass(frozen=True)
class Question:
    """A chat up to the reply, and the answer that counts; None where nobody knows it."""

    prompt: Chat
    answer: str | None = None


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a jsonl file, those with the same prompt once.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line is not a question (the message names it).
    """
    path = Path(path)
    mend = "give a .jsonl file with one question a line"
    if not path.is_file():
        raise UserError(f"no such questions file: {path}", mend=mend)
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", mend="save the file as UTF-8") from error
    found: dict[Chat, Question] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                question = _question(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} line {number} is not a question: {error}", mend=SHAPES) from error
            found.setdefault(question.prompt, question)
    if not found:
        raise UserError(f"{path} holds no questions", mend=mend)
    return list(found.values())


def task_questions(count: int, kinds: Sequence[str], seed: int) -> list[Question]:
    """Different problems of the `train` split (see `orin_kit.data.tasks`).

    Raises:
        UserError: an unknown kind, or the kinds ran out before there were `count`.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"no such kind of task: {unknown[0]}", mend=f"choose from {', '.join(KINDS)}")
    return [Question(task.chat()[:-1], task.answer) for task in distinct("train", seed, count, kinds)]


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    if "messages" in row:
        pairs = [(m["role"], m["content"]) for m in row["messages"]]
        answer = pairs.pop()[1] if pairs and pairs[-1][0] == "assistant" else None
    else:
        asked = "prompt" if "prompt" in row else "question"
        pairs = [("user", row[asked])]
        answer = row.get("response" if asked == "prompt" else "answer")
    for role, content in pairs:
        if role not in ROLES:
            raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise TypeError("content is not a string")
    if not pairs or pairs[-1][0] != "user":
        raise ValueError("no user message to answer")
    if not isinstance(answer, str | None):
        raise TypeError("the answer is not a string")
    prompt = tuple(Message(role, content) for role, content in pairs)
    return Question(prompt, None if answer is None else final_answer(answer))
