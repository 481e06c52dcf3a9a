"""How good a model is: exact match of greedy answers on unseen questions, and loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from orin_kit.data.chat import Chat
from orin_kit.data.packing import Example
from orin_kit.data.scoring import exact_match
from orin_kit.distill.dataset import Question, in_batches
from orin_kit.distill.logits import Dense, task_loss
from orin_kit.distill.signals import Wants, read_signal
from orin_kit.models.pretrained import left_padded
from orin_kit.tokenizer import ChatTokenizer


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Share of exact matches by kind of question, and over `all` of them.

    Args:
        model: any causal LM; left in evaluation mode.
        tokenizer: its own.
        questions: at least one.
        max_new_tokens: where an answer is cut; a cut one counts as it is.
        batch_size: questions answered at once.
        advance: told how many questions were answered, for a progress bar.
    """
    prompts = [q.prompt for q in questions]
    hits: dict[str, list[bool]] = {}
    replies = greedy_replies(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance
    )
    for i, reply in replies:
        hit = exact_match(tokenizer.decode(reply), questions[i].answer)
        hits.setdefault(questions[i].kind, []).append(hit)
    scores = {kind: sum(h) / len(h) for kind, h in sorted(hits.items())}
    return {**scores, "all": sum(map(sum, hits.values())) / len(questions)}


def greedy_replies(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Chat],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, list[int]]]:
    """Number and greedy reply of every prompt, the shortest first; the model is left in evaluation mode."""
    model.eval().set_attn_implementation("sdpa")
    encoded = [tokenizer.encode_chat(prompt, reply=True) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # by length: less padding in a batch
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        replies = answer(model, [encoded[i] for i in chosen], tokenizer.stop_ids, max_new_tokens)
        yield from zip(chosen, replies, strict=True)
        advance(len(chosen))


def answer(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """Greedy replies to prompts of any lengths, without the stop token."""
    ids, mask = left_padded(prompts, model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stop_ids) or None, pad_token_id=0
    )
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_until_stop(row, stop_ids) for row in out[:, ids.shape[1] :].tolist()]


def _until_stop(reply: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(reply) if token in stop_ids), len(reply))
    return reply[:end]


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: Sequence[Example], batch_size: int) -> float:
    """Cross-entropy in nats a token over the assistant tokens of rows the student is not trained on."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in in_batches(rows, batch_size, model.device):
        logits = read_signal(model, batch, Wants(logits=True)).logits
        assert isinstance(logits, Dense)
        ce = task_loss(logits, batch.labels, None, teacher_weight=0.0, temperature=1.0).ce
        total += float(ce) * batch.labels.numel()
        count += batch.labels.numel()
    model.train(training)
    return total / max(count, 1)
