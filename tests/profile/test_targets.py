"""Targets files, and the verdicts at, above and below a limit, at the point asked for and at others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orin_kit.errors import EXIT_USER, UserError
from orin_kit.profile.points import Point
from orin_kit.profile.report import figures
from orin_kit.profile.targets import Targets, Verdict, load_targets, verdicts

SHIPPED = Path(__file__).parents[2] / "calibration/targets/orin-agx.yaml"


def by_target(judged: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.target: verdict for verdict in judged}


def test_the_shipped_file_is_the_default() -> None:
    assert load_targets(SHIPPED) == load_targets(None) == Targets()


def test_a_figure_at_its_limit_passes_and_the_next_one_above_does_not(make_point: Callable[..., Point]) -> None:
    point = make_point(1, 128, peak=1_100_000_000)
    ttft, tpot = point.ttft_ms.p95, point.tpot_ms.p95
    at = verdicts([point], Targets(ttft_p95_ms=ttft, tpot_p95_ms=tpot, memory_gb=1.1))
    assert [verdict.passed for verdict in at] == [True, True, True]
    below = float(np.nextafter(ttft, 0)), float(np.nextafter(tpot, 0)), float(np.nextafter(1.1, 0))
    for verdict in verdicts([point], Targets(ttft_p95_ms=below[0], tpot_p95_ms=below[1], memory_gb=below[2])):
        assert not verdict.passed
        assert verdict.measured > verdict.limit


def test_measured_values_are_those_of_the_point(make_point: Callable[..., Point]) -> None:
    points = [make_point(1, 32), make_point(1, 128, ttft=0.4, peak=1_200_000_000), make_point(4, 128, tpot=1)]
    judged = by_target(verdicts(points, Targets()))
    assert judged["ttft_p95_ms"].measured == points[1].ttft_ms.p95
    assert judged["tpot_p95_ms"].measured == points[1].tpot_ms.p95
    assert judged["memory_gb"].measured == pytest.approx(1.2)  # decimal
    assert [verdict.passed for verdict in judged.values()] == [False, True, False]
    assert {verdict.note for verdict in judged.values()} == {""}


@pytest.mark.parametrize(
    ("measured", "asked", "judged", "said"),
    [
        ([(1, 32), (1, 100), (1, 512)], (1, 128), (1, 100), "easier"),
        ([(1, 512), (1, 256)], (1, 128), (1, 256), "another"),
        ([(1, 128), (2, 128), (8, 128)], (4, 128), (2, 128), "easier"),
        ([(2, 64), (8, 128)], (1, 128), (2, 64), "another"),
        ([(1, 128), (4, 32)], (4, 128), (4, 32), "easier"),
    ],
)
def test_a_point_not_measured_is_judged_at_the_nearest_and_said(
    make_point: Callable[..., Point],
    measured: list[tuple[int, int]],
    asked: tuple[int, int],
    judged: tuple[int, int],
    said: str,
) -> None:
    points = [make_point(*place) for place in measured]
    found = verdicts(points, Targets(batch_size=asked[0], prompt_length=asked[1]))
    assert len(found) == 3
    for verdict in found:
        assert (verdict.batch_size, verdict.prompt_length) == judged
        assert f"batch {asked[0]}, prompt {asked[1]} was not measured" in verdict.note
        assert said in verdict.note
        assert f"batch {judged[0]}, prompt {judged[1]}" in verdict.note


def test_a_null_limit_is_not_judged(tmp_path: Path, make_point: Callable[..., Point]) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text("memory_gb: null\nttft_p95_ms: 1000\n")
    targets = load_targets(path)
    assert targets == Targets(memory_gb=None, ttft_p95_ms=1000)
    assert list(by_target(verdicts([make_point(1, 128)], targets))) == ["ttft_p95_ms", "tpot_p95_ms"]


def test_a_miss_by_a_hair_still_reads_as_one() -> None:
    verdict = Verdict(
        target="ttft_p95_ms", label="TTFT p95", unit="ms", measured=150.0004, limit=150.0, passed=False, batch_size=1,
        prompt_length=128,
    )  # fmt: skip
    assert figures(verdict) == ("150.0004 ms", "150 ms")
    assert figures(verdict.model_copy(update={"measured": 150.0})) == ("150.0 ms", "150 ms")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ttft_p95_ms: fast", "ttft_p95_ms"),
        ("ttft_p95_ms: -1", "ttft_p95_ms"),
        ("memory_gb: 0", "memory_gb"),
        ("memory_gb: .nan", "memory_gb"),
        ("tpot_p95_ms: .inf", "tpot_p95_ms"),
        ("tpot_p95_ms: true", "tpot_p95_ms"),
        ("prompt_length: 12.5", "prompt_length"),
        ("batch_size: 0", "batch_size"),
        ("ttft_p99_ms: 3", "ttft_p99_ms"),
        ("- 1\n- 2", "the file"),
        ("", "the file"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_file_names_its_field(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_targets(path)
    assert caught.value.exit_code == EXIT_USER
    assert named in caught.value.what
    assert str(path) in caught.value.what
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("binary.yaml", "none.yaml"):
        with pytest.raises(UserError, match=name):
            load_targets(tmp_path / name)
