"""Blockwise losses against whole maps: values in float64 numpy written anew, gradients in float64 torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orin_kit.distill.attention import HeadMixing, attention_loss, relation_loss, visible
from orin_kit.distill.record import Projections
from orin_kit.errors import UserError

KINDS = ("query", "key", "value")


def projections(batch: int, heads: int, kv_heads: int, length: int, width: int, dtype: torch.dtype) -> Projections:
    # Scores with a standard deviation of 3: maps far from even.
    q = torch.randn(batch, heads, length, width, dtype=torch.float64) * 3
    k, v = torch.randn(2, batch, kv_heads, length, width, dtype=torch.float64)
    return Projections(q.to(dtype), k.to(dtype), v.to(dtype), width**-0.5)


def learning(p: Projections) -> Projections:
    return replace(p, **{kind: getattr(p, kind).detach().clone().requires_grad_() for kind in KINDS})


def ragged_documents(batch: int, length: int) -> Tensor:
    """Packed documents of random lengths; every row but the first ends in padding, the last one has no other."""
    documents = torch.full((batch, length), -1)
    for row in range(batch - 1):
        real = length if row == 0 else int(torch.randint(1, length, ()))
        starts = torch.rand(real) < 0.15
        starts[0] = False
        documents[row, :real] = starts.long().cumsum(0)
    return documents


def naive_softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max())
    return e / e.sum()


def naive_kl(documents: Tensor, teacher_row, student_row, heads: int) -> float:
    """Mean over real queries and heads; `*_row(batch, head, query, keys)` gives the distribution over those keys."""
    total, queries = 0.0, 0
    numbers = documents.numpy()
    for b in range(numbers.shape[0]):
        for query in range(numbers.shape[1]):
            if numbers[b, query] < 0:
                continue
            queries += 1
            keys = [k for k in range(query + 1) if numbers[b, k] == numbers[b, query]]
            for head in range(heads):
                p, q = teacher_row(b, head, query, keys), student_row(b, head, query, keys)
                total += float((p * (np.log(p) - np.log(q))).sum())
    return total / max(queries * heads, 1)


def naive_attention_loss(
    student: Projections, teacher: Projections, documents: Tensor, scores: Tensor, kept: list[int]
) -> float:
    s, t = ({kind: getattr(p, kind).double().numpy() for kind in KINDS} for p in (student, teacher))

    def row(of: dict[str, np.ndarray], scaling: float, b: int, head: int, query: int, keys: list[int]) -> np.ndarray:
        kv_head = head // (of["query"].shape[1] // of["key"].shape[1])
        return naive_softmax(of["key"][b, kv_head][keys] @ of["query"][b, head, query] * scaling)

    weights = [naive_softmax(line) for line in scores.double().numpy()]

    def student_row(b: int, i: int, query: int, keys: list[int]) -> np.ndarray:
        heads = range(s["query"].shape[1])
        return sum(weights[i][h] * row(s, student.scaling, b, h, query, keys) for h in heads)

    return naive_kl(
        documents, lambda b, i, query, keys: row(t, teacher.scaling, b, kept[i], query, keys), student_row, len(kept)
    )


def naive_relation_loss(
    student: Projections, teacher: Projections, documents: Tensor, relation_heads: int, kinds: tuple[str, ...]
) -> float:
    def rows(of: Tensor):
        side_by_side = np.concatenate(list(of.double().numpy().transpose(1, 0, 2, 3)), axis=-1)  # [batch, length, all]
        cut = np.split(side_by_side, relation_heads, axis=-1)

        def row(b: int, head: int, query: int, keys: list[int]) -> np.ndarray:
            x = cut[head][b]
            return naive_softmax(x[keys] @ x[query] / np.sqrt(x.shape[-1]))

        return row

    losses = [
        naive_kl(documents, rows(getattr(teacher, kind)), rows(getattr(student, kind)), relation_heads)
        for kind in kinds
    ]
    return float(np.mean(losses))


def whole_attention_loss(
    student: Projections, teacher: Projections, documents: Tensor, mixing: nn.Module, kept: list[int]
) -> Tensor:
    """All maps at once, differentiable."""

    def maps(p: Projections) -> Tensor:
        key = p.key.repeat_interleave(p.query.shape[1] // p.key.shape[1], 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", p.query, key) * p.scaling
        position = torch.arange(documents.shape[1])
        seen = (documents[:, :, None] == documents[:, None, :]) & (position[:, None] >= position)
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)

    p, q = maps(teacher)[:, kept], mixing(maps(student))
    terms = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0)
    rows = terms.sum(-1)[(documents >= 0)[:, None].expand(-1, len(kept), -1)]
    return rows.sum() / max(rows.numel(), 1)


@pytest.mark.parametrize("block", [1, 7, 16, 128])
@pytest.mark.parametrize(("heads", "teacher_heads"), [((12, 2), (28, 4)), ((4, 4), (6, 1)), ((3, 1), (3, 3))])
def test_attention_loss_against_naive(heads: tuple[int, int], teacher_heads: tuple[int, int], block: int) -> None:
    student = projections(3, *heads, 33, 16, torch.float64)
    teacher = projections(3, *teacher_heads, 33, 24, torch.float64)
    documents = ragged_documents(3, 33)
    kept = sorted(torch.randperm(teacher_heads[0])[: -(-teacher_heads[0] * 6 // 10)].tolist())
    mixing = HeadMixing(heads[0], kept, teacher_heads[0]).double()
    nn.init.normal_(mixing.scores)
    loss = attention_loss(student, teacher, documents, mixing, kept, block=block)
    expected = naive_attention_loss(student, teacher, documents, mixing.scores.detach(), kept)
    assert loss.dtype == torch.float64
    assert expected > 0.1
    np.testing.assert_allclose(float(loss), expected, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_loss_is_computed_in_fp32(dtype: torch.dtype) -> None:
    """Under autocast and from bf16 projections: the error is that of fp32, against float64 on the same projections."""
    student, teacher = projections(2, 12, 2, 40, 32, dtype), projections(2, 28, 4, 40, 32, dtype)
    documents, kept = ragged_documents(2, 40), [0, 3, 4, 20, 27]
    mixing = HeadMixing(12, kept, 28)
    expected = naive_attention_loss(student, teacher, documents, mixing.scores.detach(), kept)
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_loss(student, teacher, documents, mixing, kept, block=16)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


@pytest.mark.parametrize("block", [5, 16, 64])
def test_attention_gradients_are_those_of_whole_maps(block: int) -> None:
    student = learning(projections(3, 6, 2, 37, 8, torch.float64))
    teacher = projections(3, 8, 4, 37, 16, torch.float64)
    documents, kept = ragged_documents(3, 37), [1, 2, 5, 6, 7]
    mixing = HeadMixing(6, kept, 8).double()
    inputs = [student.query, student.key, mixing.scores]
    ours = torch.autograd.grad(attention_loss(student, teacher, documents, mixing, kept, block=block), inputs)
    whole = torch.autograd.grad(whole_attention_loss(student, teacher, documents, mixing, kept), inputs)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert b.abs().max() > 1e-4


def test_attention_gradcheck() -> None:
    student = learning(projections(2, 4, 2, 5, 2, torch.float64))
    teacher = projections(2, 4, 1, 5, 4, torch.float64)
    documents, kept = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]]), [0, 1, 3]
    mixing = HeadMixing(4, kept, 4).double()

    def loss(query: Tensor, key: Tensor, _: Tensor) -> Tensor:
        return attention_loss(replace(student, query=query, key=key), teacher, documents, mixing, kept, block=3)

    assert torch.autograd.gradcheck(loss, (student.query, student.key, mixing.scores))


def test_relation_gradcheck() -> None:
    student = learning(projections(2, 2, 1, 5, 3, torch.float64))
    teacher = projections(2, 2, 2, 5, 6, torch.float64)
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]])

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return relation_loss(Projections(query, key, value, 1.0), teacher, documents, relation_heads=3, block=3)

    assert torch.autograd.gradcheck(loss, (student.query, student.key, student.value))


@pytest.mark.parametrize("block", [1, 6, 128])
@pytest.mark.parametrize("kinds", [KINDS, ("value",), ("query", "key")])
def test_relation_loss_against_naive(kinds: tuple[str, ...], block: int) -> None:
    student = projections(3, 12, 2, 21, 8, torch.float64)
    teacher = projections(3, 14, 4, 21, 16, torch.float64)
    documents = ragged_documents(3, 21)
    for heads in (1, 4, 8):
        shared = [k for k in kinds if k != "query" or 14 * 16 % heads == 0]
        loss = relation_loss(student, teacher, documents, relation_heads=heads, kinds=shared, block=block)
        expected = naive_relation_loss(student, teacher, documents, heads, tuple(shared))
        assert expected > 0.01
        np.testing.assert_allclose(float(loss), expected, rtol=1e-11)


def test_relation_gradients_reach_every_kind_under_autocast() -> None:
    student = learning(projections(2, 4, 2, 20, 8, torch.bfloat16))
    teacher = projections(2, 8, 2, 20, 8, torch.bfloat16)
    documents = ragged_documents(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(student, teacher, documents, relation_heads=4, block=8)
    loss.backward()
    expected = naive_relation_loss(*(frozen(p) for p in (student, teacher)), documents, 4, KINDS)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    assert all(getattr(student, kind).grad.abs().max() > 0 for kind in KINDS)


def frozen(p: Projections) -> Projections:
    return replace(p, **{kind: getattr(p, kind).detach() for kind in KINDS})


@pytest.mark.parametrize("heads", [0, 5])
def test_relation_heads_that_do_not_divide(heads: int) -> None:
    student, teacher = projections(1, 4, 2, 6, 4, torch.float32), projections(1, 8, 2, 6, 4, torch.float32)
    what = rf"relation_heads {heads} does not divide the widths 16, 8, 32, 8 \(.*\): choose one of 1, 2, 4, 8"
    with pytest.raises(UserError, match=what):
        relation_loss(student, teacher, torch.zeros(1, 6, dtype=torch.long), relation_heads=heads, kinds=KINDS[:2])


def test_equal_maps_cost_nothing_and_padding_neither() -> None:
    teacher = projections(2, 6, 3, 30, 8, torch.float32)
    student, documents, kept = learning(teacher), ragged_documents(2, 30), [0, 2, 5]
    mixing = HeadMixing(6, kept, 6)
    with torch.no_grad():
        mixing.scores.mul_(50.0)  # each kept head is the student's own, e^-200 of the others
    loss = attention_loss(student, teacher, documents, mixing, kept, block=8)
    assert abs(float(loss)) < 1e-6
    empty = attention_loss(student, teacher, torch.full_like(documents, -1), mixing, kept, block=8)
    empty.backward()
    assert float(empty) == 0
    assert float(student.query.grad.abs().max()) == 0


def test_padding_and_other_documents_do_not_matter() -> None:
    """What stands in padded places changes neither the loss nor has a gradient."""
    student, teacher = learning(projections(2, 4, 2, 24, 8, torch.float64)), projections(2, 4, 4, 24, 8, torch.float64)
    documents, kept = ragged_documents(3, 24)[1:], [1, 3]
    mixing = HeadMixing(4, kept, 4).double()
    loss = attention_loss(student, teacher, documents, mixing, kept, block=10)
    loss.backward()
    padding = (documents < 0)[:, None, :, None]
    assert padding.any()
    assert float((student.query.grad * padding).abs().max()) == float((student.key.grad * padding).abs().max()) == 0
    other = replace(student, query=student.query + 5.0 * padding, key=student.key - 3.0 * padding)
    assert torch.equal(attention_loss(other, teacher, documents, mixing, kept, block=10), loss)


def test_rows_far_from_each_other_stay_finite() -> None:
    """Student probabilities that fp32 rounds to zero where the teacher looks: finite loss, finite gradients."""
    student, teacher = projections(1, 2, 2, 20, 8, torch.float32), projections(1, 2, 2, 20, 8, torch.float32)
    student = learning(replace(student, query=student.query * 200))
    mixing = HeadMixing(2, [0, 1], 2)
    loss = attention_loss(student, teacher, torch.zeros(1, 20, dtype=torch.long), mixing, [0, 1], block=8)
    loss.backward()
    assert float(loss) > 10
    assert all(torch.isfinite(g).all() for g in (loss, student.query.grad, student.key.grad, mixing.scores.grad))


class Allocations(TorchDispatchMode):
    """Follows what operators make, forward and backward: the largest result, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def release(self, address: int, size: int) -> None:
        self.known.remove(address)
        self.alive -= size


