"""Artifacts are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import MANIFEST, read_manifest, sha256_file, write_artifact


def make(directory: Path, content: bytes = b"data", **options: bool) -> None:
    with write_artifact(directory, "model", inputs={"source": __file__}, settings={"a": 1}, **options) as artifact:
        (artifact.directory / "sub").mkdir()
        (artifact.directory / "sub" / "file").write_bytes(content)
        artifact.results["score"] = 0.5


def test_manifest_says_what_it_is_made_of(tmp_path: Path) -> None:
    make(tmp_path / "a")
    manifest = read_manifest(tmp_path / "a", "model", verify=True)
    assert manifest.settings == {"a": 1}
    assert manifest.results == {"score": 0.5}
    assert manifest.inputs["source"]["sha256"] == sha256_file(__file__)
    assert manifest.files["sub/file"]["bytes"] == 4
    assert manifest.made_by.startswith("orin-kit 0.")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_artifact(tmp_path / "a", "model", inputs={}, settings={}) as artifact:
        (artifact.directory / "file").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_replacing_needs_overwrite_and_keeps_the_old_until_the_end(tmp_path: Path) -> None:
    make(tmp_path / "a", b"old")
    with pytest.raises(UserError, match="exists"):
        make(tmp_path / "a", b"new")
    with (
        pytest.raises(RuntimeError),
        write_artifact(tmp_path / "a", "model", inputs={}, settings={}, overwrite=True) as artifact,
    ):
        assert (tmp_path / "a/sub/file").read_bytes() == b"old"
        (artifact.directory / "file").write_text("x")
        raise RuntimeError
    assert (tmp_path / "a/sub/file").read_bytes() == b"old"
    make(tmp_path / "a", b"new", overwrite=True)
    assert (tmp_path / "a/sub/file").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_foreign_directories_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an orin-kit artifact"):
        make(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "sub/file").unlink(), "lacks its file sub/file"),
        (lambda d: (d / "sub/file").write_bytes(b"dat"), "has 3 bytes"),
        (lambda d: (d / "sub/file").write_bytes(b"date"), "sha256 differs"),
        (lambda d: (d / MANIFEST).unlink(), f"has no {MANIFEST}"),
        (lambda d: (d / MANIFEST).write_text("{"), "cannot be read"),
        (
            lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace('"format": 1', '"format": 2')),
            "newer",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, said: str) -> None:
    make(tmp_path / "a")
    damage(tmp_path / "a")  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=said):
        read_manifest(tmp_path / "a", verify=True)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="is a model artifact, not onnx or engine"):
        read_manifest(tmp_path / "a", "onnx", "engine")


WRITER = """
import sys, time
from orin_kit.manifest import write_artifact
with write_artifact(sys.argv[1], "model", inputs={}, settings={}, overwrite=True) as artifact:
    for n in range(1000):
        (artifact.directory / f"file{n}").write_bytes(bytes(1000))
        print(n, flush=True)
        time.sleep(0.001)
"""


def test_kill_9_leaves_no_artifact_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "a"], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in tmp_path.iterdir()] == [f".a.partial-{process.pid}"]
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "a")
    make(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_kill_in_the_middle_of_replacing_is_mended(tmp_path: Path) -> None:
    make(tmp_path / "a", b"old")
    (tmp_path / "a").rename(tmp_path / ".a.old-999999999")
    with pytest.raises(UserError, match="exists"):  # the old one is put back, so it is in the way again
        make(tmp_path / "a", b"new")
    assert (tmp_path / "a/sub/file").read_bytes() == b"old"


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["kind"] == "model"
