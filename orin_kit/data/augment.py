"""More training chats from few: words of the questions replaced, swapped or left out (EDA, arXiv:1901.11196).

Changing a question may change its answer, and nobody writes a new one. The rules below keep the answer right more
often than EDA's own, which draw any word; none can promise it, so every rate is 0 unless the user says otherwise.

Only system and user messages are changed, and in them only *eligible* words: written in lower case, and

- not protected (`orin_kit.data.protected`: code, markup, numbers, links, names, single letters);
- not next to something protected: in "buys 5 more" both words say what to do with the 5;
- not used by any reply of the chat: what the reply speaks of is what it depends on;
- not one of `MEANING`: negations, quantities, comparisons, order in time, question words; no superlative.

Then, each with its own rate:

- *delete* drops only `FUNCTION` words, which carry grammar and little else;
- *replace* takes a content word and puts another of the corpus, of the same shape, in its place, everywhere in the
  chat: a consistent renaming to a word that the chat does not have. A user's own synonyms are better, and may also
  stand for function words;
- *swap* exchanges two eligible neighbours with one blank between them, so that no word passes a comma or a number.

The lists are English. Other languages with letter case keep the other rules; scripts without case are left alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from orin_kit.data.chat import Chat, Message
from orin_kit.data.protected import PROTECTED, Piece, pieces
from orin_kit.errors import UserError

# Deleting one of these seldom changes what is asked.
FUNCTION = frozenset(
    "the an this that these those please just really very quite simply kindly also then now here there so well is are "
    "was were be been do does did has have had will would can could of to for from in on at with by as it its".split()
)
# An answer may hang on any of these; they are never touched.
MEANING = frozenset(
    "no not nor never none nothing neither cannot without except unless but only all every each any some both either "
    "or and if else than more less most least fewer many much few enough other another same different before after "
    "until while during since first last next previous second third half double twice once times whole zero one two "
    "three four five six seven eight nine ten eleven twelve hundred thousand who whom whose what which when where why "
    "how old young tall short fast slow big small large high low long up down left right over under above below into "
    "between out away older younger taller shorter faster slower bigger smaller larger higher lower longer greater "
    "back must should may might true false yes sum total difference product plus minus per".split()
)
_ENDINGS = ("ing", "ed", "ly", "er", "tion", "ness", "es", "s")


@dataclass(frozen=True)
class Rates:
    """What share of the words that may be changed is: 0 leaves all of them, 1 changes every one.

    Attributes:
        replace: of the eligible content words, each distinct word of a chat counted once.
        swap: of the pairs of eligible neighbours.
        delete: of the eligible function words.

    Raises:
        UserError: a rate outside 0 to 1.
    """

    replace: float = 0.0
    swap: float = 0.0
    delete: float = 0.0

    def __post_init__(self) -> None:
        for name, rate in asdict(self).items():
            if not 0 <= rate <= 1:
                raise UserError(f"the {name} rate is {rate}", mend="give a number from 0 (off) to 1")


@dataclass(frozen=True)
class Change:
    """One change of one message.

    Attributes:
        chat: number of the new chat among those that were made.
        message: number of the message in its chat.
        kind: "replace", "swap", "delete" or "back_translation".
        before, after: the text that was there, and what is there now.
        source: number of the chat it was made from, among those that were given.
        at: character of the *original* message where `before` begins.
    """

    chat: int
    message: int
    kind: str
    before: str
    after: str
    source: int
    at: int


def augment(
    chats: Sequence[Chat],
    rates: Rates,
    *,
    copies: int,
    seed: int,
    vocabulary: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Chat], list[Change]]:
    """Changed copies of chats, and what was changed in them.

    What becomes of a chat depends on its content, the seed, the rates and the vocabulary alone, not on its place.

    Args:
        chats: any; replies stay as they are.
        rates: how much is changed.
        copies: how often a chat is tried; copies that come out alike count once, and unchanged ones not at all.
        seed: of the random choices.
        vocabulary: what may stand for a word (`corpus_vocabulary`, `read_synonyms`); that of `chats` when None.
    """
    if vocabulary is None:
        vocabulary = corpus_vocabulary(chats) if rates.replace else {}
    made: list[Chat] = []
    changes: list[Change] = []
    for source, chat in enumerate(chats):
        seen = {chat}
        for copy in range(copies):
            found = _changes(chat, rates, _random(chat, seed, copy), vocabulary)
            changed = apply_changes(chat, found)
            if changed not in seen:
                seen.add(changed)
                changes += [replace(change, chat=len(made), source=source) for change in found]
                made.append(changed)
    return made, changes


def apply_changes(chat: Chat, changes: Iterable[Change]) -> Chat:
    """The chat with its changes made: the log of a new chat, applied to the chat it was made from, gives it again."""
    texts = [message.content for message in chat]
    for change in sorted(changes, key=lambda c: (c.message, c.at), reverse=True):  # from the end: `at` stays true
        text, end = texts[change.message], change.at + len(change.before)
        if text[change.at : end] != change.before:
            raise ValueError(f"message {change.message} does not say {change.before!r} at character {change.at}")
        texts[change.message] = text[: change.at] + change.after + text[end:]
    return tuple(Message(message.role, text) for message, text in zip(chat, texts, strict=True))


def write_changes(path: str | Path, changes: Iterable[Change]) -> None:
    """Write a log of changes, one JSON object a line with the fields of `Change`."""
    with Path(path).open("w", encoding="utf-8") as file:
        for change in changes:
            file.write(json.dumps(asdict(change), ensure_ascii=False) + "\n")


def corpus_vocabulary(chats: Iterable[Chat]) -> dict[str, Sequence[str]]:
    """For every content word of the questions, the content words of all of them that have its shape."""
    words = {word.text for chat in chats for _, word in _eligible(chat) if word.text not in FUNCTION}
    shapes: dict[tuple[str, int], list[str]] = {}
    for word in sorted(words):
        shapes.setdefault(_shape(word), []).append(word)
    return {word: shapes[_shape(word)] for word in words}


def read_synonyms(path: str | Path) -> dict[str, Sequence[str]]:
    """Read a user's synonyms: `.tsv` (word, then its synonyms, tabs between), or jsonl `{"word": ["synonym", ...]}`.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or has a line that is neither.
    """
    path = Path(path)
    mend = 'each line must be word<TAB>synonym<TAB>... in a .tsv, else {"word": ["synonym", ...]}'
    if not path.is_file():
        raise UserError(f"no such synonyms file: {path}", mend="give a .tsv or .jsonl file")
    found: dict[str, Sequence[str]] = {}
    try:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if line.strip():
                found |= _synonyms(line, path, number, mend)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", mend="save the file as UTF-8") from error
    if not found:
        raise UserError(f"{path} holds no synonyms", mend=mend)
    return found


def _synonyms(line: str, path: Path, number: int, mend: str) -> dict[str, Sequence[str]]:
    if path.suffix == ".tsv":
        word, *others = (part.strip() for part in line.split("\t"))
        rows: object = {word: others}
    else:
        try:
            rows = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}", mend=mend) from error
    if not isinstance(rows, dict):
        raise UserError(f"{path} line {number} is no JSON object", mend=mend)
    for word, others in rows.items():
        if not (word and isinstance(others, list) and others and all(isinstance(o, str) and o for o in others)):
            raise UserError(f"{path} line {number} gives no synonyms for {word!r}", mend=mend)
    return rows


def _random(chat: Chat, seed: int, copy: int) -> random.Random:
    text = json.dumps([[m.role, m.content] for m in chat])
    return random.Random(hashlib.sha256(f"{seed} {copy} {text}".encode()).digest())


def _shape(word: str) -> tuple[str, int]:
    """Its ending and, roughly, its length: what is left of grammar without a dictionary."""
    return next((ending for ending in _ENDINGS if word.endswith(ending)), ""), min(len(word) // 3, 4)


def _eligible(chat: Chat) -> list[tuple[int, Piece]]:
    """The words that may be changed, each with the number of its message."""
    replies = (m.content for m in chat if m.role == "assistant")
    spoken = {piece.text.lower() for reply in replies for piece in pieces(reply) if piece.kind != "gap"}
    found = []
    for number, message in enumerate(chat):
        if message.role == "assistant":
            continue
        cut = [piece for piece in pieces(message.content) if piece.text.strip(" ")]  # blanks do not keep apart
        for before, piece, after in zip([None, *cut], cut, [*cut[1:], None], strict=False):
            word = piece.text
            plain = piece.kind == "word" and word.islower() and word not in MEANING and word not in spoken
            beside = any(other is not None and other.kind in PROTECTED for other in (before, after))
            if plain and not beside and not (word.endswith("est") and len(word) > 4):
                found.append((number, piece))
    return found


def _changes(chat: Chat, rates: Rates, rng: random.Random, vocabulary: Mapping[str, Sequence[str]]) -> list[Change]:
    """Changes that do not overlap; a word takes part in one of them at most."""
    eligible = _eligible(chat)
    renamed = _renamed(chat, eligible, rates.replace, rng, vocabulary)
    changes, rest = [], []
    for number, piece in eligible:
        text = chat[number].content
        if piece.text in renamed:
            changes.append(_change(number, "replace", piece.text, renamed[piece.text], piece.start))
        elif piece.text in FUNCTION and text[piece.end : piece.end + 1] == " " and rng.random() < rates.delete:
            changes.append(_change(number, "delete", f"{piece.text} ", "", piece.start))
        else:
            rest.append((number, piece))
    taken = -1
    for i, ((number, first), (other, second)) in enumerate(pairwise(rest)):
        gap = chat[number].content[first.end : second.start]
        if number == other and gap == " " and first.text != second.text and i > taken and rng.random() < rates.swap:
            before, after = f"{first.text} {second.text}", f"{second.text} {first.text}"
            changes.append(_change(number, "swap", before, after, first.start))
            taken = i + 1
    return changes


def _renamed(
    chat: Chat,
    eligible: Sequence[tuple[int, Piece]],
    rate: float,
    rng: random.Random,
    vocabulary: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """New words for some of the chat's own. A word is renamed only where every place it stands in is eligible."""
    texts = [piece.text.lower() for message in chat for piece in pieces(message.content) if piece.kind != "gap"]
    stands, free = Counter(texts), Counter(piece.text for _, piece in eligible)
    taken = set(texts)
    renamed = {}
    for word in sorted(free):
        others = [other for other in vocabulary.get(word, ()) if other not in taken]
        if stands[word] == free[word] and others and rng.random() < rate:
            renamed[word] = rng.choice(others)
            taken.add(renamed[word])
    return renamed


def _change(message: int, kind: str, before: str, after: str, at: int) -> Change:
    return Change(chat=0, message=message, kind=kind, before=before, after=after, source=0, at=at)
