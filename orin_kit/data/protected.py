"""Which parts of a text must not be changed: code, markup, numbers and formulas, names, single letters.

A text is cut into pieces that add up to it again. Rules, in this order:

1. code: fenced blocks (an open one reaches to the end), lines indented by four blanks or a tab, `inline` spans, and
   LaTeX between dollars or backslashed brackets;
2. markup: tags and special tokens (`<think>`, `<|im_end|>`), `{placeholders}`;
3. literal: every run without blanks that holds a digit, a currency sign or other symbol (`+`, `=`, `×`, `°`), a slash,
   `@`, `_` and the like, or a dot between letters: numbers, formulas, links, e-mail addresses, paths, file names. In
   Chinese and Japanese, which have no blanks, a run ends where the script changes, and numerals are runs too;
4. name: every word with a capital letter, also where a sentence only begins;
5. letter: every word of one letter;
6. word: what remains of letters (an apostrophe or hyphen may stand inside);
7. gap: blanks and punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

PROTECTED = ("code", "markup", "literal", "name", "letter")

_SPANS = re.compile(
    r"""
    (?P<code> (?P<fence>`{3,}|~{3,}) .*? (?:(?P=fence)|\Z)     # fenced, over lines
            | (?m:^(?:[ ]{4}|\t)[^\n]*$)
            | (?P<tick>`{1,2}) [^`\n]+ (?P=tick)
            | \$\$ [^$]+ \$\$
            | \$ (?![\s$]) [^$\n]*? (?<![\s$]) \$ (?!\d)       # "$5 and $7" is money: pandoc's rule
            | \\\( .*? \\\) | \\\[ .*? \\\] )
  | (?P<markup> < (?![\s<]) [^<>\n]{1,200} > | \{ [^{}\n]{0,200} \} )
    """,
    re.VERBOSE | re.DOTALL,
)
_NUMERALS = "〇零一二两三四五六七八九十百千万亿"
_UNSPACED = "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"  # kana, han, and their punctuation
_RUN = re.compile(rf"(?P<numeral>[{_NUMERALS}]+)|(?:(?![{_NUMERALS}])[{_UNSPACED}])+|[^\s{_UNSPACED}]+")
_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")
_SIGNS = frozenset("/\\@_=+*^<>|{}[]~#$%&°§")
_INNER_DOT = re.compile(r"\w[.:]\w")  # config.json, 12:30
_LEADING, _TRAILING = "([\"'“‘«", ".,;:!?)]\"'”’»…"


@dataclass(frozen=True)
class Piece:
    """A part of a text: where it begins, what it says, and one of `PROTECTED`, "word" or "gap"."""

    start: int
    text: str
    kind: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def pieces(text: str) -> list[Piece]:
    """The text, cut up: the pieces, joined, are the text again."""
    found: list[Piece] = []
    for start, part, kind in _spans(text):
        if kind != "text":
            found.append(Piece(start, part, kind))
            continue
        at = 0
        for run in _RUN.finditer(part):
            for offset, word, word_kind in _of_run(run.group(), numeral=run.group("numeral") is not None):
                begin = run.start() + offset
                if begin > at:
                    found.append(Piece(start + at, part[at:begin], "gap"))
                found.append(Piece(start + begin, word, word_kind))
                at = begin + len(word)
        if at < len(part):
            found.append(Piece(start + at, part[at:], "gap"))
    return found


def _spans(text: str) -> Iterator[tuple[int, str, str]]:
    """Code, markup, and the text between them."""
    at = 0
    for match in _SPANS.finditer(text):
        if match.start() > at:
            yield at, text[at : match.start()], "text"
        yield match.start(), match.group(), "code" if match.group("code") is not None else "markup"
        at = match.end()
    if at < len(text):
        yield at, text[at:], "text"


def _of_run(run: str, *, numeral: bool) -> Iterator[tuple[int, str, str]]:
    """What is in a run without blanks: one literal as a whole, or words."""
    if numeral or run == "-" or _INNER_DOT.search(run) or any(_is_sign(character) for character in run):
        bare = run.rstrip(_TRAILING).lstrip(_LEADING) or run
        yield run.index(bare), bare, "literal"
        return
    for match in _WORD.finditer(run):
        word = match.group()
        kind = "letter" if len(word) == 1 else "name" if word != word.lower() else "word"
        yield match.start(), word, kind


def _is_sign(character: str) -> bool:
    if character in _SIGNS or character.isnumeric():
        return True
    return not character.isascii() and unicodedata.category(character) in ("Sm", "Sc", "So", "Sk")
