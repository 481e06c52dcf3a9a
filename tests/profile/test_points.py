"""A point's statistics against Python's own, on fresh samples."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from orin_kit.profile.latency import Timings, Workload
from orin_kit.profile.points import Memory, Spread, point

MEMORY = Memory(weights=1, kv_cache=1, baseline=1, loaded=1, load_peak=1, peak=1)


@pytest.mark.parametrize("count", [2, 3, 10, 21, 310])
def test_median_and_p95_are_statistics_quantiles(count: int) -> None:
    seconds = np.random.default_rng().lognormal(-4, 1, count).tolist()
    spread = Spread.of_seconds(seconds)
    milliseconds = [s * 1e3 for s in seconds]
    assert spread.median == pytest.approx(statistics.median(milliseconds), rel=1e-12)
    # method="inclusive" interpolates linearly between the samples, the least at 0 % and the greatest at 100 %.
    assert spread.p95 == pytest.approx(statistics.quantiles(milliseconds, n=100, method="inclusive")[94], rel=1e-12)
    assert spread.samples == pytest.approx(milliseconds, abs=1e-4)


def test_one_sample_is_its_own_median_and_p95() -> None:
    spread = Spread.of_seconds([0.25])
    assert (spread.median, spread.p95) == (250.0, 250.0)


def test_rates_count_the_tokens_of_all_rows() -> None:
    work = Workload(batch_size=4, prompt_length=100, new_tokens=3, warmup=1, repeats=2, seed=0)
    summed = point(work, Timings([0.5, 1.5], [[0.1, 0.2], [0.3, 0.2]]), 1.0, MEMORY)
    assert summed.prefill_tokens_per_s == pytest.approx(2 * 4 * 100 / 2.0)
    assert summed.decode_tokens_per_s == pytest.approx(4 * 4 / 0.8)
    assert summed.tpot_ms.samples == [100.0, 200.0, 300.0, 200.0]
