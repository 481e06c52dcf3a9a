"""Targets: the limits that a deployment is signed off with, and whether a profile keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orin_kit.errors import UserError
from orin_kit.profile.points import Point

GB = 1e9  # decimal, as memory is sold


class Targets(BaseModel):
    """Upper limits; None is not judged.

    Attributes:
        ttft_p95_ms: time to the first token, 95th percentile.
        tpot_p95_ms: time per decoded token, 95th percentile.
        memory_gb: peak resident memory of the process, 1 GB = 1e9 bytes.
        prompt_length, batch_size: the point that is judged.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = "orin-agx"
    ttft_p95_ms: float | None = Field(default=150.0, gt=0, allow_inf_nan=False)
    tpot_p95_ms: float | None = Field(default=38.0, gt=0, allow_inf_nan=False)
    memory_gb: float | None = Field(default=1.1, gt=0, allow_inf_nan=False)
    prompt_length: int = Field(default=128, ge=1)
    batch_size: int = Field(default=1, ge=1)


class Verdict(BaseModel):
    """One target: what was measured against which limit, and where.

    Attributes:
        target: the field of `Targets`.
        label: its name for people.
        passed: measured <= limit.
        batch_size, prompt_length: the point it was judged at.
        note: why it was not the point that the targets ask for; "" when it was.
    """

    target: str
    label: str
    unit: str
    measured: float
    limit: float
    passed: bool
    batch_size: int
    prompt_length: int
    note: str = ""


# Field of Targets -> its name, unit, and what is compared with it.
JUDGED: dict[str, tuple[str, str, Callable[[Point], float]]] = {
    "ttft_p95_ms": ("TTFT p95", "ms", lambda point: point.ttft_ms.p95),
    "tpot_p95_ms": ("TPOT p95", "ms", lambda point: point.tpot_ms.p95),
    "memory_gb": ("peak memory", "GB", lambda point: point.memory.peak / GB),
}


def load_targets(path: Path | None) -> Targets:
    """Read a YAML file of `Targets`' fields; the defaults when `path` is None.

    Raises:
        UserError: no such file, not YAML, or a field that is unknown or of no use (the message names it).
    """
    if path is None:
        return Targets()
    if not path.is_file():
        raise UserError(
            f"no such targets file: {path}", mend="give a .yaml file like calibration/targets/orin-agx.yaml"
        )
    fields = ", ".join(Targets.model_fields)
    try:
        return Targets.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}", mend=f"write `field: value` lines; fields: {fields}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {field}: {first['msg']}", mend=f"fields: {fields}") from error


def judged(points: Sequence[Point], targets: Targets) -> Point:
    """The point that the targets ask for, or the nearest one measured.

    Nearest is the largest batch, then the longest prompt, not above what is asked; when all are above, the least of
    them, which is the harder test.
    """
    batch_size = _nearest([point.batch_size for point in points], targets.batch_size)
    rows = {point.prompt_length: point for point in points if point.batch_size == batch_size}
    return rows[_nearest(list(rows), targets.prompt_length)]


def verdicts(points: Sequence[Point], targets: Targets) -> list[Verdict]:
    """Judge every limit at one point (see `judged`); a figure exactly at its limit passes."""
    point = judged(points, targets)
    asked = (targets.batch_size, targets.prompt_length)
    note = ""
    if (point.batch_size, point.prompt_length) != asked:
        easier = point.batch_size <= asked[0] and point.prompt_length <= asked[1]
        kind = "an easier" if easier else "another"
        note = f"batch {asked[0]}, prompt {asked[1]} was not measured; judged at {kind} point: {point.place}"
    return [
        Verdict(
            target=target,
            label=label,
            unit=unit,
            measured=measured(point),
            limit=limit,
            passed=measured(point) <= limit,
            batch_size=point.batch_size,
            prompt_length=point.prompt_length,
            note=note,
        )
        for target, (label, unit, measured) in JUDGED.items()
        if (limit := getattr(targets, target)) is not None
    ]


def _nearest(measured: Sequence[int], asked: int) -> int:
    return max((value for value in measured if value <= asked), default=min(measured))
