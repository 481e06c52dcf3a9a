"""tools/train_text_model.py: its text, its losses, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_text_model as tool
from gsm8k import read_gsm8k
from pretraining import learning_rate
from train_demo_teacher import batches as demo_batches
from transformers import AutoModelForCausalLM, AutoTokenizer

from orin_kit.data.chat import Message
from orin_kit.data.packing import collate, tokenize_chat
from orin_kit.tokenizer import ChatTokenizer

PROBLEMS = [
    {
        "question": f"Tom has {n} apples and buys {n + 2} more. How many apples does he have?",
        "answer": f"Tom has {n} + {n + 2} = <<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2} apples.\n#### {2 * n + 2}",
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in GSM8K's format."""
    directory = tmp_path_factory.mktemp("gsm8k")
    for name, problems in (("train", PROBLEMS[:32]), ("test", PROBLEMS[32:])):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, problems)) + "\n", "utf-8")
    return directory


def options(directory: Path, gsm8k: Path, **changed: Any) -> argparse.Namespace:
    settings = dict(
        size="tiny", vocab_size=512, steps=6, batch_size=2, length=48, lr=1e-3, seed=0, threads=1, eval_every=3,
        save_every=3, compile=False,
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    return argparse.Namespace(directory=directory, gsm8k=gsm8k, **(settings | changed))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(tool.SIZES, "tiny", size)


def test_answers_lose_the_calculators_notes(gsm8k: Path) -> None:
    chat = read_gsm8k(gsm8k / "train.jsonl")[3]
    assert chat[0] == Message("user", "Tom has 3 apples and buys 5 more. How many apples does he have?")
    assert chat[1] == Message("assistant", "Tom has 3 + 5 = 8 apples.\n#### 8")


def test_an_epoch_predicts_every_token_once() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 30, 50)
    streams = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    rows = tool.token_rows(streams, 16, seed=0)
    assert rows.shape == ((lengths.sum() - 1) // 16, 17)
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    predicted = rows[:, 1:].reshape(-1)
    assert len(set(predicted.tolist())) == len(predicted)
    inside = np.diff(rows, axis=1) == 1
    assert (inside | (rows[:, 1:] % 100 == 0)).all()  # chats whole, end to end
    assert (rows == tool.token_rows(streams, 16, seed=0)).all()
    assert (rows != tool.token_rows(streams, 16, seed=1)).any()


def test_a_batch_depends_on_its_step_alone() -> None:
    streams = [list(range(n, n + 20)) for n in range(30)]
    args = argparse.Namespace(length=8, seed=3, batch_size=4, steps=50)
    whole = list(tool.batches(streams, args, 0))
    assert len(whole) == 50
    for (ids, labels), (later_ids, later_labels) in zip(whole[31:], tool.batches(streams, args, 31), strict=True):
        assert (ids == later_ids).all()
        assert (labels == later_labels).all()
        assert (ids[:, 1:] == labels[:, :-1]).all()


def test_too_little_text_is_said() -> None:
    args = argparse.Namespace(length=64, seed=0, batch_size=4, steps=5)
    with pytest.raises(SystemExit, match="less text than one batch"):
        next(tool.batches([[1, 2, 3]], args, 0))


def test_unigram_loss_is_that_of_the_counts() -> None:
    streams, answers = [[0, 1, 1], [2, 1]], np.array([1, 3, 1])
    counts = Counter(token for stream in streams for token in stream)
    expected = -sum(math.log((counts[token] + 1) / 9) for token in answers.tolist()) / 3
    assert tool.unigram_loss(streams, answers, vocab_size=4) == pytest.approx(expected)


def test_the_rate_warms_up_stays_and_falls_to_almost_nothing() -> None:
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99:701] == [2.0] * 602
    assert rates[850] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01


@pytest.mark.usefixtures("tiny")
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, gsm8k: Path) -> None:
    tool.train(options(tmp_path / "whole", gsm8k))

    real = tool.save_model

    def killed_after_saving(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tool, "save_model", killed_after_saving)
        tool.train(options(tmp_path / "killed", gsm8k))
    tool.train(options(tmp_path / "killed", gsm8k))
    whole, resumed = (
        torch.load(tmp_path / name / "train.pt", weights_only=True)["model"] for name in ("whole", "killed")
    )
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.usefixtures("tiny")
def test_transformers_loads_what_is_saved(tmp_path: Path, gsm8k: Path) -> None:
    tool.train(options(tmp_path / "model", gsm8k, vocab_size=400))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.float16
    tokenizer = ChatTokenizer(tmp_path / "model")
    chat = read_gsm8k(gsm8k / "test.jsonl")[0]
    assert tokenizer.decode(tokenizer.encode(chat[1].content)) == chat[1].content
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": m.role, "content": m.content} for m in chat]
    assert tokenizer.encode_chat(chat) == theirs.apply_chat_template(messages)["input_ids"]
    lines = [json.loads(line) for line in (tmp_path / "model/train.log.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["parameters"] == sum(p.numel() for p in model.parameters())
    # What the log says of the last step is what the saved model does, but for fp16.
    batch = collate([tokenize_chat(tokenizer, chat) for chat in read_gsm8k(gsm8k / "test.jsonl")], pad_id=0)
    labels = torch.from_numpy(batch.labels)
    with torch.no_grad():
        logits = model.float()(torch.from_numpy(batch.input_ids)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert loss == pytest.approx(lines[-1]["test_loss"], abs=1e-3)


def test_the_demo_teachers_batches_are_rows_of_one_length() -> None:
    tokenizer = ChatTokenizer(Path(__file__).parents[2] / "calibration/demo-teacher")
    args = argparse.Namespace(steps=3, seed=0, length=128, batch_size=4)
    for ids, labels in demo_batches(tokenizer, args, 1):
        assert ids.shape == labels.shape == (4, 128)
        asked = labels >= 0
        assert asked.any(axis=1).all()
        assert (labels[:, :-1][asked[:, :-1]] == ids[:, 1:][asked[:, :-1]]).all()
