"""Recipes: everything a distillation run is told, as one YAML file whose mistakes are named field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orin_kit.data.tasks import KINDS
from orin_kit.errors import UserError

PATHS = (
    ("teacher",),
    ("student",),
    ("data", "chats"),
    ("data", "questions", "chats"),
)  # resolved against the recipe's own directory
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]  # of a whole that must leave something on both sides
UpToOne = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tasks(Section):
    """Synthetic reasoning problems: `count` distinct ones for training; test problems come from their own split.

    `seed` follows the recipe's own when not given, so that every seed of a comparison draws fresh problems.
    """

    count: Count = 8000
    seed: int | None = None
    kinds: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Tasks:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is not a kind of task; known: {', '.join(KINDS)}")
        return self


class Questions(Section):
    """Questions that nobody has answered: the teacher does before training, and the student learns those replies too.

    Either `tasks`, so many further problems after `data.tasks`, or `chats` (.jsonl), whose last reply is not looked at.
    """

    tasks: Count | None = None
    chats: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Questions:
        if (self.tasks is None) == (self.chats is None):
            raise ValueError("give either tasks or chats")
        return self


class Data(Section):
    """What is trained on: either `tasks` or `chats` (.jsonl), packed into rows of `row_length` tokens, and `questions`.

    `held_out` is the share of `chats` never trained on: half of it is the test, half steers the elastic weights.
    """

    tasks: Tasks | None = None
    chats: Path | None = None
    questions: Questions | None = None
    held_out: Fraction = 0.1
    row_length: Annotated[int, Field(ge=8)] = 512

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.tasks is None) == (self.chats is None):
            raise ValueError("give either tasks or chats")
        if self.questions is not None and self.questions.tasks is not None and self.tasks is None:
            raise ValueError("questions.tasks are further ones of tasks; with chats give questions.chats")
        return self


class Rate(Section):
    """Learning rate of a stage: linear warm-up over `warmup`, decay to zero over `decay`, shares of its steps."""

    learning_rate: Positive = 1e-4
    warmup: Share = 0.05
    decay: Share = 0.3
    shape: Literal["linear", "cosine"] = "linear"


class Stage(Rate):
    """What all stages have: how long, how fast, and how much the task's own loss (KD and CE) counts in them."""

    steps: CountOrZero = 200
    task_weight: NotNegative = 1.0


class Features(Stage):
    """Stage 1. `layers`: of the student, from 0; 6 to 9 when not given, or its upper half when it is shallower."""

    layers: tuple[int, ...] | None = None
    loss: Literal["mse", "relative_mse", "cosine"] = "relative_mse"
    weight: Positive = 1.0
    own_learning_rate: Positive = 3e-3  # of the projections, which begin at random whatever the student knows


class Attention(Stage):
    """Stage 2. Of each teacher layer the share `keep_heads` with the lowest ("focused") or highest entropy is kept."""

    layers: tuple[int, ...] | None = None
    weight: Positive = 1.0
    own_learning_rate: Positive = 3e-2  # of the head mixing, whose scores have to move by ones
    keep_heads: UpToOne = 0.6
    prefer: Literal["focused", "diffuse"] = "focused"
    calibration_batches: Count = 4


class Temperature(Section):
    """`start x factor` every `every` steps, never below `floor`."""

    start: Positive = 2.0
    factor: UpToOne = 0.98
    every: Count = 10
    floor: Positive = 1.0


class TeacherWeight(Section):
    """The teacher's share of the task loss, `start` at first; the data has the rest.

    Every `every` steps the held-out loss is measured: while it falls the weight moves by `move` towards the data, when
    it rises back towards the teacher, within `low` to `high`. `every: 0` keeps it constant.
    """

    start: Share = 0.7
    low: Share = 0.3
    high: Share = 0.9
    move: Share = 0.05
    every: CountOrZero = 50

    @model_validator(mode="after")
    def _ordered(self) -> TeacherWeight:
        if not self.low <= self.start <= self.high and self.every:
            raise ValueError(f"start {self.start} is not between low {self.low} and high {self.high}")
        return self


class Lora(Section):
    """Low-rank adapters (peft), merged into the weights at the end. `targets`: module names, or "all-linear"."""

    r: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    targets: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj")


