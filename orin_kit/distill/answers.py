"""Questions without answers, answered by the teacher: sequence-level distillation (Kim and Rush, arXiv:1606.07947)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from orin_kit.data.chat import Chat, Message, read_chats, write_chats
from orin_kit.distill.accuracy import answer
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
    teacher.eval().set_attn_implementation("sdpa")
    chats: list[Chat] = []
    encoded = [tokenizer.encode_chat(prompt, reply=True) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # by length: less padding in a batch
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        replies = answer(teacher, [encoded[i] for i in chosen], tokenizer.stop_ids, max_new_tokens)
        for i, reply in zip(chosen, replies, strict=True):
            text = tokenizer.decode(reply)
            if len(reply) < max_new_tokens and text.count("<think>") == text.count("</think>"):
                chats.append((*prompts[i], Message("assistant", text)))
        advance(len(chosen))
    if not chats:
        what = f"data.questions: of {len(prompts)} replies of the teacher none ends within {max_new_tokens} tokens"
        raise UserError(what, mend="raise max_new_tokens, or leave data.questions out")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    write_chats(fresh, chats)
    fresh.replace(path)
    return chats
