"""Head screening against a naive float64 version, on random maps with padding."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from orin_kit.distill.heads import LayerHeads, head_entropy, keep_heads, read_heads, screen_heads, write_heads
from orin_kit.distill.signals import Signal, TensorBatch, Wants

RNG = np.random.default_rng()


def random_maps(batch: int, heads: int, length: int) -> np.ndarray:
    # Heads of very different sharpness.
    scores = RNG.normal(size=(batch, heads, length, length)) * np.linspace(0.1, 8, heads)[None, :, None, None]
    scores[..., ~np.tril(np.ones((length, length), bool))] = -np.inf
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive_entropy(maps: np.ndarray, lengths: list[int]) -> list[float]:
    means = []
    for head in range(maps.shape[1]):
        found = []
        for b, length in enumerate(lengths):
            for q in range(1, length):
                p = [v for v in maps[b, head, q, : q + 1] if v > 0]
                found.append(-sum(v * math.log(v) for v in p) / math.log(q + 1))
        means.append(sum(found) / len(found))
    return means


def test_entropy_against_naive() -> None:
    lengths = [9, 4, 1]
    maps = random_maps(3, 5, 9)
    mask = torch.tensor([[i < n for i in range(9)] for n in lengths])
    sums, count = head_entropy(torch.from_numpy(maps), mask)
    assert count == 8 + 3
    np.testing.assert_allclose((sums / count).numpy(), naive_entropy(maps, lengths), rtol=1e-9)


def test_screening_over_batches() -> None:
    batches = [random_maps(2, 5, 8), random_maps(2, 5, 8)]

    def teacher(batch: TensorBatch, wants: Wants) -> Signal:
        assert wants.attention == (1, 3)
        maps = torch.from_numpy(batches[int(batch.input_ids[0, 0])])
        return Signal(attention=(maps, maps.flip(1)))

    def rows(index: int) -> TensorBatch:
        mask = torch.ones(2, 8, dtype=torch.bool)
        return TensorBatch(torch.full((2, 8), index), mask, ~mask, torch.zeros(0, dtype=torch.long))

    heads = screen_heads(teacher, map(rows, range(2)), layers=(3, 1, 3), keep=0.6, prefer="focused")
    expected = naive_entropy(np.concatenate(batches), [8] * 4)
    assert [h.layer for h in heads] == [1, 3]
    np.testing.assert_allclose(heads[0].entropy, expected, rtol=1e-9)
    assert heads[0].kept == sorted(np.argsort(expected)[:3].tolist())
    assert heads[1].kept == sorted(4 - h for h in heads[0].kept)


@pytest.mark.parametrize(("keep", "count"), [(0.6, 6), (0.61, 7), (0.01, 1), (1.0, 10)])
def test_share_kept(keep: float, count: int) -> None:
    entropy = RNG.random(10).tolist()
    order = sorted(range(10), key=entropy.__getitem__)
    assert keep_heads(entropy, keep, "focused") == sorted(order[:count])
    assert keep_heads(entropy, keep, "diffuse") == sorted(order[-count:])


def test_the_file_can_be_read_by_people_and_by_us(tmp_path: Path) -> None:
    heads = [LayerHeads(3, [0.25, 0.5], [0]), LayerHeads(7, [0.125, 1.0], [0])]
    write_heads(tmp_path / "heads.json", heads)
    assert read_heads(tmp_path / "heads.json") == heads
    assert json.loads((tmp_path / "heads.json").read_text())[0] == {"layer": 3, "entropy": [0.25, 0.5], "kept": [0]}
    assert len((tmp_path / "heads.json").read_text().splitlines()) == 2  # one layer a line
