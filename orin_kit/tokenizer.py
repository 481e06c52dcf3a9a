"""Text to token ids and back, without transformers: `tokenizer.json` and the chat template that comes with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from orin_kit.data.chat import Message
from orin_kit.errors import ArtifactError, UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
TOKENIZER_SUFFIX_HINT = "copy tokenizer.json and tokenizer_config.json from the model's own directory"


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a model's tokenizer files, those that it has, into an artifact."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


class ChatTokenizer:
    """A model directory's tokenizer, chat template and stop tokens.

    Args:
        directory: holds `tokenizer.json`; `tokenizer_config.json` or `chat_template.jinja` gives the chat template,
            `generation_config.json` and the config's `eos_token` give the stop tokens.

    Raises:
        ArtifactError: `tokenizer.json` is missing or cannot be parsed.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"no tokenizer.json in {directory}", mend=TOKENIZER_SUFFIX_HINT)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path} cannot be read: {error}", mend=TOKENIZER_SUFFIX_HINT) from error
        config = _read_json(directory / "tokenizer_config.json")
        self._specials = {
            name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        template_file = directory / "chat_template.jinja"
        source = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
        self._template = _compile(source) if isinstance(source, str) else None
        self.stop_ids = self._stop_ids(_read_json(directory / "generation_config.json"))

    def __len__(self) -> int:
        """The number of ids the tokenizer can produce; a model's `vocab_size` may be padded beyond it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised, none are added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` as `encode` gives, with the tokenizer's own post-processing (a BOS where it has one)."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def id_of(self, token: str) -> int | None:
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def render(self, chat: Sequence[Message], *, reply: bool = False) -> str:
        """The text of a chat in the model's own format; with `reply`, open for the assistant's next turn.

        Raises:
            UserError: the directory has no chat template, or the template refuses this chat.
        """
        if self._template is None:
            raise UserError(
                "this model has no chat template",
                mend="use a chat model, or add chat_template.jinja to its directory",
            )
        messages = [{"role": m.role, "content": m.content} for m in chat]
        try:
            return self._template.render(messages=messages, add_generation_prompt=reply, **self._specials)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses this chat: {error}", mend="check the order of roles") from error

    def encode_chat(self, chat: Sequence[Message], *, reply: bool = False) -> list[int]:
        return self.encode(self.render(chat, reply=reply))

    def _stop_ids(self, generation_config: dict[str, Any]) -> frozenset[int]:
        ids = generation_config.get("eos_token_id", [])
        stop = set(ids if isinstance(ids, list) else [ids])
        if self._specials["eos_token"]:
            stop.add(self.id_of(self._specials["eos_token"]))
        return frozenset(i for i in stop if isinstance(i, int))


class TextStream:
    """Token ids in, text out as it becomes certain: never half a UTF-8 character.

    A byte-level token may end inside a character; decoding then yields U+FFFD at the end, which is held back until
    the rest arrives or the stream is closed.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._said_ids: list[int] = []  # the tokens of the last piece given out: the context of the next
        self._new_ids: list[int] = []

    def push(self, token: int) -> str:
        """Add one token; return the text that is now certain (often one token's, "" inside a character)."""
        self._new_ids.append(token)
        fresh = self._fresh()
        if fresh and not fresh.endswith("\ufffd"):
            self._said_ids, self._new_ids = self._new_ids, []
            return fresh
        return ""

    def close(self) -> str:
        """The text still held back, with U+FFFD where the model stopped inside a character."""
        fresh, self._new_ids = self._fresh(), []
        return fresh

    def _fresh(self) -> str:
        # Decoded with the piece before, which ends between characters: some decoders strip the blank before a text's
        # first word, and those with byte tokens (<0xE4>) decode a run of them as one.
        said, ids = self._said_ids, self._said_ids + self._new_ids
        return self._decode(ids)[len(self._decode(said)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def _compile(source: str) -> jinja2.Template:
    # The same environment as transformers uses, so that templates written for it work; sandboxed: templates are data.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now(timezone.utc).strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ArtifactError(f"the chat template cannot be parsed: {error}", mend="restore the model's own") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", mend="restore the model's own file") from error
    return value if isinstance(value, dict) else {}


def _token_text(token: Any) -> str:
    """Special tokens are written as text or as {"content": text}."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
