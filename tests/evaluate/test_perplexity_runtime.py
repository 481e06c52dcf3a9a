"""Perplexity through the runtime against transformers' own loss on the same tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from orin_kit.data.chat import Chat, Message
from orin_kit.data.packing import IGNORE, tokenize_chat
from orin_kit.data.tasks import distinct
from orin_kit.errors import UserError
from orin_kit.evaluate import perplexity as module
from orin_kit.evaluate.perplexity import perplexity
from orin_kit.runtime.runtime import open_runtime

LONG: Chat = (
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", "<think>1.</think>\nOne."),
    Message("user", "And two?"),
    Message("assistant", "Two. " * 20),
)


def reference(deployed: SimpleNamespace, chats: list[Chat]) -> float:
    """Chat by chat: transformers shifts the labels and averages over a chat's tokens itself."""
    total, count = 0.0, 0
    for chat in chats:
        example = tokenize_chat(deployed.runtime.tokenizer, chat)
        labels = [i if asked else IGNORE for i, asked in zip(example.ids, example.trained, strict=True)]
        with torch.no_grad():
            loss = deployed.model(torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        n = sum(example.trained[1:])
        total, count = total + float(loss) * n, count + n
    return math.exp(total / count)


@pytest.mark.parametrize("budget", [1, 10 << 20, 256 << 20])
def test_it_is_transformers_loss_at_any_batch(
    deployed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", budget)
    chats = [LONG, *(task.chat() for task in distinct("test", seed=2, count=13))]
    deployed.runtime.backend.reset(3)
    assert perplexity(deployed.runtime, chats) == pytest.approx(reference(deployed, chats), rel=1e-4)
    assert deployed.runtime.backend.batch_size == 3


def test_nothing_to_score_and_too_long_are_errors(deployed: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="no assistant tokens"):
        perplexity(deployed.runtime, [(Message("user", "Hello?"),)])
    with pytest.raises(UserError, match="context holds 16"):
        perplexity(open_runtime(deployed.onnx, max_len=16, threads=1), [LONG])
