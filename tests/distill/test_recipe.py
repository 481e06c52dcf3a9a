"""Recipes: what they say is what runs, and every mistake names its field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orin_kit.distill.recipe import Recipe
from orin_kit.distill.recipe_file import with_absolute_paths
from orin_kit.errors import UserError

RECIPES = Path(__file__).parents[2] / "calibration/recipes"
GOOD = {"teacher": "t", "student": "../s", "data": {"tasks": {"count": 5}}}


def write(directory: Path, fields: object) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), "utf-8")
    return path


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    recipe = Recipe.load(write(tmp_path / "r", GOOD), overrides=["student=mine"])
    assert recipe.teacher == tmp_path / "r/t"
    assert recipe.student == tmp_path / "w/mine"


def test_overrides(tmp_path: Path) -> None:
    overrides = ["stages.features.steps=20", "stages.task.lora=null", "stages.attention.layers=[1, 2]",
                 "stages.task.learning_rate=1e-3", "data.tasks.kinds=[logic]"]  # fmt: skip
    recipe = Recipe.load(write(tmp_path, GOOD), overrides)
    assert recipe.stages.features is not None and recipe.stages.attention is not None
    assert recipe.stages.features.steps == 20
    assert recipe.stages.task.lora is None
    assert recipe.stages.attention.layers == (1, 2)
    assert recipe.stages.task.learning_rate == 1e-3
    assert recipe.data.tasks is not None and recipe.data.tasks.kinds == ("logic",)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stages.features.stepz=20", "stages.features.stepz"),
        ("stages.features.steps=-1", "stages.features.steps"),
        ("stages.features.steps=many", "stages.features.steps"),
        ("stages.attention.keep_heads=0", "stages.attention.keep_heads"),
        ("stages.task.learning_rate=.nan", "stages.task.learning_rate"),
        ("stages.task.learning_rate=0", "stages.task.learning_rate"),
        ("stages.task.temperature.factor=1.5", "stages.task.temperature.factor"),
        ("stages.task.teacher_weight.start=0.1", "stages.task.teacher_weight"),
        ("stages.task.lora.r=0", "stages.task.lora.r"),
        ("precision=int8", "precision"),
        ("optimizer=sgd", "optimizer"),
        ("data.tasks.kinds=[poetry]", "data.tasks"),
        ("data.chats=x.jsonl", "data"),
        ("batch_size=0", "batch_size"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_mistakes_name_their_field(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(write(tmp_path, GOOD), [override])
    assert f"{named}: " in caught.value.what
    assert "\n" not in str(caught.value)


def test_mistakes_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "teacher: t\nstudent: s\ndata:\n  tasks:\n    count: 0\n  questions: {tasks: 5}\n"
        "stages:\n  features:\n    layer: [1]\n  task: {lora: {r: 16,\n    alpha: none}}\n"
    )
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    said = caught.value.what
    for words in (
        "line 5, data.tasks.count: ",
        "line 9, stages.features.layer: unknown",
        "line 11, stages.task.lora",
    ):
        assert words in said


def test_an_override_has_no_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(write(tmp_path, GOOD | {"batch_size": 4}), ["batch_size=0"])
    assert "line " not in caught.value.what


def test_a_recipe_for_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = with_absolute_paths(Recipe.parse(GOOD | {"data": {"chats": "c.jsonl", "general": {"chats": "g.jsonl"}}}))
    assert recipe.data.chats == tmp_path / "c.jsonl" and recipe.teacher == tmp_path / "t"
    assert recipe.data.general is not None and recipe.data.general.chats == tmp_path / "g.jsonl"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teacher_logits": "cache"}, "stages.features needs the live teacher"),
        ({"teacher_logits": "cache", "stages": {"features": None}}, "stages.attention needs the live teacher"),
        (
            {"teacher_logits": "c", "stages": {"features": None, "attention": None, "task": {"on_policy": {}}}},
            "on_policy needs the live teacher",
        ),
        ({"bridge": "sequences", "stages": {"features": None, "attention": None}}, "needs data.questions"),
        ({"stages": {"task": {"on_policy": {}, "teacher_weight": {"start": 0, "every": 0}}}}, "on_policy has only"),
        ({"stages": {"attention": {"mode": "relations", "relations": []}}}, "relations is empty"),
        ({"stages": {"task": {"exits": {"layers": []}}}}, "stages.task.exits.layers"),
    ],
)
def test_what_this_teacher_cannot_give_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        Recipe.parse(GOOD | fields)


def test_missing_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher: Field required"):
        Recipe.load(write(tmp_path, {"student": "s", "data": {"chats": "c.jsonl"}}))


@pytest.mark.parametrize("text", ["teacher: [", "- a\n- b\n", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    with pytest.raises(UserError):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="no such recipe"):
        Recipe.load(tmp_path / "missing.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "x=[1"])
def test_overrides_that_are_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="override"):
        Recipe.load(write(tmp_path, GOOD), [override])


def test_the_plain_student_has_no_teacher_and_as_many_steps(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD | {"plain": {"learning_rate": 0.5, "decay": 0.7}}))
    plain = recipe.without_teacher()
    assert plain.total_steps == recipe.total_steps > 0
    assert [name for name, _ in plain.running_stages()] == ["task"]
    task = plain.stages.task
    assert task.lora is None and task.teacher_weight.start == 0 and not task.teacher_weight.every
    assert (task.learning_rate, task.decay) == (0.5, 0.7)
    assert plain.batch_size == recipe.batch_size and plain.data == recipe.data


def test_yaml_and_hash_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert Recipe.load(tmp_path / "again.yaml").sha256() == recipe.sha256()
    assert recipe.with_seed(1).sha256() != recipe.sha256()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert Recipe.load(path).total_steps > 0


@pytest.mark.parametrize(("capability", "precision"), [("AVX2", "fp32"), ("AVX512", "bf16"), ("DEFAULT", "fp32")])
def test_auto_is_what_this_machine_multiplies_fastest_in(
    monkeypatch: pytest.MonkeyPatch, capability: str, precision: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    recipe = Recipe.parse({"teacher": None, "student": "s", "data": {"tasks": {"count": 1}}, "precision": "auto"})
    assert recipe.precision == precision
    assert f"precision: {precision}" in recipe.to_yaml()  # a resumed run keeps it
