"""Questions without answers, answered by the teacher: sequence-level distillation (Kim and Rush, arXiv:1606.07947)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from orin_kit.data.chat import Chat, Message, read_chats, write_chats
from orin_kit.distill.accuracy import greedy_replies
from orin_kit.errors import UserError
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
    the others, so the student also learns the teacher's mistakes.

    Raises:
        UserError: not one reply ended.
    """
    if path.is_file():
        return read_chats(path)
    chats: list[Chat] = []
    replies = greedy_replies(
        teacher, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance
    )
    for i, reply in replies:
        text = tokenizer.decode(reply)
        if len(reply) < max_new_tokens and text.count("<think>") == text.count("</think>"):
            chats.append((*prompts[i], Message("assistant", text)))
    if not chats:
        what = f"data.questions: of {len(prompts)} replies of the teacher none ends within {max_new_tokens} tokens"
        raise UserError(what, mend="raise max_new_tokens, or leave data.questions out")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    write_chats(fresh, chats)
    fresh.replace(path)
    return chats
