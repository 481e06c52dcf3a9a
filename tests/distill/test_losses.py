"""Every loss against float64 numpy written from its formula, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orin_kit.distill.losses import attention_loss, cross_entropy, feature_loss, logits_loss, masked_mean

RNG = np.random.default_rng()


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def padded_mask(batch: int, length: int) -> np.ndarray:
    """Rows of different real lengths, padded on the right; one of them full."""
    lengths = RNG.integers(1, length + 1, batch)
    lengths[0] = length
    return np.arange(length)[None, :] < lengths[:, None]


def causal_maps(batch: int, heads: int, length: int) -> np.ndarray:
    scores = RNG.normal(size=(batch, heads, length, length)) * 2
    scores[..., ~np.tril(np.ones((length, length), bool))] = -np.inf
    return softmax(scores)


DISTANCE = {
    "mse": lambda s, t: np.mean((s - t) ** 2),
    "relative_mse": lambda s, t: np.mean((s - t) ** 2) / np.mean(t**2),
    "cosine": lambda s, t: 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t),
}


@pytest.mark.parametrize("kind", sorted(DISTANCE))
@pytest.mark.parametrize("width", [7, 96])
def test_feature_loss(kind: str, width: int) -> None:
    student, teacher = RNG.normal(size=(2, 3, 11, width))
    mask = padded_mask(3, 11)
    expected = np.mean([DISTANCE[kind](student[b, i], teacher[b, i]) for b, i in zip(*np.nonzero(mask), strict=True)])
    ours = feature_loss(tensor(student), tensor(teacher), torch.from_numpy(mask), kind)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("heads", [1, 5])
def test_attention_loss(heads: int) -> None:
    batch, length = 3, 13
    student, teacher = causal_maps(batch, heads, length), causal_maps(batch, heads, length)
    mask = padded_mask(batch, length)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for q in np.nonzero(mask[b])[0]:
                p, r = teacher[b, h, q, : q + 1], student[b, h, q, : q + 1]
                rows.append(np.sum(p * np.log(p / r)))
    ours = attention_loss(tensor(student), tensor(teacher), torch.from_numpy(mask))
    assert float(ours) == pytest.approx(np.mean(rows), rel=1e-4)


def test_attention_loss_is_zero_only_for_equal_maps() -> None:
    maps, others = tensor(causal_maps(2, 3, 9)), tensor(causal_maps(2, 3, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert float(attention_loss(maps, maps, mask)) == pytest.approx(0.0, abs=1e-7)
    assert float(attention_loss(others, maps, mask)) > 0.01


@pytest.mark.parametrize(("ours", "theirs"), [(40, 40), (40, 56), (64, 40)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_loss(ours: int, theirs: int, temperature: float) -> None:
    student, teacher = RNG.normal(size=(17, ours)) * 3, RNG.normal(size=(17, theirs)) * 3
    shared = min(ours, theirs)
    p, q = (softmax(x[:, :shared] / temperature) for x in (teacher, student))
    expected = np.mean(np.sum(p * np.log(p / q), -1)) * temperature**2
    found = logits_loss(tensor(student), tensor(teacher), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_cross_entropy() -> None:
    logits, labels = RNG.normal(size=(23, 50)), RNG.integers(0, 50, 23)
    expected = -np.mean(np.log(softmax(logits)[np.arange(23), labels]))
    assert float(cross_entropy(tensor(logits), torch.from_numpy(labels))) == pytest.approx(expected, rel=1e-5)


def test_nothing_asked_costs_nothing() -> None:
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = logits_loss(empty, empty.detach(), 2.0) + cross_entropy(empty, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss) == 0.0
    assert float(masked_mean(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.bool))) == 0.0


def test_padding_reaches_neither_loss_nor_gradient() -> None:
    mask = torch.from_numpy(padded_mask(2, 6) & (np.arange(6) < 4))
    student = torch.randn(2, 6, 8, requires_grad=True)
    teacher = torch.randn(2, 6, 8)
    feature_loss(student, teacher, mask).backward()
    assert student.grad is not None
    assert bool((student.grad[~mask] == 0).all())
    assert bool((student.grad[mask] != 0).any())


@pytest.mark.parametrize("loss", ["feature", "attention", "logits"])
def test_gradients(loss: str) -> None:
    """Autograd against finite differences, in the direction of the gradient."""
    mask = torch.from_numpy(padded_mask(2, 6))
    if loss == "attention":
        at, target = torch.randn(2, 2, 6, 6, dtype=torch.double), tensor(causal_maps(2, 2, 6))
        hidden = torch.full((6, 6), -torch.inf, dtype=torch.double).triu(1)
        function = lambda x: attention_loss((x + hidden).softmax(-1), target, mask)  # noqa: E731
    elif loss == "feature":
        at, target = torch.randn(2, 6, 5, dtype=torch.double), torch.randn(2, 6, 5)
        function = lambda x: feature_loss(x, target, mask)  # noqa: E731
    else:
        at, target = torch.randn(9, 12, dtype=torch.double), torch.randn(9, 15)
        function = lambda x: logits_loss(x, target, 2.0)  # noqa: E731
    x = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    direction = gradient / gradient.norm()
    step = 3e-2  # the losses compute in fp32
    slope = (function(at + step * direction) - function(at - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=2e-2)
