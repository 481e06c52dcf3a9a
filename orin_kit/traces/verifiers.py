"""What makes an answer fit to learn from: a table of verifiers, each a reason to reject one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orin_kit.data.questions import Question
from orin_kit.data.scoring import exact_match, final_answer
from orin_kit.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
GRAM = 8  # words: reasoning repeats shorter phrases for good reasons


@dataclass(frozen=True)
class Answer:
    """One reply of the teacher.

    Attributes:
        question: its number.
        sample: which of the replies to it.
        text: all of it, with the thought.
        tokens: its length.
        finished: whether it ended by a stop token.
    """

    question: int
    sample: int
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Rules:
    """What is asked of an answer.

    Attributes:
        check_answers: it must be the right one, where that is known.
        require_thought: it must think before it answers.
        min_tokens: the least length.
        max_tokens: the greatest length; none when None.
        max_repetition: the greatest share of word 8-grams, or of lines, that stand in it already.
        near_duplicate: answers to one question that share more of their word 3-grams (Jaccard) count as one.
    """

    check_answers: bool = True
    require_thought: bool = True
    min_tokens: int = 2
    max_tokens: int | None = None
    max_repetition: float = 0.2
    near_duplicate: float = 0.9

    def __post_init__(self) -> None:
        for name in ("max_repetition", "near_duplicate"):
            if not 0 <= getattr(self, name) <= 1:
                what = f"--{name.replace('_', '-')} is {getattr(self, name)}"
                raise UserError(what, mend="give a share from 0 to 1 (1 is off)")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            what = f"--max-tokens {self.max_tokens} is below --min-tokens {self.min_tokens}"
            raise UserError(what, mend="nothing could pass: change one of them")


@dataclass(frozen=True)
class Verifier:
    """A reason to reject, when it applies (`fails`), and what the user can do when it is the most frequent one."""

    reason: str
    mend: str
    fails: Callable[[Answer, Question, Rules], bool]


def thought_is_whole(text: str) -> bool:
    """At most one thought, closed after it was opened, with something before its end and after it."""
    if text.count(OPEN) != text.count(CLOSE) or text.count(OPEN) > 1:
        return False
    return OPEN not in text or text.index(OPEN) < text.index(CLOSE)


def repetition(text: str) -> float:
    """The greater share, 0 to 1, of word 8-grams and of lines (of three words or more) that stand in it already."""
    words = text.split()
    lines = [" ".join(line.split()) for line in text.splitlines() if len(line.split()) >= 3]
    return max(_repeated(list(zip(*(words[i:] for i in range(GRAM)), strict=False))), _repeated(lines))


def _repeated(items: list[tuple[str, ...]] | list[str]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0


# In the order in which they are asked: the first that fails is the reason.
VERIFIERS = (
    Verifier("cut", "raise --max-new-tokens", lambda a, q, r: not a.finished),
    Verifier("broken thought", "use a teacher that closes what it opens, or another --temperature",
             lambda a, q, r: not thought_is_whole(a.text)),
    Verifier("no thought", "use a teacher that reasons, ask for it with --system, or add --no-require-thought",
             lambda a, q, r: r.require_thought and not a.text.partition(OPEN)[2].partition(CLOSE)[0].strip()),
    Verifier("no answer", "use another teacher or --temperature", lambda a, q, r: not final_answer(a.text)),
    Verifier("too short", "lower --min-tokens", lambda a, q, r: a.tokens < r.min_tokens),
    Verifier("too long", "raise --max-tokens", lambda a, q, r: r.max_tokens is not None and a.tokens > r.max_tokens),
    Verifier("repetition", "raise --max-repetition", lambda a, q, r: repetition(a.text) > r.max_repetition),
    Verifier("wrong", "use a better teacher or more --samples, or add --no-check-answers",
             lambda a, q, r: r.check_answers and q.answer is not None and not exact_match(a.text, q.answer)),
)  # fmt: skip


def reason_to_reject(answer: Answer, question: Question, rules: Rules) -> str | None:
    """The reason of the first verifier that fails; None for an answer that passes all of them."""
    return next((v.reason for v in VERIFIERS if v.fails(answer, question, rules)), None)


def mend_for(reasons: Counter[str]) -> str:
    """What helps against the most frequent reason."""
    most = reasons.most_common(1)[0][0]
    return next(f"most are {most!r}: {v.mend}" for v in VERIFIERS if v.reason == most)


def grams(text: str, size: int = 3) -> frozenset[tuple[str, ...]]:
    """Its word n-grams; a shorter text is one of its own."""
    words = text.split()
    return frozenset(tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, 1)))


def likeness(a: str, b: str) -> float:
    """Jaccard index of two texts' word 3-grams: 1 for the same text, apart from blanks, and 0 for nothing in common."""
    first, second = grams(a), grams(b)
    return len(first & second) / len(first | second)


def by_question(answers: list[Answer]) -> Iterator[list[Answer]]:
    """The answers to each question, in the order of questions and samples."""
    groups: dict[int, list[Answer]] = {}
    for answer in sorted(answers, key=lambda a: (a.question, a.sample)):
        groups.setdefault(answer.question, []).append(answer)
    yield from groups.values()
