"""Writes the calibration sets that come along: calibration/chat.jsonl and calibration/reasoning.jsonl.

    python tools/calibration/write_sets.py

Every text was written for this repository or is computed, so the sets carry its license and nobody else's.
"""

from __future__ import annotations

from pathlib import Path

from chat_set import chat_set
from reasoning_set import reasoning_set

from orin_kit.data.chat import write_chats

OUT = Path(__file__).parents[2] / "calibration"

if __name__ == "__main__":
    for name, chats in (("chat", chat_set()), ("reasoning", reasoning_set())):
        write_chats(OUT / f"{name}.jsonl", chats)
        print(f"{OUT / name}.jsonl: {len(chats)} chats")
