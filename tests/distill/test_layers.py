"""Which layers are compared: by list, by depth, by similarity; CKA against its definition in float64."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch

from orin_kit.distill.layers import choose_layers, layer_similarity, match_layers, proportional, search_layers
from orin_kit.distill.recipe import Features
from orin_kit.distill.signals import Signal
from orin_kit.errors import UserError

RNG = np.random.default_rng()


def test_default_layers() -> None:
    assert choose_layers(None, 28, "f") == (6, 7, 8, 9)
    assert choose_layers(None, 8, "f") == (6, 7)
    assert choose_layers(None, 4, "f") == (2, 3)
    assert choose_layers((0, 27), 28, "f") == (0, 27)


def test_proportional_layers() -> None:
    assert proportional((0, 13, 27), 28, 28) == (0, 13, 27)
    assert proportional((0, 5, 11), 12, 24) == (1, 11, 23)
    assert proportional((0, 1), 2, 1) == (0, 0)


@pytest.mark.parametrize("wrong", [(28,), (-1,), ()])
def test_layers_the_student_does_not_have(wrong: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"stages\.features\.layers: the student has layers 0 to 27"):
        choose_layers(wrong, 28, "stages.features.layers")


def test_a_list_of_the_teachers_layers() -> None:
    assert match_layers(Features(teacher_layers=(3, 1)), "stages.features", (0, 1), 2, 4) == (3, 1)
    with pytest.raises(UserError, match="the teacher has layers 0 to 3, not 4"):
        match_layers(Features(teacher_layers=(3, 4)), "stages.features", (0, 1), 2, 4)
    with pytest.raises(UserError, match="names 1 layers, for 2 of the student"):
        match_layers(Features(teacher_layers=(3,)), "stages.features", (0, 1), 2, 4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (4, 6), (3, 2)])
def test_the_search_finds_the_best_rising_match(rows: int, columns: int) -> None:
    for _ in range(20):
        similarity = RNG.random((rows, columns))
        found = search_layers(torch.from_numpy(similarity), range(rows))
        rising = list(combinations_with_replacement(range(columns), rows))
        assert found in rising
        scores = [sum(similarity[i, c] for i, c in enumerate(match)) for match in rising]
        assert sum(similarity[i, c] for i, c in enumerate(found)) == pytest.approx(max(scores))
        order = RNG.permutation(rows)  # layers in any order are matched as they would be in rising order
        assert search_layers(torch.from_numpy(similarity[order]), order.tolist()) == tuple(found[i] for i in order)


def reference_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) through centred Gram matrices: the definition, not the shortcut."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def test_cka_is_its_definition_over_real_tokens() -> None:
    mask = torch.arange(12)[None] < torch.tensor([12, 5, 9])[:, None]

    def hidden(widths: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(RNG.normal(1.0, 1.0, (3, 12, w)).astype(np.float32)) for w in widths)

    batches = [(Signal(hidden=hidden([6, 6])), Signal(hidden=hidden([9, 9, 9])), mask) for _ in range(3)]
    found = layer_similarity(iter(batches))
    ours, theirs = (
        [np.concatenate([b[side].hidden[i][mask].numpy() for b in batches]).astype(float) for i in range(count)]
        for side, count in ((0, 2), (1, 3))
    )
    expected = [[reference_cka(x, y) for y in theirs] for x in ours]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_cka_does_not_see_rotation_and_scale() -> None:
    x = torch.randn(1, 60, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    other = torch.randn(1, 60, 8)
    mask = torch.ones(1, 60, dtype=torch.bool)
    turned = layer_similarity([(Signal(hidden=(x,)), Signal(hidden=(other, 3 * x @ rotation)), mask)])
    assert float(turned[0, 1]) == pytest.approx(1.0, abs=1e-5)
    assert search_layers(turned, (0,)) == (1,)
