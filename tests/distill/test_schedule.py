"""Schedules, at their corners and against their closed forms."""

from __future__ import annotations

import math

import pytest

from orin_kit.distill.recipe import Rate, TeacherWeight, Temperature
from orin_kit.distill.schedule import Elastic, learning_rate, temperature


def test_learning_rate_rises_stays_and_falls() -> None:
    rate = Rate(learning_rate=1.0, warmup=0.1, decay=0.3)
    rates = [learning_rate(rate, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10:70] == [1.0] * 60
    assert rates[70:] == pytest.approx([(30 - i) / 31 for i in range(30)])


def test_learning_rate_cosine() -> None:
    rate = Rate(learning_rate=2.0, warmup=0.0, decay=1.0, shape="cosine")
    for step in (0, 13, 49):
        left = (50 - step) / 51
        assert learning_rate(rate, step, 50) == pytest.approx(1 - math.cos(math.pi * left))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_stages_still_learn(steps: int) -> None:
    rate = Rate(learning_rate=1.0, warmup=0.5, decay=0.5)
    assert all(0 < learning_rate(rate, step, steps) <= 1 for step in range(steps))


def test_temperature() -> None:
    schedule = Temperature(start=2.0, factor=0.98, every=10, floor=1.5)
    assert [temperature(schedule, s) for s in (0, 9)] == [2.0, 2.0]
    assert temperature(schedule, 10) == pytest.approx(1.96)
    assert temperature(schedule, 57) == pytest.approx(2.0 * 0.98**5)
    assert temperature(schedule, 100_000) == 1.5


def test_elastic_weight_follows_the_held_out_loss() -> None:
    elastic = Elastic.begin(TeacherWeight(start=0.5, low=0.35, high=0.6, move=0.1, every=20))
    assert [s for s in range(60) if elastic.due(s)] == [19, 39, 59]
    weights = []
    for loss in (3.0, 2.0, 1.0, 1.5, 1.2, 1.1, 0.9):  # falls, then rises above its best, then a new best
        elastic.measured(loss)
        weights.append(round(elastic.weight, 6))
    assert weights == [0.4, 0.35, 0.35, 0.45, 0.55, 0.6, 0.5]


def test_elastic_weight_follows_forgetting_where_it_is_measured() -> None:
    elastic = Elastic.begin(TeacherWeight(start=0.5, low=0.3, high=0.7, move=0.1), tolerance=0.05)
    elastic.baseline = 2.0
    moves = []
    # The held-out loss falls all the time: what counts is the general one, against 2.0 and 5 %.
    for loss, general in ((3.0, 2.0), (2.5, 2.09), (2.0, 2.11), (1.5, 2.4), (1.0, 3.0), (0.5, 1.8)):
        forgotten = elastic.measured(loss, general)
        assert forgotten == pytest.approx(general / 2.0 - 1)
        moves.append(round(elastic.weight, 6))
    assert moves == [0.4, 0.3, 0.4, 0.5, 0.6, 0.5]
    again = Elastic.begin(elastic.rules, tolerance=0.05)
    again.restore(elastic.state())
    assert again == elastic


def test_constant_teacher_weight() -> None:
    elastic = Elastic.begin(TeacherWeight(start=0.8, every=0))
    assert not any(elastic.due(s) for s in range(100))
