"""The distillation losses. Teacher first in the formula, student first in the arguments; all are means in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-9  # below what a softmax over any real length gives; keeps log finite on masked keys


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true, 0 when it is nowhere; `mask` broadcasts to `values`."""
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).pow(2).mean(-1)


def _relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    # By the teacher's own power, position by position: a layer with large activations does not drown the others.
    return _mse(student, teacher) / teacher.pow(2).mean(-1).clamp(min=EPSILON)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1)


DISTANCES = {"mse": _mse, "relative_mse": _relative_mse, "cosine": _cosine}


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor, kind: str = "relative_mse") -> Tensor:
    """Distance of hidden states, averaged over real tokens.

    Args:
        student: `[batch, length, hidden]`, already projected to the teacher's width.
        teacher: `[batch, length, hidden]`.
        mask: bool `[batch, length]`, true for real tokens.
        kind: one of `DISTANCES`: mean square, mean square over the teacher's mean square, or 1 - cosine similarity.

    Source: FitNets (hints), arXiv:1412.6550; TinyBERT, arXiv:1909.10351.
    """
    return masked_mean(DISTANCES[kind](student.float(), teacher.float()), mask)


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of attention rows, averaged over heads and real queries.

    Args:
        student: `[batch, heads, length, length]`, rows are probability distributions over keys.
        teacher: the same shape.
        mask: bool `[batch, length]`, true for real tokens.

    Source: MiniLM, arXiv:2002.10957.
    """
    valid = causal_mask(mask)
    p, q = (torch.where(valid, maps.float(), 0.0) for maps in (teacher, student))
    rows = (p * (torch.log(p + EPSILON) - torch.log(q + EPSILON))).sum(-1)
    return masked_mean(rows, mask[:, None, :])


def causal_mask(mask: Tensor) -> Tensor:
    """bool `[batch, 1, length, length]`: true where a real query may look at a real key, itself or an earlier one."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return causal & mask[:, None, :, None] & mask[:, None, None, :]


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, times its square so that gradients keep their size.

    Args:
        student: `[positions, vocab]`.
        teacher: `[positions, vocab]`; where one vocabulary is padded further than the other, the shared range counts.
        temperature: above 1 softens both.

    Source: Hinton et al., arXiv:1503.02531.
    """
    if not student.shape[0]:
        return student.float().sum()  # nothing asked: zero, with a gradient of zero
    shared = min(student.shape[-1], teacher.shape[-1])
    q = F.log_softmax(student[:, :shared].float() / temperature, dim=-1)
    p = F.log_softmax(teacher[:, :shared].float() / temperature, dim=-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats a token.

    Args:
        student: logits `[positions, vocab]`.
        labels: int64 `[positions]`, all of them real tokens.
    """
    return F.cross_entropy(student.float(), labels, reduction="sum") / max(labels.numel(), 1)
