"""Every verifier on answers made to fail it, and the choice among answers that pass."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from orin_kit.data.chat import Message
from orin_kit.data.questions import Question
from orin_kit.errors import UserError
from orin_kit.traces.selection import read_keep, select
from orin_kit.traces.verifiers import VERIFIERS, Answer, Rules, likeness, mend_for, reason_to_reject, repetition

KNOWN = Question((Message("user", "What is 12 x 7?"),), "84")
OPEN_ENDED = Question((Message("user", "What is 12 x 7?"),))
GOOD = "<think>12 x 7 is 10 x 7 and 2 x 7, so 70 + 14 = 84.</think>\n84"


def answer(text: str, sample: int = 0, *, tokens: int = 30, finished: bool = True, question: int = 0) -> Answer:
    return Answer(question, sample, text, tokens, finished)


@pytest.mark.parametrize("question", [KNOWN, OPEN_ENDED])
def test_a_good_answer_passes(question: Question) -> None:
    assert reason_to_reject(answer(GOOD), question, Rules()) is None


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("cut", answer(GOOD, finished=False)),
        ("broken thought", answer("<think>12 x 7 = 84.\n84")),
        ("broken thought", answer("12 x 7 = 84.</think>\n84")),
        ("broken thought", answer("</think>12<think>\n84")),
        ("broken thought", answer("<think>a</think><think>b</think>\n84")),
        ("no thought", answer("84")),
        ("no thought", answer("<think> \n</think>\n84")),
        ("no answer", answer("<think>12 x 7 = 84.</think>\n")),
        ("too short", answer(GOOD, tokens=9)),
        ("too long", answer(GOOD, tokens=61)),
        ("repetition", answer(f"<think>{'so it is that we add seven again and ' * 3}</think>\n84")),
        ("repetition", answer("<think>now add seven\n5\nnow add seven\n6\nnow add  seven\n</think>\n84")),
        ("wrong", answer(GOOD.replace("\n84", "\n85"))),
    ],
)
def test_a_bad_answer_fails_for_its_reason(reason: str, bad: Answer) -> None:
    rules = Rules(min_tokens=10, max_tokens=60)
    assert reason_to_reject(bad, KNOWN, rules) == reason
    assert mend_for(Counter({reason: 3, "wrong": 1 + (reason == "wrong")})).startswith(f"most are '{reason}': ")


def test_every_verifier_has_a_case_above_and_rules_switch_them_off() -> None:
    marks = test_a_bad_answer_fails_for_its_reason.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == {verifier.reason for verifier in VERIFIERS}
    wrong = GOOD.replace("\n84", "\n85")
    assert reason_to_reject(answer(wrong), KNOWN, Rules(check_answers=False)) is None
    assert reason_to_reject(answer(wrong), OPEN_ENDED, Rules()) is None
    assert reason_to_reject(answer("84"), KNOWN, Rules(require_thought=False)) is None
    looping = f"<think>{'so it is that we add seven again and ' * 9}</think>\n84"
    assert reason_to_reject(answer(looping), KNOWN, Rules(max_repetition=1)) is None


def test_repetition_and_likeness_against_counting() -> None:
    rng = random.Random(8)
    for _ in range(200):
        words = [rng.choice("abc") for _ in range(rng.randint(0, 40))]
        seen: list[list[str]] = []
        repeated = 0
        for i in range(len(words) - 7):
            repeated += words[i : i + 8] in seen
            seen.append(words[i : i + 8])
        assert repetition(" ".join(words)) == pytest.approx(repeated / len(seen) if seen else 0)
        other = [rng.choice("abc") for _ in range(rng.randint(3, 40))]
        words += ["a"] * 3
        first, second = ({" ".join(w[i : i + 3]) for i in range(len(w) - 2)} for w in (words, other))
        expected = len([g for g in first if g in second]) / len(first | second)
        assert likeness(" ".join(words), "  ".join(other)) == pytest.approx(expected)
    assert (likeness("a b", "a  b"), likeness("a b", "a c"), likeness("a", "a b c d")) == (1, 0, 0)


def test_the_answer_most_agree_on_comes_first_then_the_shortest() -> None:
    thoughts = [
        "first we say this much",
        "another way to see it",
        "short and sweet of course",
        "then quite differently",
    ]
    said = ["7", "8", "8", "9"]
    answers = [
        answer(f"<think>{thought}</think>\n{value}", i, tokens=20 - i)
        for i, (thought, value) in enumerate(zip(thoughts, said, strict=True))
    ]
    answers.append(answer("<think>7</think>\n7", 4, finished=False))  # cut: it has no vote
    kept, rejected = select(answers, [OPEN_ENDED], Rules(), 1)
    assert [a.sample for a in kept] == [2]
    assert [(a.sample, reason) for a, reason in rejected] == [
        (0, "surplus"),
        (1, "surplus"),
        (3, "surplus"),
        (4, "cut"),
    ]
    kept, _ = select(answers, [OPEN_ENDED], Rules(), 2)
    assert [a.sample for a in kept] == [1, 2]
    kept, rejected = select(answers, [OPEN_ENDED], Rules(), None)
    assert [a.sample for a in kept] == [0, 1, 2, 3]


def test_duplicates_count_once_and_only_within_a_question() -> None:
    base = "<think>" + " ".join(f"word{i}" for i in range(40)) + "</think>\n84"
    near = base.replace("word39", "other39")
    far = base.replace("word1 ", "x ").replace("word11 ", "y ").replace("word21 ", "z ").replace("word31 ", "q ")
    texts = [near, base, base.replace(" word5 ", "  word5\n"), far]
    answers = [answer(text, i, tokens=30 + i) for i, text in enumerate(texts)]
    answers.append(answer(base, 0, question=1))
    kept, rejected = select(answers, [KNOWN, KNOWN], Rules(near_duplicate=0.9), None)
    assert [(a.question, a.sample) for a in kept] == [(0, 0), (0, 3), (1, 0)]
    assert [(a.sample, reason) for a, reason in rejected] == [(1, "near duplicate"), (2, "near duplicate")]
    kept, rejected = select(answers, [KNOWN, KNOWN], Rules(near_duplicate=1), None)
    assert [(a.sample, reason) for a, reason in rejected] == [(2, "duplicate")]


def test_keep_and_rules_in_words() -> None:
    assert (read_keep("best"), read_keep("all"), read_keep("3")) == (1, None, 3)
    for wrong in ("0", "-1", "some", "1.5", ""):
        with pytest.raises(UserError, match="--keep"):
            read_keep(wrong)
    for fields in (dict(max_repetition=1.1), dict(near_duplicate=-0.1), dict(min_tokens=9, max_tokens=8)):
        with pytest.raises(UserError):
            Rules(**fields)  # type: ignore[arg-type]
