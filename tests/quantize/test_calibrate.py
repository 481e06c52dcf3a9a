"""The calibration sets that come along, and what names of sets mean."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from families import DEMO_TEACHER
from orin_kit.data.chat import read_chats
from orin_kit.errors import UserError
from orin_kit.quantize.calibrate import SETS, chat_file, read_samples
from orin_kit.tokenizer import ChatTokenizer

SUM = re.compile(r"(?<![\w./])((?:\d+(?:\.\d+)? [-+*/] )+\d+(?:\.\d+)?) = (-?\d+(?:\.\d+)?)(?![\w/]|\.\d)")


def test_names_of_sets_are_files_and_anything_else_is_a_path() -> None:
    assert chat_file(None) is None and chat_file("tasks") is None
    assert all(chat_file(name) == DEMO_TEACHER.parent / f"{name}.jsonl" for name in SETS)
    assert chat_file("mine.jsonl") == Path("mine.jsonl")


@pytest.mark.parametrize("name", SETS)
def test_sets_are_varied_and_long_enough(name: str) -> None:
    file = chat_file(name)
    assert file is not None
    chats = read_chats(file)
    assert len(set(chats)) == len(chats) >= 250
    assert all(m.content.strip() == m.content and m.content for chat in chats for m in chat)
    opening = [" ".join(chat[-2].content.split()[:4]) for chat in chats]
    assert len(set(opening)) > 60
    text = read_samples(ChatTokenizer(DEMO_TEACHER), file, samples=64, sample_length=256, seed=0, vocab_size=2048)
    assert text.rows.shape == (64, 256) and len(text.held_out) > 40


def test_worked_steps_are_right() -> None:
    """Every `a * b + c = d` in the reasoning set, computed by Python."""
    file = chat_file("reasoning")
    assert file is not None
    checked = 0
    for chat in read_chats(file):
        for left, right in SUM.findall(chat[-1].content):
            assert eval(left) == pytest.approx(float(right), rel=1e-5), chat[-1].content
            checked += 1
    assert checked > 300


def test_a_set_that_is_none_is_a_missing_file() -> None:
    with pytest.raises(UserError, match="no such chat file: chats"):
        read_samples(ChatTokenizer(DEMO_TEACHER), "chats", samples=4, sample_length=64, seed=0, vocab_size=2048)
