"""Distances of hidden states against float64 numpy written from their formulas, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orin_kit.distill.losses import feature_loss, masked_mean

RNG = np.random.default_rng()


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def padded_mask(batch: int, length: int) -> np.ndarray:
    """Rows of different real lengths, padded on the right; one of them full."""
    lengths = RNG.integers(1, length + 1, batch)
    lengths[0] = length
    return np.arange(length)[None, :] < lengths[:, None]


DISTANCE = {
    "mse": lambda s, t: np.mean((s - t) ** 2),
    "relative_mse": lambda s, t: np.mean((s - t) ** 2) / np.mean(t**2),
    "cosine": lambda s, t: 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t),
    "cosine_mse": lambda s, t: (
        1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t) + np.mean((s - t) ** 2) / np.mean(t**2)
    ),
}


@pytest.mark.parametrize("kind", sorted(DISTANCE))
@pytest.mark.parametrize("width", [7, 96])
def test_feature_loss(kind: str, width: int) -> None:
    student, teacher = RNG.normal(size=(2, 3, 11, width))
    mask = padded_mask(3, 11)
    expected = np.mean([DISTANCE[kind](student[b, i], teacher[b, i]) for b, i in zip(*np.nonzero(mask), strict=True)])
    ours = feature_loss(tensor(student), tensor(teacher), torch.from_numpy(mask), kind)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_no_token_costs_nothing() -> None:
    assert float(masked_mean(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.bool))) == 0.0


def test_padding_reaches_neither_loss_nor_gradient() -> None:
    mask = torch.from_numpy(padded_mask(2, 6) & (np.arange(6) < 4))
    student = torch.randn(2, 6, 8, requires_grad=True)
    teacher = torch.randn(2, 6, 8)
    feature_loss(student, teacher, mask).backward()
    assert student.grad is not None
    assert bool((student.grad[~mask] == 0).all())
    assert bool((student.grad[mask] != 0).any())


@pytest.mark.parametrize("kind", sorted(DISTANCE))
def test_gradients(kind: str) -> None:
    mask = torch.from_numpy(padded_mask(2, 6))
    student, teacher = torch.randn(2, 2, 6, 5, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, teacher, mask, kind), student.requires_grad_())
