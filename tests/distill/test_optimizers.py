"""Every trained parameter is in exactly one optimizer group, at its own rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orin_kit.distill.optimizers import make_optimizers, set_learning_rate
from orin_kit.distill.pair import load_pair
from orin_kit.distill.recipe import Features, Recipe, Task
from orin_kit.distill.stages import FeatureStage, TaskStage


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups(kind: str, make_recipe: Callable[..., Recipe]) -> None:
    student = load_pair(make_recipe()).student
    stage = Features(learning_rate=1e-4, own_learning_rate=1e-2)
    module = FeatureStage(student, stage, Task(), (0, 1), (1, 3), 48, with_teacher=True)
    optimizers = make_optimizers(module, stage, make_recipe(optimizer=kind, weight_decay=0.1))
    set_learning_rate(optimizers, 0.5)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in module.parameters())
    assert (len(optimizers) == 2) == (kind == "muon")
    by_id = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        group = by_id[id(parameter)]
        assert group["lr"] == pytest.approx(0.5e-2 if name.startswith("projections") else 0.5e-4)
        assert group["weight_decay"] == (0.1 if name.startswith("student") and parameter.ndim == 2 else 0.0)


def test_adapters_alone(make_recipe: Callable[..., Recipe]) -> None:
    student = load_pair(make_recipe()).student
    stage = Task(learning_rate=1e-4)
    module = TaskStage(student, stage, with_teacher=True)
    (optimizer,) = make_optimizers(module, stage, make_recipe(optimizer="muon"))
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2 * 2 * 2  # A and B, of q and v, in two layers
    assert group["weight_decay"] == 0.0
