"""A real artifact to profile, and a report that needs none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from families import save_model
from orin_kit.export.export import export
from orin_kit.profile.latency import Timings, Workload
from orin_kit.profile.machine import read_machine
from orin_kit.profile.points import Memory, Point, point
from orin_kit.profile.report import Method, Model, Report
from orin_kit.profile.targets import Targets, verdicts


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 exported with a context of 256."""
    directory = tmp_path_factory.mktemp("profiled")
    save_model(directory / "hf", "qwen2", num_hidden_layers=2)
    export(directory / "hf", directory / "onnx", max_len=256, progress=False)
    return directory / "onnx"


@pytest.fixture
def make_point() -> Callable[..., Point]:
    """A point with random times around `ttft` and `tpot` seconds."""

    def make(
        batch_size: int, prompt_length: int, ttft: float = 0.05, tpot: float = 0.01, peak: int = 500_000_000
    ) -> Point:
        rng = np.random.default_rng()
        work = Workload(batch_size, prompt_length, new_tokens=5, warmup=1, repeats=6, seed=0)
        timings = Timings((ttft * rng.uniform(0.9, 1.0, 6)).tolist(), (tpot * rng.uniform(0.9, 1.0, (6, 4))).tolist())
        memory = Memory(weights=10**8, kv_cache=10**7, baseline=5 * 10**7, loaded=peak // 2, load_peak=peak, peak=peak)
        return point(work, timings, 0.25, memory)

    return make


@pytest.fixture
def make_report(make_point: Callable[..., Point]) -> Callable[..., Report]:
    """A report over points, with the figures of this machine."""

    def make(places: list[tuple[int, int]], targets: Targets | None = None, **changes: Any) -> Report:
        targets = targets or Targets()
        points = [make_point(batch_size, length) for batch_size, length in places]
        fields = SimpleNamespace(name="student", directory="/models/student", backend="onnxruntime, 2 threads")
        vars(fields).update(changes)
        return Report(
            model=Model(
                name=fields.name,
                directory=fields.directory,
                sha256="ab" * 32,
                precision="int4",
                activations="fp32",
                parameters=3_000_000,
                weights_bytes=10**8,
            ),
            backend=fields.backend,
            method=Method(new_tokens=5, warmup=1, repeats=6, seed=0, max_len=512, threads=2, provider="cpu"),
            machine=read_machine("1.0"),
            points=points,
            targets=targets,
            verdicts=verdicts(points, targets),
        )

    return make