class Task(Stage):
    """Stage 3: forward KL on logits and cross-entropy on assistant tokens; `lora: null` trains every weight."""

    temperature: Temperature = Temperature()
    teacher_weight: TeacherWeight = TeacherWeight()
    lora: Lora | None = Lora()


class Stages(Section):
    """The three stages in their order; a stage that is null or has 0 steps is left out."""

    features: Features | None = Features()
    attention: Attention | None = Attention()
    task: Task = Task()


class Plain(Rate):
    """The student without a teacher that `compare` trains: cross-entropy on every weight, for as many steps."""

    learning_rate: Positive | None = None  # type: ignore[assignment]  # the task stage's when not given


class Recipe(Section):
    """One distillation run. Same recipe, same machine, same number of threads: same result, to the bit."""

    teacher: Path
    student: Path
    data: Data
    stages: Stages = Stages()
    plain: Plain = Plain()
    seed: CountOrZero = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.01
    batch_size: Count = 32
    accumulation: Count = 1
    clip: Positive = 1.0
    checkpoint_every: Count = 100
    log_every: Count = 10
    watched_items: Count = 200  # held-out chats whose loss is measured
    test_items: Count = 300
    max_new_tokens: Count = 96
    evaluation_batch: Count = 128

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML recipe and apply `key.path=value` overrides.

        Paths inside the file are relative to it, paths in overrides to the working directory.

        Raises:
            UserError: the file is missing, is not YAML, or a field is unknown, missing or has a wrong value.
        """
        path = Path(path)
        fields = _read_yaml(path)
        for keys in PATHS:
            _resolve(fields, keys, path.absolute().parent)
        for override in overrides:
            _apply(fields, override)
        for keys in PATHS:
            _resolve(fields, keys, Path.cwd())
        return cls.parse(fields, source=str(path))

    @classmethod
    def parse(cls, fields: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Validate a recipe's fields.

        Raises:
            UserError: names every field that is wrong.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            faults = [_fault(dict(fault)) for fault in error.errors()]
            raise UserError(f"{source}: {'; '.join(faults)}", mend="mend the recipe or the --set option") from error

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def with_seed(self, seed: int) -> Recipe:
        return self.model_copy(update={"seed": seed})

    def without_teacher(self) -> Recipe:
        """The same run with cross-entropy only: one stage of as many steps, on every weight, at `plain`'s rates."""
        rate = self.plain.model_dump() | {"learning_rate": self.plain.learning_rate or self.stages.task.learning_rate}
        constant = TeacherWeight(start=0.0, every=0)
        task = Task(steps=self.total_steps, teacher_weight=constant, lora=None, **rate)
        stages = Stages(features=None, attention=None, task=task)
        data = self.data.model_copy(update={"questions": None})  # there is nobody to answer them
        return self.model_copy(update={"stages": stages, "data": data})

    def running_stages(self) -> list[tuple[str, Stage]]:
        """The stages that have steps, in order, by name."""
        named = ((name, getattr(self.stages, name)) for name in Stages.model_fields)
        return [(name, stage) for name, stage in named if stage is not None and stage.steps]

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for _, stage in self.running_stages())


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no such recipe: {path}", mend="give the path of a .yaml recipe, as in calibration/recipes/")
    try:
        fields = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}", mend="mend that line") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a recipe (a mapping of fields)", mend="see calibration/recipes/demo.yaml")
    return fields


def _apply(fields: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value`; the value is YAML."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"override {override!r} is not key=value", mend="as in stages.features.steps=20")
    *parents, last = key.strip().split(".")
    place = fields
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r} has a value that is not YAML", mend="quote it") from error


def _resolve(fields: dict[str, Any], keys: tuple[str, ...], base: Path) -> None:
    *parents, last = keys
    place: Any = fields
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if isinstance(place, dict) and isinstance(place.get(last), str):
        # Not resolve(): links stay as the user wrote them.
        place[last] = str(Path(base / Path(place[last]).expanduser()))


def _fault(fault: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "recipe"
    what = "unknown field" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float) and fault["type"] != "missing" else ""
    return f"{where}: {what}{shown}"
