"""Chats from users' files, and chats to training rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from families import DEMO_TEACHER
from orin_kit.data.chat import Message, read_chats, write_chats
from orin_kit.data.packing import IGNORE, Example, collate, pack, tokenize_chat
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer

CHAT = (
    Message("system", "Be brief."),
    Message("user", "What is 12 x 7? é 漢 🙂"),
    Message("assistant", "<think>12 x 7 = 84.</think>\n84"),
    Message("user", "And 13?"),
    Message("assistant", "13"),
)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(DEMO_TEACHER)


def test_both_shapes_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    write_chats(path, [CHAT])
    with path.open("a") as file:
        file.write('\n{"prompt": "hi", "response": "ho"}\n')
    assert read_chats(path) == [CHAT, (Message("user", "hi"), Message("assistant", "ho"))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ("[]", "not a JSON object"),
        ('{"prompt": "a"}', "response"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "robot"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant"),
        ('{"messages": [{"role": "user", "content": 3}]}', "not a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line)
    with pytest.raises(UserError, match=said):
        read_chats(path)


def test_rendering_and_ids_equal_transformers(tokenizer: ChatTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(DEMO_TEACHER)
    messages = [{"role": m.role, "content": m.content} for m in CHAT]
    for reply in (False, True):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        assert tokenizer.render(CHAT, reply=reply) == text
        assert tokenizer.encode_chat(CHAT, reply=reply) == theirs(text, add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == len(theirs) == 2048
    assert tokenizer.decode(tokenizer.encode(CHAT[2].content)) == CHAT[2].content


def test_only_assistant_turns_are_trained(tokenizer: ChatTokenizer) -> None:
    example = tokenize_chat(tokenizer, CHAT)
    assert example.ids == tokenizer.encode_chat(CHAT)
    trained = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    expected = "".join(f"{m.content}<|im_end|>\n" for m in CHAT if m.role == "assistant")
    assert tokenizer.decode(trained, skip_special=False) == expected


def test_pack_loses_nothing_that_fits() -> None:
    rng = np.random.default_rng()
    examples = [Example(list(range(n)), [i % 2 == 0 for i in range(n)]) for n in rng.integers(1, 40, 200).tolist()]
    rows = list(pack(examples, 64))
    assert all(len(row.ids) <= 64 for row in rows)
    assert [i for row in rows for i in row.ids] == [i for e in examples for i in e.ids]
    assert [t for row in rows for t in row.trained] == [t for e in examples for t in e.trained]
    assert [len(row.ids) for row in pack([Example([1] * 100, [True] * 100)], 64)] == [64]


def test_labels_are_the_next_token() -> None:
    batch = collate([Example([5, 6, 7, 8], [False, True, False, True]), Example([1, 2], [False, True])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch.labels.tolist() == [[6, IGNORE, 8, IGNORE], [2, IGNORE, IGNORE, IGNORE]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
