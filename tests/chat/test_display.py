"""What reaches the terminal of what a model says."""

from __future__ import annotations

import random
import unicodedata

import pytest

from orin_kit.chat.display import Display, ThoughtSplitter, harmless


def spans(pieces: list[str], *, thinking: bool = False) -> list[tuple[str, bool]]:
    """The spans of a streamed text, neighbours of one kind joined."""
    splitter = ThoughtSplitter(thinking=thinking)
    joined: list[tuple[str, bool]] = []
    for span in [s for piece in pieces for s in splitter.push(piece)] + list(splitter.close()):
        if joined and joined[-1][1] == span[1]:
            joined[-1] = (joined[-1][0] + span[0], span[1])
        elif span[0]:
            joined.append(span)
    return joined


def chopped(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("42", False, [("42", False)]),
        ("<think>6 x 7</think>\n42", False, [("<think>6 x 7</think>", True), ("\n42", False)]),
        ("6 x 7</think>\n42", True, [("6 x 7</think>", True), ("\n42", False)]),
        (
            "a<think>b</think>c<think>d",
            False,
            [("a", False), ("<think>b</think>", True), ("c", False), ("<think>d", True)],
        ),
        ("1 < 2 <thin <<think>x", False, [("1 < 2 <thin <", False), ("<think>x", True)]),
        ("<think>a < b </thin", False, [("<think>a < b </thin", True)]),
        ("ends with <thi", False, [("ends with <thi", False)]),
        ("no </think> opened", False, [("no </think> opened", False)]),
        ("", False, []),
    ],
)
def test_thoughts_are_told_from_answers_however_the_text_is_cut(
    text: str, thinking: bool, expected: list[tuple[str, bool]]
) -> None:
    rng = random.Random()
    for pieces in [[text], list(text), *(chopped(text, rng) for _ in range(50))]:
        assert spans(pieces, thinking=thinking) == expected


def test_text_that_is_no_tag_is_not_held_back() -> None:
    splitter = ThoughtSplitter()
    assert [text for text, _ in splitter.push("plain text")] == ["plain text"]
    assert [text for text, _ in splitter.push(" <th")] == [" "]
    assert "".join(text for text, _ in splitter.push("ree")) == "<three"


def test_every_control_character_but_newline_and_tab_is_made_harmless() -> None:
    everything = "".join(chr(c) for c in range(0x3000))
    shown = harmless(everything)
    assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert harmless("\x1b]0;owned\x07\x1b[2J\x9b2J\x7f") == "␛]0;owned␇␛[2J\ufffd2J␡"
    assert harmless("a\r\nb\tc é 日本 😀 [bold]") == "a\nb\tc é 日本 😀 [bold]"


def test_nothing_is_interpreted_wrapped_stripped_or_expanded(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]x[/bold] :smile:\ta  " + "long " * 100 + " \n  \n\x1b[31mred https://x.y 1.5 'q'\n   "
    display = Display()
    display.answer(iter([(text, False), ("[dim]\x1b", True)]))
    display.end_answer()
    display.end_answer()
    display.note("[red]\x1b[31mnote")
    out, err = capsys.readouterr()
    assert out == text.replace("\x1b", "␛") + "[dim]␛\n"
    assert err == "[red]␛[31mnote\n"


def test_an_answer_that_ends_its_line_gets_no_second_newline(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.answer(iter([("42\n", False), ("", False)]))
    display.end_answer()
    assert capsys.readouterr().out == "42\n"


def test_thoughts_are_dim_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    display = Display()
    display.answer(iter([("<think>a</think>", True), ("b", False)]))
    assert capsys.readouterr().out == "\x1b[2m<think>a</think>\x1b[0mb"
