"""Distances of hidden states. Attention lies in `attention.py`, logits in `logits.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-9


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


def _cosine_mse(student: Tensor, teacher: Tensor) -> Tensor:
    # Direction and size: neither alone tells states apart that differ in the other.
    return _cosine(student, teacher) + _relative_mse(student, teacher)


DISTANCES = {"mse": _mse, "relative_mse": _relative_mse, "cosine": _cosine, "cosine_mse": _cosine_mse}


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor, kind: str = "relative_mse") -> Tensor:
    """Distance of hidden states, averaged over real tokens, in fp32 or better.

    Args:
        student: `[batch, length, hidden]`, already projected to the teacher's width.
        teacher: `[batch, length, hidden]`.
        mask: bool `[batch, length]`, true for real tokens.
        kind: one of `DISTANCES`: mean square, mean square over the teacher's mean square, 1 - cosine similarity, or
            the sum of the last two.

    Source: FitNets (hints), arXiv:1412.6550; TinyBERT, arXiv:1909.10351.
    """
    at_least = torch.promote_types(student.dtype, torch.float32)
    return masked_mean(DISTANCES[kind](student.to(at_least), teacher.to(at_least)), mask)
