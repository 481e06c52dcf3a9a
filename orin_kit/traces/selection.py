"""From all answers to the traces that are kept, and the reason for each that is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from orin_kit.data.questions import Question
from orin_kit.data.scoring import final_answer
from orin_kit.errors import UserError
from orin_kit.traces.verifiers import Answer, Rules, by_question, likeness, reason_to_reject


def read_keep(text: str) -> int | None:
    """How many traces a question gets: "best" is one, "all" is None (no limit), else a number.

    Raises:
        UserError: anything else.
    """
    if text == "all":
        return None
    if text == "best":
        return 1
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UserError(f"--keep {text}", mend='give "best", "all" or a whole number above 0')


def select(
    answers: Sequence[Answer], questions: Sequence[Question], rules: Rules, keep: int | None
) -> tuple[list[Answer], list[tuple[Answer, str]]]:
    """Split the answers into traces and rejected ones with their reasons, both in the order of questions and samples.

    Of the answers to one question that pass the verifiers, those come first whose final answer most of its ended
    answers agree on (self-consistency, arXiv:2203.11171), then the shorter ones. One too like another that came before
    it is a "duplicate" (the same but for blanks) or "near duplicate"; what is beyond `keep` is "surplus".
    """
    traces: list[Answer] = []
    rejected: list[tuple[Answer, str]] = []
    for group in by_question(list(answers)):
        votes = Counter(_said(answer) for answer in group if answer.finished)
        passed: list[Answer] = []
        for answer in group:
            reason = reason_to_reject(answer, questions[answer.question], rules)
            if reason:
                rejected.append((answer, reason))
            else:
                passed.append(answer)
        chosen: list[Answer] = []
        for answer in sorted(passed, key=lambda a: (-votes[_said(a)], a.tokens, a.sample)):
            reason = _too_like(answer, chosen, rules.near_duplicate)
            if reason is None and keep is not None and len(chosen) == keep:
                reason = "surplus"
            if reason:
                rejected.append((answer, reason))
            else:
                chosen.append(answer)
        traces += chosen
    return sorted(traces, key=_place), sorted(rejected, key=lambda pair: _place(pair[0]))


def _place(answer: Answer) -> tuple[int, int]:
    return answer.question, answer.sample


def _said(answer: Answer) -> tuple[str, ...]:
    return tuple(final_answer(answer.text).split())


def _too_like(answer: Answer, chosen: Sequence[Answer], limit: float) -> str | None:
    if any(answer.text.split() == other.text.split() for other in chosen):
        return "duplicate"
    return "near duplicate" if any(likeness(answer.text, other.text) > limit for other in chosen) else None
