"""Head screening against a naive float64 version, on random projections, packed and padded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from orin_kit.distill.heads import (
    LayerHeads,
    head_entropy,
    keep_heads,
    plot_heads,
    read_heads,
    screen_heads,
    write_heads,
)
from orin_kit.distill.record import Projections
from orin_kit.errors import UserError

RNG = np.random.default_rng()


def random_projections(batch: int, heads: int, kv_heads: int, length: int) -> Projections:
    # Heads of very different sharpness.
    sharpness = torch.linspace(0.1, 8, heads, dtype=torch.float64)[:, None, None]
    query = torch.randn(batch, heads, length, 6, dtype=torch.float64) * sharpness
    key, value = torch.randn(2, batch, kv_heads, length, 6, dtype=torch.float64)
    return Projections(query, key, value, 6**-0.5)


def naive_entropy(p: Projections, documents: Tensor) -> tuple[list[float], int]:
    query, key, numbers = p.query.numpy(), p.key.numpy(), documents.tolist()
    heads, means, counts = query.shape[1], [], set()
    for head in range(heads):
        found = []
        for b, row in enumerate(numbers):
            for q, number in enumerate(row):
                keys = [k for k in range(q + 1) if row[k] == number >= 0]
                if len(keys) < 2:
                    continue
                e = [math.exp(query[b, head, q] @ key[b, head * key.shape[1] // heads, k] * p.scaling) for k in keys]
                share = [value / sum(e) for value in e]
                found.append(-sum(v * math.log(v) for v in share if v > 0) / math.log(len(keys)))
        means.append(sum(found) / len(found))
        counts.add(len(found))
    return means, counts.pop()


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 1), (28, 4)])
def test_entropy_against_naive(heads: int, kv_heads: int, block: int) -> None:
    p = random_projections(3, heads, kv_heads, 11)
    documents = torch.tensor([[0] * 11, [0] * 4 + [1] * 3 + [2] + [-1] * 3, [0] + [-1] * 10])
    sums, count = head_entropy(p, documents, block)
    expected, queries = naive_entropy(p, documents)
    assert count == queries == 10 + 3 + 2
    assert sums.dtype == torch.float64
    np.testing.assert_allclose((sums / count).numpy(), expected, rtol=1e-9)


def test_screening_over_batches() -> None:
    """Batches of different size count by their queries; layers come in rising order, each once."""
    sizes = [(2, 8), (3, 5)]
    batches = [random_projections(batch, 5, 1, length) for batch, length in sizes]
    documents = [torch.zeros(size, dtype=torch.long) for size in sizes]

    def measured() -> Iterator[tuple[Tensor, Mapping[int, Projections]]]:
        for rows, p in zip(documents, batches, strict=True):
            yield rows, {1: p, 3: Projections(p.query.flip(1), p.key, p.value, p.scaling)}

    heads = screen_heads(measured(), layers=(3, 1, 3), keep=0.6, prefer="focused")
    parts = [naive_entropy(p, d) for p, d in zip(batches, documents, strict=True)]
    total = sum(count for _, count in parts)
    expected = sum(np.array(means) * count for means, count in parts) / total
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


def screened(layers: int, heads: int) -> list[LayerHeads]:
    entropies = RNG.random((layers, heads)).tolist()
    return [LayerHeads(6 + layer, e, keep_heads(e, 0.6, "focused")) for layer, e in enumerate(entropies)]


def test_picture_has_a_square_a_head_and_a_dot_for_the_kept(tmp_path: Path) -> None:
    heads = screened(4, 12)
    plot_heads(heads, tmp_path / "heads.svg")
    groups = {g.get("id", ""): g for g in ElementTree.parse(tmp_path / "heads.svg").getroot().iter() if g.get("id")}
    tag = "{http://www.w3.org/2000/svg}"
    squares = next(g for name, g in groups.items() if name.startswith("QuadMesh"))
    dots = next(g for name, g in groups.items() if name.startswith("PathCollection"))
    assert len(list(squares.iter(f"{tag}path"))) == 4 * 12
    assert len(list(dots.iter(f"{tag}use"))) == sum(len(h.kept) for h in heads) == 4 * 8
    assert "<image" not in (tmp_path / "heads.svg").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["heads.svg"]


def test_picture_of_28_heads_as_png(tmp_path: Path) -> None:
    plot_heads(screened(4, 28), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_of_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heads\.xyz: no picture is written as \.xyz: end it in one of: svg, png"):
        plot_heads(screened(1, 2), tmp_path / "heads.xyz")
    assert not list(tmp_path.iterdir())
