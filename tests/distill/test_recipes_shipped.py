"""The recipes that come along: valid, whole, and honest about what the user has to bring."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from orin_kit.cli import cli, main
from orin_kit.data.chat import read_chats
from orin_kit.distill.dataset import load_dataset, load_questions
from orin_kit.distill.recipe import Recipe
from orin_kit.errors import UserError
from orin_kit.models.spec import read_spec
from orin_kit.models.weights import has_weights
from orin_kit.tokenizer import ChatTokenizer

RECIPES = Path(__file__).parents[2] / "calibration/recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
DEMOS = ("demo", "self", "conv")
TOKENIZER = RECIPES.parent / "demo-teacher"


def load(name: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml")


def comment(name: str) -> str:
    """The text above the first field."""
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    return "\n".join(line[2:] for line in text[: re.search(r"^\w", text, re.MULTILINE).start()].splitlines())  # type: ignore[union-attr]


def command(name: str) -> list[str]:
    """The command in the comment, its continued lines joined."""
    joined = comment(name).replace("\\\n", " ")
    line = next(line for line in joined.splitlines() if "distill calibration/recipes" in line)
    return shlex.split(line)


def test_all_that_were_promised_are_there() -> None:
    assert {
        "conv", "demo", "domain-legal", "domain-medical", "qwen2.5-7b-to-1.5b", "qwen2.5-7b-to-1.5b-8gpu", "self",
    } <= set(NAMES)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_survives_being_written(name: str) -> None:
    recipe = load(name)
    assert recipe.total_steps
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())).sha256() == recipe.sha256()
    assert recipe.without_teacher().total_steps == recipe.total_steps


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_run(name: str) -> None:
    words = command(name)
    assert f"calibration/recipes/{name}.yaml" in words and "--out" in words
    known = {option for parameter in cli.commands["distill"].params for option in parameter.opts}
    own = words[words.index("distill") + 1 :]
    assert {word for word in own if word.startswith("--")} <= known
    if name != "demo":
        assert "hat to change first" in comment(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_field_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("batch_size:"))
    lines[at] = "batch_size: many"
    broken = tmp_path / "broken.yaml"
    broken.write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match=rf"line {at + 1}, batch_size"):
        Recipe.load(broken)


@pytest.mark.parametrize("name", DEMOS)
def test_demo_recipes_name_models_that_are_there(name: str) -> None:
    recipe = load(name)
    for directory in (recipe.teacher or recipe.student, recipe.student):
        read_spec(directory)
    assert has_weights(recipe.teacher or recipe.student)
    data = load_dataset(recipe.model_copy(update={"watched_items": 4, "test_items": 4}), ChatTokenizer(TOKENIZER))
    assert data.train and data.watched and data.test
    depth = read_spec(recipe.student).num_hidden_layers
    exits = recipe.stages.task.exits
    assert exits is None or max(exits.layers) < depth - 1


def test_the_convolutional_student_is_born_and_keeps_chats_apart() -> None:
    recipe = load("conv")
    assert read_spec(recipe.student).layout.mixer == "conv" and not has_weights(recipe.student)
    assert recipe.stages.attention is None and not recipe.data.packing
    assert recipe.stages.features is not None
    assert recipe.stages.features.layers == tuple(range(read_spec(recipe.student).num_hidden_layers))


def test_self_distillation_is_the_student_by_itself() -> None:
    recipe = load("self")
    assert recipe.teacher is None and has_weights(recipe.student)
    assert recipe.stages.task.exits is not None and recipe.with_teacher


@pytest.mark.parametrize("name", ["domain-medical", "domain-legal"])
def test_domain_recipes_watch_forgetting_and_say_which_file_is_missing(name: str) -> None:
    recipe = load(name)
    data, task = recipe.data, recipe.stages.task
    assert data.general is not None and data.general.rehearsal > 0
    assert data.questions is not None and task.teacher_weight.every and task.lora is not None
    assert data.augment is None or not (data.augment.replace or data.augment.swap)
    for path in (data.chats, data.questions.chats, data.general.chats):
        assert path is not None and not path.exists()
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_chats(path)
    with pytest.raises(UserError, match=re.escape(str(data.questions.chats))):
        load_questions(recipe)
    with pytest.raises(UserError, match=re.escape(str(data.chats))):
        load_dataset(recipe, ChatTokenizer(TOKENIZER))


def test_a_run_without_the_users_files_ends_with_exit_code_2_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"--set={role}={RECIPES.parent / f'demo-{role}'}" for role in ("teacher", "student")]
    recipe = str(RECIPES / "domain-legal.yaml")
    monkeypatch.setattr("sys.argv", ["orin-kit", "distill", recipe, "--out", str(tmp_path / "out"), *models])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(r"legal-\w+\.jsonl", told) and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_the_launch_command_is_one_that_accelerate_takes() -> None:
    words = command("qwen2.5-7b-to-1.5b-8gpu")
    assert words[:2] == ["accelerate", "launch"]
    given = launch_command_parser().parse_args(words[2:])
    assert (given.use_fsdp, str(given.fsdp_version), given.num_processes, given.module) == (True, "2", 8, True)
    assert (given.mixed_precision, given.fsdp_cpu_ram_efficient_loading) == ("bf16", "false")
    assert given.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert given.training_script == "orin_kit" and given.training_script_args[0] == "distill"
    recipe = load("qwen2.5-7b-to-1.5b-8gpu")
    assert recipe.precision == given.mixed_precision and recipe.stages.task.on_policy is None
