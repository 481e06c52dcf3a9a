"""Learning on without forgetting: what an earlier result was trained on is rehearsed, watched and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orin_kit.distill import Recipe, compare, distill
from orin_kit.distill.accuracy import held_out_loss
from orin_kit.distill.continual import continued
from orin_kit.distill.dataset import load_dataset
from orin_kit.distill.pair import load_model
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer

TASK_ALONE = {
    "features": None,
    "attention": None,
    "task": {"steps": 6, "learning_rate": 1e-2, "lora": None, "teacher_weight": {"every": 2, "start": 0.5}},
}


@pytest.fixture
def earlier(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    data = {"tasks": {"count": 40, "kinds": ["logic"]}, "row_length": 64}
    distill(make_recipe(data=data, stages=TASK_ALONE, seed=5), tmp_path / "earlier", progress=False)
    return tmp_path / "earlier"


def test_the_earlier_data_are_the_general_set(
    earlier: Path, make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]
) -> None:
    recipe = continued(make_recipe(continue_from=str(earlier)))
    assert recipe.student == earlier
    general = recipe.data.general
    assert general is not None and general.tasks is not None
    assert (general.tasks.kinds, general.tasks.seed) == (("logic",), 5)
    tokenizer = ChatTokenizer(pair_dirs[1])
    before = load_dataset(Recipe.load(earlier / "recipe.yaml"), tokenizer)
    now = load_dataset(recipe, tokenizer).general
    assert now is not None and now.rehearsed == before.train
    own = {"tasks": {"count": 8, "kinds": ["strings"]}}
    named = make_recipe(continue_from=str(earlier), data={"tasks": {"count": 9}, "row_length": 64, "general": own})
    assert continued(named) == named  # what the recipe says itself is not touched


def test_forgetting_is_measured_and_moves_the_teachers_weight(
    earlier: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    data = {"tasks": {"count": 60, "kinds": ["strings"]}, "row_length": 64}
    recipe = make_recipe(data=data, stages=TASK_ALONE, continue_from=str(earlier), log_every=100)
    report = distill(recipe, tmp_path / "later", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "later/train.log.jsonl").read_text().splitlines()]
    curve = [line for line in lines if "forgetting" in line]
    assert [line["step"] for line in curve] == [2, 4, 6]
    data_set = load_dataset(continued(recipe), ChatTokenizer(earlier)).general
    assert data_set is not None
    baseline = held_out_loss(load_model(earlier), data_set.watched, 4)
    weight = 0.5
    for line in curve:
        assert line["forgetting"] == pytest.approx(line["general_loss"] / baseline - 1, abs=1e-5)
        assert line["teacher_weight"] == pytest.approx(weight)
        weight = min(0.9, max(0.3, weight + (0.05 if line["forgetting"] > 0.02 else -0.05)))
    assert report["general"]["before"]["loss"] == pytest.approx(baseline, rel=1e-5)
    after = held_out_loss(load_model(tmp_path / "later"), data_set.watched, 4)
    assert report["general"]["after"]["loss"] == pytest.approx(after, rel=1e-5)
    assert set(report["general"]["after"]["accuracy"]) == {"logic", "all"}
    assert "forgetting" in (tmp_path / "later/report.html").read_text().lower()


def test_a_comparison_from_an_earlier_result_goes_on(
    earlier: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(stages=TASK_ALONE, continue_from=str(earlier))
    first = compare(recipe, tmp_path / "compared", seeds=1, progress=False)
    again = compare(recipe, tmp_path / "compared", seeds=1, progress=False)
    assert first["runs"] == again["runs"]


def test_a_model_that_does_not_say_what_it_learned(
    pair_dirs: tuple[Path, Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no recipe\.yaml.*data\.general"):
        distill(make_recipe(continue_from=str(pair_dirs[1])), tmp_path / "out", progress=False)
