"""On-policy distillation: the student answers, the teacher judges (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from orin_kit.data.packing import Example
from orin_kit.distill.recipe import OnPolicy
from orin_kit.models.pretrained import left_padded


@torch.no_grad()
def sample_replies(
    student: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], rules: OnPolicy
) -> list[Example]:
    """The student's own replies to prompts, as rows whose reply tokens, the stop token among them, are trained on.

    The random state is torch's own: seed it before for the same replies. The model is left in the mode it was in.

    Args:
        student: any causal LM.
        prompts: token ids up to where a reply begins, of any lengths.
        stop_ids: what ends a reply; what is sampled after it is cut.
        rules: temperature, top_p, and the most tokens of a reply.
    """
    ids, mask = left_padded(prompts, student.device)
    config = GenerationConfig(
        max_new_tokens=rules.max_new_tokens,
        do_sample=True,
        temperature=rules.temperature,
        top_p=rules.top_p,
        top_k=0,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=0,
    )
    training = student.training
    student.eval()
    out = student.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    student.train(training)
    rows = []
    for prompt, reply in zip(prompts, out[:, ids.shape[1] :].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(reply) if token in stop_ids), len(reply))
        rows.append(Example([*prompt, *reply[:end]], [False] * len(prompt) + [True] * end))
    return rows
