"""Back-translation: questions said anew by way of another language (Sennrich et al., arXiv:1511.06709).

Any two sequence-to-sequence checkpoints serve, one there and one back, such as two Marian models (`opus-mt-en-fr` and
`opus-mt-fr-en`). A user message is translated sentence by sentence, as such models are trained. What must not change is
left in its sentence, because a model needs it there to translate well, and is looked for afterwards: a sentence is
taken only when it comes back with all of it, letter for letter and in order; else the old one stays. That is

- code, markup, numbers, links and the like (`orin_kit.data.protected`); code on lines of its own is never sent;
- single letters, apart from lone vowels and y, which are words in many languages ("a", "I");
- names: words with a capital letter that some message of the chat has inside a sentence;
- the words of the last reply's final answer, where that has `SHORT_ANSWER` words at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from orin_kit.data.augment import Change, apply_changes
from orin_kit.data.chat import Chat
from orin_kit.data.protected import Piece, pieces
from orin_kit.data.scoring import final_answer
from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import sha256_input

SHORT_ANSWER = 5  # words
_END = re.compile(r"""[.!?…]["'”’»)]*(?=\s)|[。！？]["”’」]?|\n""")


@dataclass(frozen=True)
class Decoding:
    """How both models write.

    Attributes:
        beams: of the beam search; 1 is greedy.
        temperature: 0 searches; above 0 samples, and then there are no beams.
        top_p: when sampling, the likeliest tokens up to this sum.
        max_tokens: of a sentence, in either language; longer ones stay as they are.
        batch_size: sentences at once.
        seed: of the sampling.
    """

    beams: int = 4
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beams", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"back-translation: {name} is {getattr(self, name)}", mend="give 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            what = f"back-translation: temperature {self.temperature}, top_p {self.top_p}"
            raise UserError(what, mend="give a temperature of 0 or more, and a top_p above 0 and up to 1")


@dataclass
class BackTranslation:
    """What came of it.

    Attributes:
        chats: new ones, those with at least one new sentence.
        changes: a log of them (kind "back_translation"), one entry a sentence.
        sentences: how many were taken ("changed"), and why the others were not: "unchanged", "lost" (something that
            must not change), "unfinished" (longer than `max_tokens` in some language), "drifted" (less than half or
            more than twice as many words).
    """

    chats: list[Chat] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    sentences: Counter[str] = field(default_factory=Counter)


class Translator:
    """A sequence-to-sequence checkpoint with its tokenizer.

    Args:
        directory: local, as transformers saves one; weights as safetensors.

    Raises:
        UserError: no such directory, not sequence to sequence, or no tokenizer.
        ArtifactError: the weights are missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            what = f"{directory} is no model directory: it has no config.json"
            raise UserError(what, mend="give a directory that holds a sequence-to-sequence checkpoint (e.g. Marian)")
        logging.disable_progress_bar()  # ours are enough
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        except (ValueError, OSError) as error:
            raise UserError(f"{directory}: {error}", mend="give a checkpoint that transformers knows") from error
        if not config.is_encoder_decoder:
            what = f"{directory} holds a {config.model_type} model, which only continues text"
            raise UserError(what, mend="back-translation needs a sequence-to-sequence model, e.g. Marian")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # transformers, tokenizers and sentencepiece share no base class
            what = f"the tokenizer of {directory} cannot be loaded: {_first_line(error)}"
            mend = "copy all of its files (Marian: source.spm, target.spm, vocab.json), and pip install sentencepiece"
            raise UserError(what, mend=mend) from error
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # safetensors has its own
            what = f"the weights of {directory} cannot be loaded: {_first_line(error)}"
            mend = "it must hold whole .safetensors files; pickled .bin files are not read"
            raise ArtifactError(what, mend=mend) from error
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.no_grad()
    def translate(self, texts: Sequence[str], decoding: Decoding) -> list[str | None]:
        """Translations of a batch; None where text or translation is longer than `max_tokens` or the model allows.

        Sampling uses torch's own random state.
        """
        positions = getattr(self._model.config, "max_position_embeddings", None) or decoding.max_tokens
        bound = min(decoding.max_tokens, positions, self._tokenizer.model_max_length)
        encoded = [self._tokenizer(text, verbose=False)["input_ids"] for text in texts]
        fits = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= bound]
        found: list[str | None] = [None] * len(texts)
        if not fits:
            return found
        inputs = self._tokenizer.pad({"input_ids": [encoded[i] for i in fits]}, return_tensors="pt")
        inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        how: dict[str, Any] = {"num_beams": decoding.beams, "do_sample": False}
        if decoding.temperature > 0:
            how = {"num_beams": 1, "do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p,
                   "top_k": 0}  # fmt: skip
        out = self._model.generate(**inputs, **how, max_new_tokens=bound, max_length=None)
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for i, row in zip(fits, out.tolist(), strict=True):
            if ends & set(row[1:bound]):  # the last place does not count: some configs force an end there
                found[i] = self._tokenizer.decode(row, skip_special_tokens=True).strip()
        return found


