"""GSM8K as chats: real text, school mathematics with worked answers (MIT, github.com/openai/grade-school-math)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from orin_kit.data.chat import Chat, Message

CALCULATOR = re.compile(r"<<[^<>]*>>")  # notes for a calculator inside the answers: 48/2 = <<48/2=24>>24


def read_gsm8k(path: str | Path) -> list[Chat]:
    """The problems of a jsonl file, `{"question", "answer"}` a line: one user turn and its worked answer.

    The calculator's notes are taken out; the last line of an answer stays `#### 72`.
    """
    lines = Path(path).read_text("utf-8").splitlines()
    return [_chat(json.loads(line)) for line in lines if line.strip()]


def _chat(row: dict[str, str]) -> Chat:
    return (Message("user", row["question"].strip()), Message("assistant", CALCULATOR.sub("", row["answer"]).strip()))