@pytest.mark.parametrize("kind", ["maps", "relations"])
def test_no_more_than_a_blocks_maps_live_at_once(kind: str) -> None:
    length, block, heads = 192, 8, 4
    student = learning(projections(1, heads, 2, length, 4, torch.float32))
    teacher = projections(1, heads, 2, length, 4, torch.float32)
    documents, kept = torch.zeros(1, length, dtype=torch.long), [0, 1, 3]
    mixing = HeadMixing(heads, kept, heads)

    def follow(loss: Callable[..., Tensor], *more: Any, **options: Any) -> Allocations:
        with Allocations() as found:
            loss(student, teacher, documents, *more, **options).backward()
        return found

    if kind == "maps":
        ours = follow(attention_loss, mixing, kept, block=block)
        whole = follow(whole_attention_loss, mixing, kept)
    else:
        ours = follow(relation_loss, relation_heads=heads, block=block)
        whole = follow(relation_loss, relation_heads=heads, block=length)
    one_map = heads * length * length
    assert whole.largest >= one_map  # what this test would see if maps were whole
    assert whole.most >= 4 * one_map * 4
    assert ours.largest <= heads * block * length
    sizes = sum(getattr(side, k).nbytes for side in (student, teacher) for k in KINDS)
    assert ours.most <= 8 * heads * block * length * 4 + 3 * sizes


def test_visible() -> None:
    documents = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, 0, 0]])
    expected = [[[k <= q and row[k] == row[q] >= 0 for k in range(5)] for q in range(5)] for row in documents.tolist()]
    assert visible(documents, 0, 5)[:, 0].tolist() == expected
    assert visible(documents, 1, 4)[:, 0].tolist() == [rows[1:4] for rows in expected]


def test_mixing_keeps_distributions() -> None:
    mixing = HeadMixing(12, kept := [0, 5, 27], 28)
    maps = torch.rand(2, 12, 5, 9).softmax(-1)
    mixed = mixing(maps)
    assert mixed.shape == (2, 3, 5, 9)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 3, 5))
    weights = mixing.scores.softmax(-1)
    torch.testing.assert_close(mixed[1, 2], sum(weights[2, h] * maps[1, h] for h in range(12)))
    assert mixing.scores.argmax(-1).tolist() == [head * 12 // 28 for head in kept]
