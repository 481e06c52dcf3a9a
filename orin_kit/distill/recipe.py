"""Recipes: everything a distillation run is told. How the YAML file is read lies in `recipe_file.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orin_kit.data.tasks import KINDS

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]  # of a whole that must leave something on both sides
UpToOne = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Layers = tuple[CountOrZero, ...]
# Fields that do not decide a run's weights. What lies at a path does, and is hashed by whoever knows how.
UNDECISIVE: Any = {
    "teacher": True, "teacher_logits": True, "student": True, "continue_from": True, "plain": True, "test_items": True,
    "checkpoint_every": True, "log_every": True, "evaluation_batch": True,
    "data": {"chats": True, "questions": {"chats"}, "general": {"chats"}, "back_translation": {"there", "back"}},
}  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- data ------------------------------------------------------------------------------------------------------------


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


class General(Section):
    """What the student knew before and should not forget: either `tasks` or `chats`.

    Some are never trained on: `items` test questions, and `items` whose loss, against what it was before training, is
    the forgetting that moves the elastic weights, once it is beyond `tolerance` (a share of the loss before). The
    others are rehearsed: they make up the share `rehearsal` of all training rows. `held_out`: as in `Data`.
    """

    tasks: Tasks | None = None
    chats: Path | None = None
    items: Count = 200
    held_out: Fraction = 0.1
    rehearsal: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    tolerance: NotNegative = 0.02

    @model_validator(mode="after")
    def _one_source(self) -> General:
        if (self.tasks is None) == (self.chats is None):
            raise ValueError("give either tasks or chats")
        return self


class Augment(Section):
    """Changed copies of the training chats: a share of the harmless words of what users say is replaced, swapped or
    deleted (`data/augment.py` says which words are never touched).
    """

    copies: Count = 1
    replace: Share = 0.0
    swap: Share = 0.0
    delete: Share = 0.0


class BackTranslation(Section):
    """Paraphrased copies: what users say, translated `there` and `back` by two seq2seq checkpoints."""

    there: Path
    back: Path


class Data(Section):
    """What is trained on: either `tasks` or `chats` (.jsonl), and `questions`, in rows of up to `row_length` tokens.

    `held_out` is the share of `chats` never trained on: half of it is the test, half steers the elastic weights.
    `packing` puts several chats into a row; none of them sees another.
    """

    tasks: Tasks | None = None
    chats: Path | None = None
    questions: Questions | None = None
    general: General | None = None
    augment: Augment | None = None
    back_translation: BackTranslation | None = None
    held_out: Fraction = 0.1
    row_length: Annotated[int, Field(ge=8)] = 512
    packing: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.tasks is None) == (self.chats is None):
            raise ValueError("give either tasks or chats")
        if self.questions is not None and self.questions.tasks is not None and self.tasks is None:
            raise ValueError("questions.tasks are further ones of tasks; with chats give questions.chats")
        return self


# --- stages ----------------------------------------------------------------------------------------------------------


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


class Aligned(Stage):
    """A stage that compares layers. `layers`: of the student, from 0; 6 to 9 when not given, or its upper half when it
    is shallower. `teacher_layers`: which each is compared with: at the same relative depth, as listed, or the most
    similar one by CKA on `calibration_batches` batches, never above a later layer's.
    """

    layers: Layers | None = None
    teacher_layers: Literal["proportional", "cka"] | Layers = "proportional"
    weight: Positive = 1.0
    calibration_batches: Count = 4


class Features(Aligned):
    """Stage 1: hidden states through a learned projection where the widths differ.

    `projection`: a linear map, or the linear map plus a residual (what the student's state is, padded or cut to the
    teacher's width, plus a map that begins at zero). `embeddings` weighs the same distance of the embedding layers.
    """

    loss: Literal["mse", "relative_mse", "cosine", "cosine_mse"] = "relative_mse"
    projection: Literal["linear", "residual"] = "linear"
    embeddings: NotNegative = 0.0
    own_learning_rate: Positive = 3e-3  # of the projections, which begin at random whatever the student knows


class Attention(Aligned):
    """Stage 2: attention `maps`, or MiniLM-v2 `relations` (query-query, key-key, value-value).

    For maps, of each teacher layer the share `keep_heads` with the lowest ("focused") or highest entropy is imitated,
    each by a learned mixture of the student's heads. For relations both sides are cut into `relation_heads`; the
    student's number of heads, or the nearest smaller one that fits both, when not given.
    """

    mode: Literal["maps", "relations"] = "maps"
    keep_heads: UpToOne = 0.6
    prefer: Literal["focused", "diffuse"] = "focused"
    relations: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")
    relation_heads: Count | None = None
    own_learning_rate: Positive = 3e-2  # of the head mixing, whose scores have to move by ones


class Temperature(Section):
    """`start x factor` every `every` steps, never below `floor`."""

    start: Positive = 2.0
    factor: UpToOne = 0.98
    every: Count = 10
    floor: Positive = 1.0


class TeacherWeight(Section):
    """The teacher's share of the task loss, `start` at first; the data has the rest.

    Every `every` steps something is measured, and the weight moves by `move`, within `low` to `high`: with
    `data.general`, towards the teacher while the student has forgotten more than the tolerance, else towards the data;
    without it, towards the data while the held-out loss falls and towards the teacher when it rises. `every: 0` keeps
    it constant.
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
    dora: bool = False


class OnPolicy(Section):
    """Generalized knowledge distillation (arXiv:2306.13649): a share of the batches is what the student itself says.

    For these batches the student answers the data's questions at `temperature`, and the teacher alone judges every
    token, by the task stage's divergence.
    """

    share: UpToOne = 0.5
    temperature: Positive = 1.0
    top_p: UpToOne = 1.0
    max_new_tokens: Count = 128


class Exits(Section):
    """Self-distillation by depth (arXiv:1905.08094): the model's last layer teaches earlier ones.

    The hidden states after `layers` go through the model's own last norm and head, and are drawn towards its own final
    prediction with `weight`.
    """

    layers: Annotated[Layers, Field(min_length=1)]
    weight: Positive = 0.5


class Task(Stage):
    """Stage 3: a divergence of logits and cross-entropy on assistant tokens; `lora: null` trains every weight.

    `beta` of the generalized Jensen-Shannon divergence: towards 0 it is like the forward, towards 1 like the reverse
    KL. `neftune`: noise on embeddings (arXiv:2310.05914), its alpha; 0 is off.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Fraction = 0.5
    temperature: Temperature = Temperature()
    teacher_weight: TeacherWeight = TeacherWeight()
    lora: Lora | None = Lora()
    on_policy: OnPolicy | None = None
    exits: Exits | None = None
    neftune: NotNegative = 0.0


class Stages(Section):
    """The three stages in their order; a stage that is null or has 0 steps is left out."""

    features: Features | None = Features()
    attention: Attention | None = Attention()
    task: Task = Task()


class Plain(Rate):
    """The student without a teacher that `compare` trains: cross-entropy on every weight, for as many steps."""

    learning_rate: Positive | None = None  # type: ignore[assignment]  # the task stage's when not given


# --- the whole -------------------------------------------------------------------------------------------------------


class Recipe(Section):
    """One distillation run. Same recipe, same machine, same number of threads: same result, to the bit.

    Attributes:
        teacher: a model directory; null for the student as it is before training (self-distillation).
        teacher_logits: what `orin-kit cache` wrote of this recipe: the task stage reads it, and no teacher runs.
        student: a model directory; with a config alone it is born from `seed`.
        continue_from: an earlier result that learns on: it is the student, and unless `data.general` says otherwise
            what it was trained on is rehearsed and watched for forgetting.
        bridge: "sequences" for a teacher with another tokenizer: it answers `data.questions`, and nothing else of it
            is compared.
        precision: of multiplications while training. A file may also say "auto": bf16 on a GPU that has it and on a CPU
            with AVX-512, else fp32; the recipe holds which.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        ema: decay of an exponential moving average of the weights, which is what is written; null for none.
    """

    teacher: Path | None
    teacher_logits: Path | None = None
    student: Path
    continue_from: Path | None = None
    bridge: Literal["none", "sequences"] = "none"
    data: Data
    stages: Stages = Stages()
    plain: Plain = Plain()
    seed: CountOrZero = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.01
    batch_size: Count = 32
    accumulation: Count = 1
    activation_checkpointing: bool = False
    ema: Fraction | None = None
    clip: Positive = 1.0
    checkpoint_every: Count = 100
    log_every: Count = 10
    watched_items: Count = 200  # held-out chats whose loss is measured
    test_items: Count = 300
    max_new_tokens: Count = 96
    evaluation_batch: Count = 128

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_of_this_machine(cls, precision: Any) -> Any:
        return fast_precision() if precision == "auto" else precision

    @model_validator(mode="before")
    @classmethod
    def _continued(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("continue_from"):
            return fields | {"student": fields["continue_from"]}
        return fields

    @model_validator(mode="after")
    def _teacher_can(self) -> Recipe:
        """What is asked of the teacher must be what this kind of teacher can give."""
        stages, task = self.stages, self.stages.task
        weight = task.teacher_weight
        compared = weight.start > 0 or weight.every > 0
        aligned = [name for name, stage in self.running_stages() if name != "task"]
        why = "a teacher of other tokens cannot be compared" if self.bridge == "sequences" else "no live teacher runs"
        if self.bridge == "sequences" or self.teacher_logits:
            for name in aligned:
                raise ValueError(f"stages.{name} needs the live teacher: {why}; set stages.{name}: null")
            if task.on_policy:
                raise ValueError(f"stages.task.on_policy needs the live teacher: {why}")
        if self.bridge == "sequences" and (compared or self.teacher_logits):
            raise ValueError(
                "bridge: sequences needs data.questions for the teacher to answer, teacher_weight: {start: 0, every: 0}"
                " and no teacher_logits"
            )
        if task.on_policy and not compared:
            raise ValueError("stages.task.on_policy has only the teacher to learn from, but teacher_weight is 0")
        if stages.attention and stages.attention.mode == "relations" and not stages.attention.relations:
            raise ValueError("stages.attention.relations is empty")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML recipe and apply `key.path=value` overrides: see `recipe_file.read`."""
        from orin_kit.distill.recipe_file import read

        return read(path, overrides)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Validate a recipe's fields.

        Raises:
            UserError: names every field that is wrong.
        """
        from orin_kit.distill.recipe_file import parse

        return parse(fields, source)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def sha256(self) -> str:
        """Hash of what decides the weights: neither what is logged, kept and scored, nor where things lie."""
        told = self.model_dump(mode="json", exclude=UNDECISIVE)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def with_seed(self, seed: int) -> Recipe:
        return self.model_copy(update={"seed": seed})

    def without_teacher(self) -> Recipe:
        """The same run with cross-entropy only: one stage of as many steps, on every weight, at `plain`'s rates."""
        rate = self.plain.model_dump() | {"learning_rate": self.plain.learning_rate or self.stages.task.learning_rate}
        constant = TeacherWeight(start=0.0, every=0)
        task = Task(steps=self.total_steps, teacher_weight=constant, lora=None, **rate)
        stages = Stages(features=None, attention=None, task=task)
        data = self.data.model_copy(update={"questions": None})  # there is nobody to answer them
        return self.model_copy(update={"stages": stages, "data": data, "teacher_logits": None})

    @property
    def with_teacher(self) -> bool:
        """Whether the task loss has a teacher in it: a weight that stays 0 is the plain student of a comparison."""
        weight = self.stages.task.teacher_weight
        return weight.start > 0 or weight.every > 0

    @property
    def asks_teacher(self) -> bool:
        """Whether training reads anything of the teacher."""
        return self.with_teacher or any(name != "task" for name, _ in self.running_stages())

    def running_stages(self) -> list[tuple[str, Stage]]:
        """The stages that have steps, in order, by name."""
        named = ((name, getattr(self.stages, name)) for name in Stages.model_fields)
        return [(name, stage) for name, stage in named if stage is not None and stage.steps]

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for _, stage in self.running_stages())


def fast_precision() -> Literal["bf16", "fp32"]:
    """The precision that this machine multiplies fastest in: without AVX-512, torch's bf16 is far slower than fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "fp32"
