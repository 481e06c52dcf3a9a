"""How a model's text comes to a terminal: harmless, thoughts dim."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

OPEN, CLOSE = "<think>", "</think>"

# A model can be made to say escape sequences (titles, clipboard, cursor moves): show the character, do not send it.
# C0 and DEL have pictures in Unicode, C1 has none; a carriage return alone would overwrite the line.
HARMLESS = {c: chr(0x2400 + c) for c in range(0x20) if c not in (0x09, 0x0A)}
HARMLESS |= {0x0D: "", 0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def harmless(text: str) -> str:
    """`text` without control characters other than newline and tab."""
    return text.translate(HARMLESS)


class ThoughtSplitter:
    """Streamed text in, spans `(text, is_thought)` out; the tags belong to the thought.

    Args:
        thinking: the prompt has opened a thought already, as some chat templates do.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        self._thinking = thinking
        self._held = ""  # may be the beginning of a tag

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """The spans that are certain with `text`."""
        self._held += text
        while True:
            tag = CLOSE if self._thinking else OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            yield before, self._thinking
            yield tag, True
            self._thinking, self._held = not self._thinking, after
        part = next(n for n in range(len(tag) - 1, -1, -1) if self._held.endswith(tag[:n]))
        certain = len(self._held) - part
        yield self._held[:certain], self._thinking
        self._held = self._held[certain:]

    def close(self) -> Iterator[tuple[str, bool]]:
        """What was held back: no tag after all."""
        yield self._held, self._thinking
        self._held = ""


class Display:
    """Answers on stdout, everything else on stderr; neither interprets markup."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets "?", not a traceback
        self._answers, self._notes = Console(), Console(stderr=True)
        self._ended = True

    def answer(self, spans: Iterator[tuple[str, bool]]) -> None:
        """Write spans of an answer at once."""
        for text, thought in spans:
            if text:
                _write(self._answers, harmless(text), "dim" if thought else "")
                self._ended = text.endswith("\n")

    def end_answer(self) -> None:
        """End the answer's last line, if it has not ended itself."""
        if not self._ended:
            _write(self._answers, "\n")
        self._ended = True

    def note(self, text: str, style: str = "dim") -> None:
        """A line of the program's own."""
        _write(self._notes, harmless(text), style)
        _write(self._notes, "\n")


def _write(console: Console, text: str, style: str = "") -> None:
    # As a segment: of a text, rich would expand the tabs and strip and wrap the lines, and they are the answer.
    console.print(Segments([Segment(text, Style.parse(style))]), crop=False)
