"""Augmentation: what must stay stays, the rates are kept, and the log says what was done."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orin_kit.data.augment import (
    FUNCTION,
    MEANING,
    Change,
    Rates,
    apply_changes,
    augment,
    corpus_vocabulary,
    read_synonyms,
    write_changes,
)
from orin_kit.data.chat import Chat, Message
from orin_kit.data.protected import pieces
from orin_kit.data.tasks import distinct
from orin_kit.errors import UserError

ALL = Rates(replace=1, swap=1, delete=1)
SYLLABLES, ENDINGS = "ba cor den fil gar hun jol ket lam nip".split(), ("", "s", "ing", "ed", "ly")
CONTENT = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in ENDINGS]
PROTECTED = (
    "`x = 1; del y`", "```py\nfor the in that:\n    really(just)\n```", "3.14", "-5", "1,024", "2/3", "$7", "50%",
    "https://a.org/the/just?x=please", "really.just@please.org", "/home/the/just.txt", "config.json", "<think>",
    "<|im_end|>", "{please}", "a+b=c", "Ana", "O'Brien", "JSON", "q", "x²", "$\\sum the_i$", "\\(the x\\)", "x<y", "÷",
)  # fmt: skip


def random_chat(rng: random.Random) -> Chat:
    def text() -> str:
        words = []
        for _ in range(rng.randint(15, 40)):
            kind = rng.random()
            pool = CONTENT if kind < 0.5 else sorted(FUNCTION) if kind < 0.8 else PROTECTED
            words.append(rng.choice(pool) + rng.choice(["", "", "", ",", ".", "!"]))
        return " ".join(words) + "\n\n    the line is indented code, really just so\n\n" + rng.choice(CONTENT)

    reply = f"<think>The {rng.choice(CONTENT)} is really 5.</think>\n{rng.choice(CONTENT)}"
    return (Message("system", text()), Message("user", text()), Message("assistant", reply), Message("user", text()))


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    rng = random.Random(2026)
    return [random_chat(rng) for _ in range(40)]


def test_pieces_are_the_text_again(chats: list[Chat]) -> None:
    rng = random.Random(1)
    alphabet = "ab Z9.,!`~$<>{}\\()[]\n\t'-é漢三🙂/@_"
    texts = [m.content for chat in chats for m in chat]
    texts += ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 80))) for _ in range(3000)]
    for text in texts:
        cut = pieces(text)
        assert "".join(piece.text for piece in cut) == text
        assert [piece.start for piece in cut] == [sum(len(p.text) for p in cut[:i]) for i in range(len(cut))]


def test_chinese_numerals_are_literals_and_its_words_are_not() -> None:
    cut = [(piece.text, piece.kind) for piece in pieces("小明有5个苹果,十二个梨。") if piece.kind != "gap"]
    assert cut == [("小明有", "word"), ("5", "literal"), ("个苹果", "word"), ("十二", "literal"), ("个梨", "word")]


def test_protected_parts_and_replies_never_change(chats: list[Chat]) -> None:
    """With every rate at 1. The reference finds numbers, code and the rest by plain search, not by `pieces`."""
    made, changes = augment(chats, ALL, copies=3, seed=0)
    source = {change.chat: change.source for change in changes}
    assert len(made) > 40
    for number, new in enumerate(made):
        old = chats[source[number]]
        for before, after in zip(old, new, strict=True):
            assert before.role == after.role
            if before.role == "assistant":
                assert before == after
            digits = re.compile(r"\S*\d\S*")
            assert digits.findall(before.content) == digits.findall(after.content)
            assert re.findall(r"(?s)`+.*?`+|^    .*?$", before.content) == re.findall(
                r"(?s)`+.*?`+|^    .*?$", after.content
            )
            for part in PROTECTED:
                whole = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)")
                assert len(whole.findall(before.content)) == len(whole.findall(after.content))
            for word in MEANING:
                assert before.content.split().count(word) == after.content.split().count(word)


def test_words_of_the_reply_and_next_to_numbers_stay() -> None:
    chat = (
        Message("user", "please take the copper bottles, then buys 5 painted lanterns in the garden near the station"),
        Message("assistant", "<think>The garden has bottles.</think>\nstation"),
    )
    vocabulary = {word: [f"other{word}"] for word in chat[0].content.replace(",", "").split()}
    touched: Counter[str] = Counter()
    for seed in range(50):
        _, changes = augment([chat], Rates(0.5, 0.5, 0.5), copies=1, seed=seed, vocabulary=vocabulary)
        touched += Counter(word for change in changes for word in change.before.split())
    assert not {"garden", "bottles", "station", "buys", "painted"} & set(touched)
    assert {"copper", "lanterns", "please", "near"} <= set(touched)


def test_a_word_is_renamed_everywhere_and_to_a_new_one(chats: list[Chat]) -> None:
    made, changes = augment(chats, Rates(replace=1), copies=1, seed=4)
    vocabulary = corpus_vocabulary(chats)
    assert changes
    for change in changes:
        old, new = (
            [p.text for m in chat if m.role != "assistant" for p in pieces(m.content)]
            for chat in (chats[change.source], made[change.chat])
        )
        assert change.after in vocabulary[change.before]
        assert change.after not in old
        assert change.before not in new
        assert old.count(change.before) == new.count(change.after)


def test_same_seed_same_result_in_any_order(chats: list[Chat]) -> None:
    vocabulary = corpus_vocabulary(chats)
    rates = Rates(0.3, 0.3, 0.3)
    made, changes = augment(chats, rates, copies=2, seed=9, vocabulary=vocabulary)
    assert (made, changes) == augment(chats, rates, copies=2, seed=9, vocabulary=vocabulary)
    backwards, _ = augment(chats[::-1], rates, copies=2, seed=9, vocabulary=vocabulary)
    assert set(made) == set(backwards)
    alone, _ = augment(chats[7:8], rates, copies=2, seed=9, vocabulary=vocabulary)
    assert alone == [chat for n, chat in enumerate(made) if any(c.chat == n and c.source == 7 for c in changes)]
    assert set(made) != set(augment(chats, rates, copies=2, seed=10, vocabulary=vocabulary)[0])


def test_the_log_makes_the_new_chats_of_the_old(chats: list[Chat], tmp_path: Path) -> None:
    made, changes = augment(chats, Rates(0.5, 0.5, 0.5), copies=3, seed=1)
    write_changes(tmp_path / "changes.jsonl", changes)
    read = [Change(**json.loads(line)) for line in (tmp_path / "changes.jsonl").read_text("utf-8").splitlines()]
    assert read == changes
    assert {change.kind for change in read} == {"replace", "swap", "delete"}
    for number, chat in enumerate(made):
        of_it = [change for change in read if change.chat == number]
        assert chat == apply_changes(chats[of_it[0].source], of_it)
        assert chat != chats[of_it[0].source]
    with pytest.raises(ValueError, match="does not say"):
        apply_changes((Message("user", "something else"),), [replace(changes[0], message=0)])


@pytest.mark.parametrize("kind", ["replace", "swap", "delete"])
def test_rates_are_shares_of_what_may_change(chats: list[Chat], kind: str) -> None:
    """Against what a rate of 1 changes: at a rate r between four standard deviations of the binomial."""

    def count(rate: float) -> int:
        total = 0
        for seed in range(3):
            _, changes = augment(chats, Rates(**{kind: rate}), copies=1, seed=seed)
            total += len({(c.source, c.before) if kind == "replace" else c for c in changes})
        return total

    possible = count(1.0)
    assert possible > 400
    assert count(0.0) == 0
    for rate in (0.1, 0.4):
        # Swapping one pair takes its neighbours out of the running, so at a rate of 1 there are fewer than pairs.
        least, most = (rate, 2 * rate) if kind == "swap" else (rate, rate)
        slack = 4 * (possible * rate * (1 - rate)) ** 0.5
        assert least * possible - slack <= count(rate) <= most * possible + slack


def test_nothing_to_change_makes_no_chat() -> None:
    chat = (Message("user", "What is 12 x 7?"), Message("assistant", "84"))
    assert augment([chat] * 3, ALL, copies=5, seed=0) == ([], [])
    tasks = [task.chat() for task in distinct("train", 1, 30)]
    assert augment(tasks, Rates(), copies=5, seed=0) == ([], [])


def test_copies_that_come_out_alike_count_once() -> None:
    chat = (Message("user", "Please say the word really"), Message("assistant", "ok"))
    made, _ = augment([chat], Rates(delete=0.5), copies=50, seed=0)
    assert made == [(Message("user", "Please say word really"), chat[1])]


def test_synonyms_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "s.tsv").write_text("glad\thappy\tcheerful\n\nthe\ta certain\n")
    (tmp_path / "s.jsonl").write_text('{"glad": ["happy", "cheerful"]}\n{"the": ["a certain"]}\n')
    synonyms = read_synonyms(tmp_path / "s.tsv")
    assert synonyms == read_synonyms(tmp_path / "s.jsonl") == {"glad": ["happy", "cheerful"], "the": ["a certain"]}
    chat = (Message("user", "I see one glad face near the river"), Message("assistant", "good"))
    made, _ = augment([chat], Rates(replace=1), copies=8, seed=0, vocabulary=synonyms)
    assert {chat[0].content for chat in made} == {
        f"I see one {word} face near a certain river" for word in ("happy", "cheerful")
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.tsv", "alone\n", "line 1"),
        ("s.jsonl", '{"a": ["b"]}\nnot json\n', "line 2"),
        ("s.jsonl", '["a"]', "line 1"),
        ("s.jsonl", '{"a": "b"}', "line 1"),
        ("s.jsonl", "\n", "no synonyms"),
    ],
)
def test_bad_synonyms_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_synonyms(tmp_path / name)
    with pytest.raises(UserError, match="no such"):
        read_synonyms(tmp_path / "absent.tsv")


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_out_of_range(rate: float) -> None:
    for name in asdict(Rates()):
        with pytest.raises(UserError, match=name):
            Rates(**{name: rate})