def back_translate(
    chats: Sequence[Chat],
    there: str | Path,
    back: str | Path,
    *,
    decoding: Decoding | None = None,
    store: str | Path | None = None,
    advance: Callable[[int, int], None] = lambda more, total: None,
) -> BackTranslation:
    """Chats whose user messages are said anew.

    Args:
        chats: any; system messages and replies stay as they are.
        there: directory of the checkpoint that translates to the other language (see `Translator`).
        back: directory of the one that translates from it.
        decoding: how they write.
        store: a jsonl file that keeps every translation as soon as it is made; a run that was cut short, or is made
            again, takes from it what it can. Translations by other models or settings in it are left alone.
        advance: told how many more sentences are done, and how many there are.

    Raises:
        UserError, ArtifactError: a checkpoint cannot be used (see `Translator`).
    """
    decoding = decoding or Decoding()
    sentences = [
        [(number, piece) for number, m in enumerate(chat) if m.role == "user" for piece in _sentences(m.content)]
        for chat in chats
    ]
    texts = sorted({piece.text for chat in sentences for _, piece in chat}, key=lambda text: (len(text), text))
    translated = _translations(texts, Path(there), Path(back), decoding, store, advance)
    result = BackTranslation()
    for source, chat in enumerate(chats):
        kept, changes = _kept_words(chat), []
        for number, old in sentences[source]:
            new = translated[old.text]
            verdict = _verdict(old.text, new, kept)
            result.sentences[verdict] += 1
            if verdict == "changed":
                assert new is not None
                place = (len(result.chats), number, "back_translation", old.text, new, source, old.start)
                changes.append(Change(*place))
        if changes:
            result.chats.append(apply_changes(chat, changes))
            result.changes += changes
    return result


def _translations(
    texts: Sequence[str],
    there: Path,
    back: Path,
    decoding: Decoding,
    store: str | Path | None,
    advance: Callable[[int, int], None],
) -> dict[str, str | None]:
    """Every text's way there and back. Batches depend on `texts` alone, so those done before are skipped whole."""
    identity = json.dumps([sha256_input(there), sha256_input(back), asdict(decoding)])
    keys = {text: hashlib.sha256(f"{identity}\n{text}".encode()).hexdigest() for text in texts}
    known = _read_store(Path(store)) if store else {}
    batches = [texts[start : start + decoding.batch_size] for start in range(0, len(texts), decoding.batch_size)]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # a trainer has its own random numbers
        models = Translator(there), Translator(back)
        for batch in batches:
            if not all(keys[text] in known for text in batch):
                seed = hashlib.sha256("".join(keys[text] for text in batch).encode()).hexdigest()
                torch.manual_seed(int(seed[:15], 16))
                pivots = models[0].translate(batch, decoding)
                again = iter(models[1].translate([pivot for pivot in pivots if pivot], decoding))
                rows: list[dict[str, Any]] = [
                    {"key": keys[text], "text": text, "pivot": pivot, "back": next(again) if pivot else None}
                    for text, pivot in zip(batch, pivots, strict=True)
                ]
                known |= {row["key"]: row["back"] for row in rows}
                if store:
                    _append(Path(store), rows)
            advance(len(batch), len(texts))
    return {text: known[keys[text]] for text in texts}


def _spans(text: str) -> Iterator[list[Piece]]:
    """The pieces of each sentence; lines are sentences too."""
    sentence: list[Piece] = []
    for piece in pieces(text):
        at = piece.start
        for end in _END.finditer(text, piece.start, piece.end) if piece.kind == "gap" else ():
            yield [*sentence, Piece(at, text[at : end.end()], "gap")]
            sentence, at = [], end.end()
        if at < piece.end:
            sentence.append(Piece(at, text[at : piece.end], piece.kind))
    yield sentence


def _sentences(text: str) -> Iterator[Piece]:
    """Sentences with at least two words, without the blanks around them."""
    for span in _spans(text):
        if sum(piece.kind in ("word", "name") for piece in span) > 1:
            sentence = "".join(piece.text for piece in span)
            blanks = len(sentence) - len(sentence.lstrip())
            yield Piece(span[0].start + blanks, sentence.strip(), "sentence")


def _kept_words(chat: Chat) -> frozenset[str]:
    """Words that have to come back, as they are written: names, and those of a short final answer."""
    names = set()
    for message in chat:
        for span in _spans(message.content):
            names |= {piece.text for piece in [p for p in span if p.kind != "gap"][1:] if piece.kind == "name"}
    replies = [m.content for m in chat if m.role == "assistant"]
    answer = [p.text for p in pieces(final_answer(replies[-1])) if p.kind in ("word", "name")] if replies else []
    return frozenset(names | set(answer if len(answer) <= SHORT_ANSWER else ()))


def _anchors(sentence: str, kept: frozenset[str]) -> list[str]:
    """What must come back of a sentence, in order."""
    said = [piece for piece in pieces(sentence) if piece.kind != "gap"]
    found = []
    for i, piece in enumerate(said):
        listed = any(other.kind in ("letter", "literal") for other in said[max(i - 1, 0) : i] + said[i + 1 : i + 2])
        letter = piece.kind == "letter" and (listed or piece.text.lower() not in "aeiouy")
        if piece.kind in ("code", "markup", "literal") or letter or piece.text in kept:
            found.append(piece.text)
    return found


def _verdict(old: str, new: str | None, kept: frozenset[str]) -> str:
    """A key of `BackTranslation.sentences`."""
    if new is None:
        return "unfinished"
    if new.split() == old.split():
        return "unchanged"
    if _anchors(old, kept) != _anchors(new, kept):
        return "lost"
    return "changed" if len(old.split()) <= 2 * len(new.split()) <= 4 * len(old.split()) else "drifted"


def _read_store(path: Path) -> dict[str, str | None]:
    """What was translated before; the last line may be cut short by a kill."""
    known: dict[str, str | None] = {}
    if path.is_file():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for line in whole.decode("utf-8").splitlines():
            row = json.loads(line)
            known[row["key"]] = row["back"]
    return known


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
