"""`orin-kit cache`, then `orin-kit distill` with what it wrote: the student learns as beside the live teacher."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from orin_kit import cli
from orin_kit.distill import Recipe, distill
from orin_kit.distill.cache import cache
from orin_kit.errors import EXIT_USER, UserError
from orin_kit.manifest import read_manifest

VOCAB = 2048  # the tokenizer's; the teacher's table is padded to 2112
TASK = {
    "steps": 6,
    "learning_rate": 1e-3,
    "lora": None,
    "temperature": {"start": 2.0, "factor": 0.8, "every": 1},  # another one at every step
    "teacher_weight": {"every": 2},
}


@pytest.fixture(scope="module")
def teacher(pair_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random teacher, made sure of itself: its logits are as far apart as a trained one's, and fp16 rounds them."""
    directory = tmp_path_factory.mktemp("sure") / "teacher"
    shutil.copytree(pair_dirs[0], directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] *= 20
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], teacher: Path) -> Recipe:
    return make_recipe(
        teacher=str(teacher), stages={"features": None, "attention": None, "task": TASK}, precision="fp32"
    )


def stored(recipe: Recipe, directory: Path, k: int) -> Recipe:
    """The recipe with its teacher's logits, made here, in place of the teacher."""
    cache(recipe, directory, k=k, progress=False)
    return stored_in(recipe, directory)


def stored_in(recipe: Recipe, directory: Path) -> Recipe:
    return recipe.model_copy(update={"teacher_logits": directory})


def train(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """The log of a run, a line a step."""
    distill(recipe, out, progress=False)
    return read_log(out)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train.log.jsonl").read_text().splitlines()]


def column(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


@pytest.fixture
def live(recipe: Recipe, tmp_path: Path) -> list[dict[str, Any]]:
    return train(recipe, tmp_path / "live")


def test_the_whole_vocabulary_teaches_as_the_live_teacher_does(
    recipe: Recipe, live: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Storing rounds each logit to fp16: 5e-4 of its distance from the largest, up and down, which all but cancels."""
    found = train(stored(recipe, tmp_path / "logits", VOCAB), tmp_path / "out")
    assert column(live, "kd")[0] > 1
    for name in ("step", "teacher_weight", "temperature", "learning_rate"):
        assert column(found, name) == column(live, name)
    assert len(found) == TASK["steps"]
    for name, tolerance in (("kd", 1e-5), ("ce", 1e-5), ("loss", 1e-5), ("held_out_loss", 1e-5), ("grad_norm", 1e-4)):
        assert column(found, name) == pytest.approx(column(live, name), rel=tolerance)
    assert read_manifest(tmp_path / "out", "model").inputs.keys() == {"teacher_logits", "student"}


def test_few_tokens_see_less_of_the_difference(recipe: Recipe, live: list[dict[str, Any]], tmp_path: Path) -> None:
    """Tokens outside the top-k are one event, and a divergence never grows when events are merged."""
    found = train(stored(recipe, tmp_path / "logits", 16), tmp_path / "out")
    assert 0 < found[0]["kd"] < live[0]["kd"]
    assert found[0]["ce"] == live[0]["ce"]
    assert column(found, "step") == column(live, "step")
    assert read_manifest(tmp_path / "out", "model", verify=True).results["final_loss"] == found[-1]["loss"]


def test_rows_that_were_not_stored_are_said_before_training(recipe: Recipe, tmp_path: Path) -> None:
    chosen = stored(recipe, tmp_path / "logits", 16)
    tasks = chosen.data.tasks
    assert tasks is not None
    for changed in (tasks.model_copy(update={"count": 90}), tasks.model_copy(update={"seed": 7})):
        other = chosen.model_copy(update={"data": chosen.data.model_copy(update={"tasks": changed})})
        with pytest.raises(UserError, match=r"does not know a row.*orin-kit cache"):
            distill(other, tmp_path / "out", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["logits"]


def orin_kit(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["orin-kit", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_commands(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    assert recipe.teacher is not None
    shutil.copytree(recipe.teacher, teacher)
    file, logits, out = tmp_path / "recipe.yaml", tmp_path / "logits", tmp_path / "out"
    file.write_text(recipe.model_copy(update={"teacher": teacher}).to_yaml())
    assert orin_kit(monkeypatch, "cache", file, "--out", logits, "--k", "16") == 0
    assert read_manifest(logits, "logits", verify=True).settings["k"] == 16
    assert "asked positions" in capfd.readouterr().out
    shutil.rmtree(teacher)  # nothing of it is needed any more
    with_logits = ("--set", f"teacher_logits={logits}")
    assert orin_kit(monkeypatch, "distill", file, "--out", out, *with_logits) == 0
    assert column(read_log(out), "kd") == column(train(stored_in(recipe, logits), tmp_path / "in-python"), "kd")
    capfd.readouterr()
    other = ("--out", tmp_path / "other", *with_logits)
    assert orin_kit(monkeypatch, "distill", file, *other, "--set", "data.tasks.count=90") == EXIT_USER
    assert "does not know a row" in capfd.readouterr().err
    assert orin_kit(monkeypatch, "distill", file, *other, "--set", "stages.features.steps=2") == EXIT_USER
    assert "stages.features needs the live teacher" in capfd.readouterr().err
    assert orin_kit(monkeypatch, "cache", file, "--out", logits) == EXIT_USER
    assert not (tmp_path / "other").exists()
