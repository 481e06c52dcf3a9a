"""Two processes over gloo do what one does with twice the accumulation, plain (DDP) and sharded (FSDP)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import DEMO_TEACHER
from orin_kit.distill import Recipe, distill

SCRIPT = Path(__file__).with_name("multi_process.py")
SHARDED = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def launch(recipe: Recipe, out: Path, *options: str, die_after: int = 0) -> subprocess.CompletedProcess[str]:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", free_port(), *options, str(SCRIPT), str(path), str(out),
               str(die_after)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train.log.jsonl").read_text().splitlines()]


def check_same(one: Path, two: Path, rel: float = 2e-4) -> None:
    assert [(x["stage"], x["step"]) for x in lines(one)] == [(x["stage"], x["step"]) for x in lines(two)]
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        for name in ("loss", "ce", "kd", "alignment", "grad_norm", "held_out_loss", "general_loss", "teacher_weight"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=rel / 20), (
                    ours["stage"],
                    ours["step"],
                    name,
                )
    first, second = (load_file(of / "model.safetensors") for of in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value.float(), second[name].float(), atol=10 * rel, rtol=100 * rel)


@pytest.fixture
def recipes(make_recipe: Callable[..., Recipe]) -> tuple[Recipe, Recipe]:
    """For one process with accumulation 4, and for two with 2; dropout, EMA, checkpointing and a general set are on."""
    general = {"tasks": {"count": 20, "kinds": ["logic"]}, "items": 6, "rehearsal": 0.2}
    questions = {"tasks": 8}
    stages = {
        "features": {"steps": 2, "learning_rate": 1e-3, "teacher_layers": "cka", "calibration_batches": 2},
        "attention": {"steps": 2, "learning_rate": 1e-3, "calibration_batches": 2, "task_weight": 0.0},
        "task": {"steps": 3, "learning_rate": 1e-3, "teacher_weight": {"every": 2}, "lora": {"r": 4, "dropout": 0.2}},
    }
    data = {"tasks": {"count": 60}, "row_length": 64, "general": general, "questions": questions}
    options = {"data": data, "stages": stages, "ema": 0.5, "activation_checkpointing": True, "max_new_tokens": 60,
               "teacher": str(DEMO_TEACHER), "student": str(DEMO_TEACHER.with_name("demo-student"))}  # fmt: skip
    one = make_recipe(accumulation=4, **options)
    return one, one.model_copy(update={"accumulation": 2})


@pytest.mark.parametrize("options", [["--multi_gpu"], SHARDED], ids=["ddp", "fsdp"])
def test_two_processes_equal_one(recipes: tuple[Recipe, Recipe], options: list[str], tmp_path: Path) -> None:
    one, two = recipes
    distill(one, tmp_path / "one", progress=False)
    done = launch(two, tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(tmp_path / "one", tmp_path / "two")
    assert not list(tmp_path.glob(".two*"))


@pytest.mark.slow
def test_a_sharded_run_is_resumed_whole_and_sharded(recipes: tuple[Recipe, Recipe], tmp_path: Path) -> None:
    """Died in the second stage and in the third, gone on with from whole checkpoints: the same losses."""
    one, two = recipes
    distill(one, tmp_path / "one", progress=False)
    died = launch(two, tmp_path / "two", *SHARDED, die_after=3)
    assert "died after 3 steps with a sharded student" in died.stdout and not (tmp_path / "two").exists()
    assert launch(two, tmp_path / "two", *SHARDED, die_after=6).returncode
    done = launch(two, tmp_path / "two", *SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sharded_bf16_is_bf16_of_one_process(recipes: tuple[Recipe, Recipe], tmp_path: Path) -> None:
    """As on GPUs: multiplied in bf16, but gradients and losses added up in fp32. Within what bf16 rounds."""
    one, two = (recipe.model_copy(update={"precision": "bf16"}) for recipe in recipes)
    distill(one, tmp_path / "one", progress=False)
    done = launch(two, tmp_path / "two", *SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(tmp_path / "one", tmp_path / "two", rel=2e-2)
    losses = [x["loss"] for x in lines(tmp_path / "two")]
    assert any(float(torch.tensor(loss).bfloat16()) != pytest.approx(loss, rel=1e-7) for loss in losses)


@pytest.mark.slow
def test_own_answers_without_a_teachers_weight(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Some batches have a divergence and others have none, in one process as in two."""
    task = {"steps": 4, "lora": None, "learning_rate": 1e-3, "on_policy": {"share": 0.5, "max_new_tokens": 6},
            "teacher_weight": {"start": 0.0, "low": 0.0, "every": 100}}  # fmt: skip
    one = make_recipe(stages={"features": None, "attention": None, "task": task}, accumulation=4)
    distill(one, tmp_path / "one", progress=False)
    done = launch(one.model_copy(update={"accumulation": 2}), tmp_path / "two", "--multi_gpu")
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(tmp_path / "one", tmp_path / "two")
