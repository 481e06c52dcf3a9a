"""`orin-kit demo --fast` as a user runs it: the whole chain, and a chat with its result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orin_kit.demo import calibration, demo
from orin_kit.errors import UserError
from orin_kit.manifest import read_manifest
from orin_kit.models.spec import read_spec


def orin_kit(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orin_kit", *args], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_whole_chain(tmp_path: Path) -> None:
    done = orin_kit("demo", "--fast", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    rows = {row["model"]: row for row in json.loads((out / "summary.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "plain student", "distilled", "distilled INT4"]
    assert rows["teacher"]["accuracy"] > 0.75  # 93 %, on 24 questions
    assert rows["distilled INT4"]["onnx_bytes"] < rows["distilled"]["onnx_bytes"] / 2
    assert all(row["perplexity"] > 1 and row["ttft_ms"] > row["tpot_ms"] > 0 for row in rows.values())
    made = {
        "students/plain": "model",
        "students/distilled": "model",
        "distilled-int4": "int4",
        **{f"{name}-onnx": "onnx" for name in ("teacher", "plain-student", "distilled", "distilled-int4")},
        **{f"{name}-profile": "profile" for name in ("teacher", "plain-student", "distilled", "distilled-int4")},
    }
    for name, kind in made.items():
        read_manifest(out / name, kind, verify=True)
    chat = orin_kit(
        "chat", "out/teacher-onnx", "--prompt", "How many minutes are 3 hours and 20 minutes?", cwd=tmp_path
    )
    assert chat.stdout.strip() == "<think>3 x 60 = 180. 180 + 20 = 200.</think>\n200"
    again = orin_kit("demo", "--fast", "--out", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists: choose another --out or add --overwrite" in again.stderr


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists"):
        demo(tmp_path, fast=True)


def test_the_demo_family_is_as_small_as_promised() -> None:
    teacher = calibration() / "demo-teacher"
    assert read_spec(teacher).num_parameters <= 8_000_000
    assert (teacher / "model.safetensors").stat().st_size <= 16_000_000
    last = json.loads((teacher / "train.log.jsonl").read_text().splitlines()[-1])
    assert last["test"]["all"] >= 0.9
