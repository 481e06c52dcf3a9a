"""`orin-kit profile` on a real artifact: files, figures that must agree with one another, and failures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from orin_kit.cli import cli
from orin_kit.errors import EXIT_TARGET_MISSED, EXIT_USER, OrinKitError, UserError
from orin_kit.manifest import read_manifest
from orin_kit.models.spec import read_spec
from orin_kit.profile import launch
from orin_kit.profile.profile import profile
from orin_kit.profile.report import Report

LENGTHS, BATCHES = (8, 100), (1, 8)


@pytest.fixture(scope="module")
def made(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("made") / "profile"
    report = profile(
        artifact, out, prompt_lengths=LENGTHS, batch_sizes=BATCHES, new_tokens=4, warmup=1, repeats=3, threads=1,
        show=False,
    )  # fmt: skip
    return out, report


def test_the_artifact_is_whole_and_its_json_is_the_report(made: tuple[Path, Report], artifact: Path) -> None:
    out, report = made
    manifest = read_manifest(out, "profile", verify=True)
    assert set(manifest.files) == {"report.json", "report.html"}
    assert manifest.inputs["model"]["path"] == str(artifact)
    assert manifest.inputs["model"]["sha256"] == report.model.sha256
    assert Report.model_validate_json((out / "report.json").read_text()) == report
    assert "</html>" in (out / "report.html").read_text()


def test_the_json_has_its_schema(made: tuple[Path, Report]) -> None:
    data = json.loads((made[0] / "report.json").read_text())
    assert data["schema"] == "orin-kit/profile/1"
    assert list(data) == ["schema", "model", "backend", "method", "machine", "points", "targets", "verdicts"]
    assert data["method"] == {
        "new_tokens": 4, "warmup": 1, "repeats": 3, "seed": 0, "max_len": 256, "threads": 1, "provider": "cpu",
    }  # fmt: skip
    assert {"cpu", "cores", "os", "python", "onnxruntime", "date", "jetson"} <= set(data["machine"])
    for point in data["points"]:
        assert set(point) == {
            "batch_size", "prompt_length", "ttft_ms", "tpot_ms", "prefill_tokens_per_s", "decode_tokens_per_s",
            "load_s", "memory",
        }  # fmt: skip
        assert set(point["memory"]) == {"weights", "kv_cache", "baseline", "loaded", "load_peak", "peak"}
        assert len(point["ttft_ms"]["samples"]) == 3
        assert len(point["tpot_ms"]["samples"]) == 3 * 3


def test_every_point_is_measured_and_memory_is_plausible(made: tuple[Path, Report], artifact: Path) -> None:
    report = made[1]
    assert [(p.batch_size, p.prompt_length) for p in report.points] == [(1, 8), (1, 100), (8, 8), (8, 100)]
    files = sum((artifact / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    for point in report.points:
        memory = point.memory
        assert memory.weights == files
        assert memory.kv_cache == 256 * point.batch_size * read_spec(artifact).kv_bytes_per_token(4)
        assert 0 < memory.baseline < memory.loaded <= memory.load_peak <= memory.peak
        assert point.load_s > 0
        assert 0 < point.ttft_ms.median <= point.ttft_ms.p95 <= max(point.ttft_ms.samples) + 1e-3
    # A process of its own for each: the first point's peak does not know of the last one's 8 x 100 tokens.
    assert report.points[0].memory.peak < report.points[-1].memory.peak


def test_verdicts_say_where_they_were_judged(made: tuple[Path, Report]) -> None:
    report = made[1]
    assert {(v.batch_size, v.prompt_length) for v in report.verdicts} == {(1, 100)}
    assert all("prompt 128 was not measured" in verdict.note for verdict in report.verdicts)
    assert report.passed == all(v.measured <= v.limit for v in report.verdicts)


@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (1e-6, EXIT_TARGET_MISSED)])
def test_the_command_ends_with_the_verdict(artifact: Path, tmp_path: Path, limit: float, code: int) -> None:
    targets = tmp_path / "targets.yaml"
    targets.write_text(f"ttft_p95_ms: {limit:f}\ntpot_p95_ms: {limit:f}\nmemory_gb: {limit:f}\n")
    args = ["profile", artifact, "--out", tmp_path / "out", "--prompt-lengths", 16, "--repeats", 2, "--new-tokens", 2]
    result = CliRunner().invoke(cli, [str(arg) for arg in (*args, "--targets", targets)])
    assert result.exit_code == code, result.output
    assert ("MISSED" in result.output) is (code != 0)
    assert "counted answers" in result.output
    assert read_manifest(tmp_path / "out", "profile").results["passed"] is (code == 0)


def test_a_prompt_at_the_context_fits_and_one_token_more_does_not(artifact: Path, tmp_path: Path) -> None:
    fits = dict(new_tokens=2, warmup=0, repeats=1, threads=1, show=False)
    report = profile(artifact, tmp_path / "fits", prompt_lengths=[255], **fits)  # type: ignore[arg-type]
    assert report.method.max_len == 256
    for options in (dict(prompt_lengths=[256]), dict(prompt_lengths=[8, 64], max_len=64)):
        with pytest.raises(UserError, match=r"context of \d+, more than") as caught:
            profile(artifact, tmp_path / "out", **fits | options)  # type: ignore[arg-type]
        assert "use prompts of at most" in caught.value.mend
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(prompt_lengths=()),
        dict(prompt_lengths=(0,)),
        dict(batch_sizes=(1, -2)),
        dict(repeats=0),
        dict(warmup=-1),
        dict(new_tokens=1),
    ],
)
def test_counts_that_make_no_sense_are_named(artifact: Path, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        profile(artifact, tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_broken_model_is_the_workers_error_in_one_line(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    model = broken / "model.onnx"
    model.write_bytes(b"\xff" * model.stat().st_size)  # sizes are checked on opening, sha256 is not
    with pytest.raises(UserError, match=r"model\.onnx") as caught:
        profile(broken, tmp_path / "out", prompt_lengths=[8], show=False)
    assert caught.value.exit_code == EXIT_USER
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "kind", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", UserError, "want of memory"),
        ("raise SystemExit('no libgomp here')", OrinKitError, "code 1: no libgomp here"),
    ],
)
def test_a_worker_that_dies_is_an_error(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, kind: type[OrinKitError], said: str
) -> None:
    monkeypatch.setattr(launch, "WORKER", [sys.executable, "-c", program])
    with pytest.raises(kind, match=said):
        profile(artifact, tmp_path / "out", prompt_lengths=[8], show=False)
    assert not (tmp_path / "out").exists()


def test_the_device_side_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "import orin_kit.profile.profile, orin_kit.profile.worker; assert 'onnxruntime' not in sys.modules"
    )
    launched = launch.subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr
