"""A run that is cut off anywhere ends with the bits of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orin_kit.distill import Recipe, distill, run
from orin_kit.distill.checkpoint import CheckpointStore
from orin_kit.distill.recipe import Exits
from orin_kit.errors import ArtifactError, TrainingDivergedError, UserError
from orin_kit.manifest import read_manifest

LORA = {"r": 4, "dropout": 0.3}  # dropout: the random state counts


class CutOffError(Exception):
    """Stands for a kill between two steps."""


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next run end after `step` steps, before that step's checkpoint."""
    train = run.Trainer.train

    def cut(self: Any, **options: Any) -> float:
        def advance(stage: str, done: int, loss: float) -> None:
            if done == step:
                raise CutOffError

        return train(self, **options | {"advance": advance})

    monkeypatch.setattr(run.Trainer, "train", cut)


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def losses(directory: Path) -> list[Any]:
    lines = [json.loads(line) for line in (directory / "train.log.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines]


def checkpoint_of(out: Path) -> Path:
    return out.parent / f".{out.name}.checkpoint"


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    base = make_recipe(optimizer="muon", accumulation=2)
    task = base.stages.task.model_dump() | {"lora": LORA}
    return Recipe.parse(base.model_dump() | {"stages": base.stages.model_dump() | {"task": task}})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture
def undisturbed(recipe: Recipe, home: Path) -> Path:
    """The recipe's result without a kill, made once."""
    if not (home / "undisturbed").exists():
        distill(recipe, home / "undisturbed", progress=False)
    return home / "undisturbed"


def test_bit_exact_in_every_stage(
    recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps: features 1-3, attention 4-6, task 7-10; checkpoints after 2, 3, 4, 6, 8 and 10."""
    out = tmp_path / "cut"
    for step in (1, 3, 4, 5, 7, 9, 10):
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(CutOffError):
                distill(recipe, out, progress=False)
        assert not out.exists()
    report = distill(recipe, out, progress=False)
    assert digest(out) == digest(undisturbed)
    assert losses(out) == losses(undisturbed)
    assert report["final_loss"] == json.loads((undisturbed / "report.json").read_text())["final_loss"]
    assert (out / "heads.json").read_bytes() == (undisturbed / "heads.json").read_bytes()
    assert not checkpoint_of(out).exists()


def test_bit_exact_with_everything_switched_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Average of weights, own answers, early exits, noise, a general set, searched layers, checkpointed activations."""
    task = {"on_policy": {"share": 0.5, "max_new_tokens": 5}, "exits": {"layers": [0]}, "neftune": 5.0}
    fields = recipe.model_dump()
    fields["stages"]["task"] |= task
    fields["stages"]["features"] |= {"teacher_layers": "cka", "projection": "residual", "embeddings": 0.5}
    fields["stages"]["attention"] |= {"mode": "relations"}
    general = {"tasks": {"count": 20, "kinds": ["logic"]}, "items": 4, "rehearsal": 0.3}
    fields["data"]["general"] = general
    full = Recipe.parse(fields | {"ema": 0.7, "activation_checkpointing": True})
    distill(full, tmp_path / "undisturbed", progress=False)
    for step in (1, 5, 7, 9):
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(CutOffError):
                distill(full, tmp_path / "cut", progress=False)
    distill(full, tmp_path / "cut", progress=False)
    assert digest(tmp_path / "cut") == digest(tmp_path / "undisturbed")
    assert losses(tmp_path / "cut") == losses(tmp_path / "undisturbed")
    events = EventAccumulator(str(tmp_path / "cut/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = {e.step: e.value for e in events.Scalars("loss")}
    logged = {i + 1: loss for i, (_, _, loss) in enumerate(losses(tmp_path / "cut"))}
    assert shown == pytest.approx(logged, rel=1e-5)


def test_a_cut_while_scoring_does_not_train_again(
    recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(run, "score", lambda *_, **__: (_ for _ in ()).throw(CutOffError))
        with pytest.raises(CutOffError):
            distill(recipe, out, progress=False)
    with monkeypatch.context() as patch:
        cut_at(patch, 10)  # would raise if any step ran
        distill(recipe, out, progress=False)
    assert digest(out) == digest(undisturbed)


def test_kill_9(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """A real process, killed twice after it has written a checkpoint."""
    out = tmp_path / "killed"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    code = (
        "import sys; from orin_kit.distill import Recipe, distill;"
        "distill(Recipe.load(sys.argv[1]), sys.argv[2], progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml"), str(out)]
    state, seen = checkpoint_of(out) / "state.pt", -1
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for _ in range(2):
        process = subprocess.Popen(command, env=os.environ | threads)
        while process.poll() is None:
            if state.is_file() and state.stat().st_mtime_ns != seen:
                seen = state.stat().st_mtime_ns
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.002)
        if not out.exists():
            with pytest.raises(ArtifactError):
                read_manifest(out)
    if not out.exists():
        subprocess.run(command, check=True, env=os.environ | threads)
    read_manifest(out, "model", verify=True)
    assert digest(out) == digest(undisturbed)
    assert losses(out) == losses(undisturbed)


def test_checkpoints_of_other_recipes_are_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(patch, 4)
        with pytest.raises(CutOffError):
            distill(recipe, out, progress=False)
    other = recipe.with_seed(7)
    with pytest.raises(UserError, match="another recipe"):
        distill(other, out, progress=False)
    distill(other, out, progress=False, overwrite=True)
    assert len(losses(out)) == 10
    with pytest.raises(UserError, match="exists"):
        distill(other, out, progress=False)


def test_identity_is_what_decides_the_weights(recipe: Recipe, tmp_path: Path) -> None:
    of = run.run_identity
    free = {"log_every": 7, "checkpoint_every": 9, "test_items": 3, "evaluation_batch": 5}
    assert of(recipe) == of(recipe.model_copy(update=free))
    moved = Path(shutil.copytree(recipe.student, tmp_path / "moved"))
    elsewhere = recipe.model_copy(update={"student": moved})
    assert of(recipe) == of(elsewhere)
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert of(recipe) != of(elsewhere)
    for changed in ({"seed": 4}, {"batch_size": 5}, {"watched_items": 11}, {"precision": "bf16"}):
        assert of(recipe) != of(recipe.model_copy(update=changed))


def test_faults_come_before_the_work(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the last stage, or a checkpoint of another recipe, before anything is asked or trained."""
    never = lambda *_, **__: pytest.fail("work was done")  # noqa: E731
    task = recipe.stages.task.model_copy(update={"exits": Exits(layers=(5,))})
    late = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"task": task})})
    with monkeypatch.context() as patch:
        patch.setattr(run, "answered", never)
        with pytest.raises(UserError, match=r"stages\.task\.exits"):
            distill(late, tmp_path / "late", progress=False)
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(CutOffError):
            distill(recipe, tmp_path / "out", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(run, "answered", never)
        with pytest.raises(UserError, match="another recipe"):
            distill(recipe.with_seed(9), tmp_path / "out", progress=False)


def test_other_numbers_of_processes_are_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(CutOffError):
            distill(recipe, tmp_path / "out", progress=False)
    path = checkpoint_of(tmp_path / "out") / "state.pt"
    torch.save(torch.load(path, weights_only=True) | {"processes": 2}, path)
    with pytest.raises(UserError, match="is of a run in 2 processes, this one has 1"):
        distill(recipe, tmp_path / "out", progress=False)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_half_a_checkpoint_is_never_used(recipe: Recipe, tmp_path: Path, keep: float) -> None:
    store = CheckpointStore(tmp_path / "out", "identity")
    assert store.open(overwrite=False) is None
    store.save({"module": {"w": torch.randn(100, 100)}})
    assert store.open(overwrite=False) is not None
    data = store.state.read_bytes()
    store.state.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ArtifactError, match="cannot be read"):
        store.open(overwrite=False)
    assert store.open(overwrite=True) is None


def test_a_killed_write_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "out", "identity")
    store.open(overwrite=False)
    store.save({"position": 1})
    store.state.with_suffix(".new").write_bytes(b"half")  # what a kill inside save leaves
    state = store.open(overwrite=False)
    assert state is not None and state["position"] == 1


def test_divergence_names_step_and_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    task = recipe.stages.task.model_copy(update={"learning_rate": 1e30, "lora": None, "warmup": 0.0, "decay": 0.0})
    wild = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"task": task}), "clip": 1e30})
    out = tmp_path / "out"
    with pytest.raises(
        TrainingDivergedError, match=r"stage task, step \d+: .* not finite; .*\.out\.checkpoint"
    ) as caught:
        distill(wild, out, progress=False)
    assert "stages.task.learning_rate" in caught.value.mend
    assert not out.exists()
    state = torch.load(checkpoint_of(out) / "state.pt", weights_only=True)
    assert all(bool(v.isfinite().all()) for v in state["module"].values())
