"""`orin-kit build-engine` as far as it goes without TensorRT: the dry run, what is said early, progress and Ctrl-C."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from orin_kit.cli import cli
from orin_kit.engine import build, trt
from orin_kit.engine.build import BuildProgress, Options, _check_memory, _in_a_thread, build_engine, plan_engine
from orin_kit.engine.plan import Memory
from orin_kit.errors import OrinKitError, UserError

GB = 10**9


def test_dry_run(exports: Path) -> None:
    done = CliRunner().invoke(cli, ["build-engine", str(exports / "plugin"), "--dry-run", "--tensorrt", "10.3"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for part in ("input_ids 1 x 1..128..256 1 x 1", "past_key_values.N.key (x 2)", "its input's own", "to build",
                 "creators needed: orin_kit::KvAttention version 1, orin_kit::SkipRmsNorm version 1"):  # fmt: skip
        assert part in text


def test_dry_run_as_json(exports: Path) -> None:
    done = CliRunner().invoke(
        cli, ["build-engine", str(exports / "native"), "--kv", "native", "--dry-run", "--json", "--tensorrt", "10.16"]
    )
    said = json.loads(done.output)
    _, plan = plan_engine(exports / "native", Options(kv="native"), tensorrt="10.16")
    assert said["schema"] == "orin-kit/engine-plan/1" and said["run_bytes"] == plan.memory.run
    assert said["profiles"][0]["input_ids"] == [[1, 1], [1, 128], [1, 256]]
    assert len(said["bindings"]) == len(plan.bindings) and said["creators"] == []


def test_out_is_needed(exports: Path) -> None:
    done = CliRunner().invoke(cli, ["build-engine", str(exports / "plugin")])
    assert done.exit_code == 2 and "--out" in done.output


@pytest.mark.skipif(build.installed_tensorrt() is not None, reason="TensorRT is installed here")
def test_without_tensorrt(exports: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TensorRT's Python package is not installed.*python3-libnvinfer"):
        build_engine(exports / "plugin", tmp_path / "engine", show=False)
    assert not (tmp_path / "engine").exists()


def machine(*, integrated: bool, free: int) -> Any:
    return SimpleNamespace(integrated=integrated, free_bytes=lambda: free)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(weights=GB, cache=GB // 10, buffers=0, activations=GB // 10, workspace=GB // 2)  # 3.7 GB to build
    monkeypatch.setattr(build.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GB))
    with pytest.raises(UserError, match=r"takes about 3.7 GB of memory, 3.0 GB are available.*--no-memory-check"):
        _check_memory(memory, machine(integrated=True, free=0))
    _check_memory(memory, machine(integrated=False, free=2 * GB))
    with pytest.raises(UserError, match=r"1.7 GB of GPU memory, 1.5 GB are"):
        _check_memory(memory, machine(integrated=False, free=3 * GB // 2))


def test_plugins_are_needed(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_library", lambda given: None)
    _, plan = plan_engine(exports / "plugin", Options(), tensorrt="10.3")
    where = build.Machine("10.3.0", 87, "Orin")
    with pytest.raises(UserError, match=r"needs the plugins KvAttention, SkipRmsNorm, and there is no plugin library"):
        build._library(plan, None, where)
    _, plan = plan_engine(exports / "native", Options(kv="native"), tensorrt="10.3")
    assert build._library(plan, None, where) is None


def test_progress_counts_phases_and_stops() -> None:
    with BuildProgress(show=False) as progress:
        progress.start("build", None, 10)
        progress.start("tactics", "build", 3)
        assert progress.step("tactics", 0) and progress.step("build", 0)
        assert progress.step("unknown to us", 0)
        progress.finish("tactics")
        progress.finish("never started")
        progress.stop()
        assert not progress.step("build", 1)


def test_a_build_in_a_thread() -> None:
    assert _in_a_thread(lambda: 5, lambda: None) == 5

    def fails() -> None:
        raise OrinKitError("no engine")

    with pytest.raises(OrinKitError, match="no engine"):
        _in_a_thread(fails, lambda: None)


def test_ctrl_c_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends by itself, at its next step, before the interrupt goes on."""
    stop, ended = threading.Event(), []

    def work() -> None:
        stop.wait(20)
        time.sleep(0.05)
        ended.append(True)

    plain = threading.Thread.join

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "tensorrt-build" and not stop.is_set():
            raise KeyboardInterrupt
        plain(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _in_a_thread(work, stop.set)
    assert ended


def test_messages_keep_the_first_error() -> None:
    said = trt.Messages()
    assert said.why() == "TensorRT gave no reason"
    said.add(2, "a warning")
    said.add(1, "the  cause\n of it")
    said.add(0, "a consequence")
    assert said.why() == "the cause of it" and said.warnings == ["a warning"]
