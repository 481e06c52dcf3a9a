"""Chats: what a conversation is, and the plain jsonl files users bring them in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orin_kit.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of `ROLES`."""

    role: str
    content: str


Chat = tuple[Message, ...]


def read_chats(path: str | Path) -> list[Chat]:
    """Read a jsonl file of chats.

    Each line is one JSON object in one of the two usual shapes:
    `{"messages": [{"role": "user", "content": "..."}, ...]}` or `{"prompt": "...", "response": "..."}`.

    Raises:
        UserError: the file is missing or empty, or a line is not such an object (the message names the line).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such chat file: {path}", mend="give a .jsonl file with one chat a line")
    with path.open(encoding="utf-8") as file:
        chats = list(_parse(file, path))
    if not chats:
        raise UserError(f"{path} holds no chats", mend="give a .jsonl file with one chat a line")
    return chats


def write_chats(path: str | Path, chats: Iterable[Chat]) -> None:
    """Write chats in the `messages` shape, one a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        for chat in chats:
            messages = [{"role": m.role, "content": m.content} for m in chat]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _parse(lines: Iterable[str], path: Path) -> Iterator[Chat]:
    shapes = 'each line must be {"messages": [{"role", "content"}, ...]} or {"prompt", "response"}'
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _chat(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} line {number} is not a chat: {error}", mend=shapes) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", mend="save the file as UTF-8") from error


def _chat(row: Any) -> Chat:
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    if "messages" not in row:
        pairs = [("user", row["prompt"]), ("assistant", row["response"])]
    else:
        pairs = [(m["role"], m["content"]) for m in row["messages"]]
    for role, content in pairs:
        if role not in ROLES:
            raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise TypeError("content is not a string")
    if not any(role == "assistant" for role, _ in pairs):
        raise ValueError("no assistant message")
    return tuple(Message(role, content) for role, content in pairs)
