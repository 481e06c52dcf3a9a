"""Questions without answers, answered by the teacher: sequence-level distillation (Kim and Rush, arXiv:1606.07947).

A large teacher takes hours, so every batch of replies is on disk as soon as it is there. Until all are done they lie in
`NAME.partial.jsonl` beside `NAME.jsonl`: a line `{"asked": hash}`, then `{"prompt": number, "reply": text}` a prompt,
with null for a reply that was dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from orin_kit.data.chat import Chat, Message, read_chats, write_chats
from orin_kit.distill.accuracy import greedy_replies
from orin_kit.errors import ArtifactError, UserError
from orin_kit.tokenizer import ChatTokenizer


def teacher_answers(
    teacher: PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Chat],
    path: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Chat]:
    """Greedy replies of the teacher as chats, kept in `path` and read from there the next time.

    A reply that does not end within `max_new_tokens`, or whose `<think>` is never closed, is dropped: nobody checks
    the others, so the student also learns the teacher's mistakes. A call that was cut off goes on after its last whole
    batch, and ends with the same bytes.

    Args:
        teacher: left in evaluation mode.
        tokenizer: its own.
        prompts: chats up to the reply.
        path: named by the caller after the teacher and all that decides the prompts.
        max_new_tokens: where a reply is cut.
        batch_size: prompts answered at once, those of about the same length.
        advance: told how many prompts are done, also of those that an earlier call has answered.

    Raises:
        UserError: not one reply ended.
        ArtifactError: the replies so far are damaged.
    """
    if path.is_file():
        return read_chats(path)
    partial = _Partial(path.with_suffix(".partial.jsonl"), _asked(prompts, max_new_tokens, batch_size))
    lengths = [len(tokenizer.encode_chat(prompt, reply=True)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # Whole batches or nothing: the padding a prompt gets from its neighbours decides how its reply is rounded.
        if not partial.replies.keys() >= set(batch):
            together = [prompts[i] for i in batch]
            replies = greedy_replies(teacher, tokenizer, together, max_new_tokens=max_new_tokens, batch_size=batch_size)
            partial.add({batch[i]: _kept(tokenizer, reply, max_new_tokens) for i, reply in replies})
        advance(len(batch))
    told = [(i, partial.replies[i]) for i in order]
    chats: list[Chat] = [(*prompts[i], Message("assistant", text)) for i, text in told if text is not None]
    if not chats:
        what = f"data.questions: of {len(prompts)} replies of the teacher none ends within {max_new_tokens} tokens"
        raise UserError(what, mend="raise max_new_tokens, or leave data.questions out")
    fresh = path.with_suffix(".new")
    write_chats(fresh, chats)
    with fresh.open("rb") as file:
        os.fsync(file.fileno())  # before the partial file goes
    fresh.replace(path)
    partial.path.unlink()
    return chats


def _kept(tokenizer: ChatTokenizer, reply: Sequence[int], max_new_tokens: int) -> str | None:
    """A reply's text, or None where it is dropped."""
    text = tokenizer.decode(reply)
    ends = len(reply) < max_new_tokens and text.count("<think>") == text.count("</think>")
    return text if ends else None


def _asked(prompts: Sequence[Chat], max_new_tokens: int, batch_size: int) -> str:
    """Hash of all that decides the replies but for the teacher."""
    said = [[[m.role, m.content] for m in prompt] for prompt in prompts]
    return hashlib.sha256(json.dumps([said, max_new_tokens, batch_size]).encode()).hexdigest()


class _Partial:
    """The file of replies so far.

    Args:
        path: begun anew unless it is of the same questions; a line that a kill has cut short is cut off.
        asked: hash of the questions.

    Attributes:
        replies: by number of the prompt; None for one that was dropped.

    Raises:
        ArtifactError: a whole line of it cannot be read.
    """

    def __init__(self, path: Path, asked: str) -> None:
        self.path = path
        self.replies: dict[int, str | None]
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()] or [{"asked": None}]
            ours = head["asked"] == asked
            self.replies = {line["prompt"]: line["reply"] for line in lines} if ours else {}
        except (ValueError, KeyError, TypeError) as error:
            what = f"the teacher's replies in {path} cannot be read: {error}"
            raise ArtifactError(what, mend="delete the file to have them made anew") from error
        if ours:
            os.truncate(path, len(whole))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"asked": asked}) + "\n", "utf-8")

    def add(self, replies: Mapping[int, str | None]) -> None:
        """Take in the replies of a batch; they are on disk when this returns."""
        self.replies.update(replies)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"prompt": i, "reply": text}) + "\n" for i, text in replies.items()))
            file.flush()
            os.fsync(file.fileno())
