"""Which tokens a conversation sends to the model: within the context, system message first, old turns dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from orin_kit.chat.conversation import Conversation, Turn
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer

DEMO = Path(__file__).parents[2] / "calibration/demo-teacher"
SYSTEM = "You are terse."


@pytest.fixture
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(DEMO)


def say(conversation: Conversation, question: str, answer: str) -> tuple[list[int], int]:
    ids, dropped = conversation.prompt(question)
    said = conversation.tokenizer.encode(answer)
    conversation.add(Turn(question, answer), prompt=ids, answer=said, dropped=dropped)
    return ids, dropped


def test_the_prompt_is_the_chat_template_over_all_turns(tokenizer: ChatTokenizer) -> None:
    conversation = Conversation(tokenizer, max_len=500, room=50, system=SYSTEM)
    say(conversation, "What is 2 + 3?", "<think>2 + 3 = 5</think>\n5")
    ids, dropped = conversation.prompt("And doubled?")
    assert dropped == 0
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are terse.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>2 + 3 = 5</think>\n5<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_next_prompt_begins_with_the_very_tokens_that_were_spoken(tokenizer: ChatTokenizer) -> None:
    """Here the model spelled its answer letter by letter, as the tokenizer never would."""
    conversation = Conversation(tokenizer, max_len=500, room=50)
    prompt, _ = conversation.prompt("Which animal?")
    spelled = [token for letter in "minutes" for token in tokenizer.encode(letter)]
    assert spelled != tokenizer.encode("minutes")
    conversation.add(Turn("Which animal?", "minutes"), prompt=prompt, answer=spelled, dropped=0)
    ids, _ = conversation.prompt("Why?")
    assert ids[: len(prompt) + len(spelled)] == prompt + spelled
    text = tokenizer.render(conversation.messages("Why?"), reply=True)
    assert tokenizer.decode(ids, skip_special=False) == text
    # An answer that ends inside a character is told as it was chosen, too.
    half = tokenizer.encode("😀")[:2]
    conversation.add(Turn("Why?", tokenizer.decode(half), stopped=True), prompt=ids, answer=half, dropped=0)
    assert conversation.prompt("So?")[0][: len(ids) + 2] == ids + half
    # Once the past is another, its tokens are of no use.
    conversation.system = SYSTEM
    expected = tokenizer.encode_chat(conversation.messages("So?"), reply=True)
    assert conversation.prompt("So?")[0] == expected


def test_oldest_turns_are_dropped_and_never_the_system_message(tokenizer: ChatTokenizer) -> None:
    conversation = Conversation(tokenizer, max_len=120, room=30, system=SYSTEM)
    total = 0
    for number in range(20):
        ids, dropped = say(
            conversation, f"Question {number}, please count the marbles.", f"There are {number} marbles."
        )
        total += dropped
        assert len(ids) + 30 <= 120
        text = tokenizer.decode(ids, skip_special=False)
        assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        # What is left is the newest turns, in order, as many as there are, and no more were dropped than had to be.
        assert [turn.question for turn in conversation.turns] == [
            f"Question {n}, please count the marbles." for n in range(total, number + 1)
        ]
        if dropped:
            before = [Turn(f"Question {total - 1}, please count the marbles.", f"There are {total - 1} marbles.")]
            longer = Conversation(tokenizer, max_len=10**6, room=30, system=SYSTEM)
            longer.turns = before + conversation.turns[:-1]
            assert len(longer.prompt(conversation.turns[-1].question)[0]) + 30 > 120
    assert total > 10


def test_a_message_that_can_never_fit_is_an_error_and_changes_nothing(tokenizer: ChatTokenizer) -> None:
    conversation = Conversation(tokenizer, max_len=60, room=20)
    say(conversation, "Hi", "Hello")
    with pytest.raises(UserError, match=r"prompt of \d+ tokens, and the context holds 60") as raised:
        conversation.prompt("word " * 200)
    assert "--max-len" in raised.value.mend
    assert [turn.question for turn in conversation.turns] == ["Hi"]
    # One that fits only without the room and the past is answered as far as there is space.
    question = "7" * 45
    ids, dropped = conversation.prompt(question)
    assert dropped == 1 and 40 < len(ids) < 60


def test_a_template_that_refuses_the_chat_is_an_error(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    with pytest.raises(UserError, match="no chat template"):
        Conversation(ChatTokenizer(tmp_path), max_len=60, room=20).prompt("Hi")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    (tmp_path / "chat_template.jinja").write_text(refusing)
    conversation = Conversation(ChatTokenizer(tmp_path), max_len=60, room=20, system=SYSTEM)
    with pytest.raises(UserError, match="no system role"):
        conversation.prompt("Hi")
