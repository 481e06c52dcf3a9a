"""The three stages: what each reads from teacher and student, what it learns beside the student, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from orin_kit.distill.heads import LayerHeads
from orin_kit.distill.losses import attention_loss, cross_entropy, feature_loss, logits_loss
from orin_kit.distill.recipe import Attention, Features, Lora, Stage
from orin_kit.distill.signals import Signal, TensorBatch, Wants, read_signal
from orin_kit.errors import UserError

DEFAULT_LAYERS = (6, 7, 8, 9)


@dataclass(frozen=True)
class Knobs:
    """What the schedules say for one step."""

    temperature: float
    teacher_weight: float


class StageModule(nn.Module):
    """The student and whatever a stage learns beside it, with the stage's loss as `forward`.

    One `forward` computes everything that has a gradient, so that accelerate can wrap it as a whole. This base class
    has no loss of its own beside the task's, which makes it stage 3; the other two add `alignment`.

    Args:
        student: trained in place.
        stage: the recipe's section.
        wants: what this stage's own loss reads from the student.
        teacher_wants: the same of the teacher.
        with_teacher: whether the task's loss has a teacher in it at all.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        stage: Stage,
        wants: Wants | None = None,
        teacher_wants: Wants | None = None,
        *,
        with_teacher: bool = True,
    ) -> None:
        super().__init__()
        self.student = student
        self.weight, self.task_weight = getattr(stage, "weight", 0.0), stage.task_weight
        own, teachers, task = wants or Wants(), teacher_wants or Wants(), stage.task_weight > 0
        self.wants = Wants(own.hidden, own.attention, task)
        self.teacher_wants = Wants(teachers.hidden, teachers.attention, task and with_teacher)

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch) -> Tensor | None:
        return None

    def forward(self, batch: TensorBatch, teacher: Signal, knobs: Knobs) -> dict[str, Tensor]:
        """Losses by name; `loss` = weight x alignment + task_weight x (kd and ce, shared out) is minimised."""
        student = read_signal(self.student, batch, self.wants)
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), device=batch.input_ids.device)
        aligned = self.alignment(student, teacher, batch)
        if aligned is not None:
            parts["alignment"] = aligned
            loss = loss + self.weight * aligned
        if student.logits is not None:
            parts["ce"] = cross_entropy(student.logits, batch.labels)
            task = (1 - knobs.teacher_weight) * parts["ce"]
            if teacher.logits is not None:
                parts["kd"] = logits_loss(student.logits, teacher.logits, knobs.temperature)
                task = task + knobs.teacher_weight * parts["kd"]
            loss = loss + self.task_weight * task
        return {"loss": loss, **parts}

    def finish(self) -> None:
        """Leave the student as an ordinary model."""


class FeatureStage(StageModule):
    """Stage 1: hidden states of chosen layers, through a learned projection each where the widths differ."""

    def __init__(
        self, student: PreTrainedModel, stage: Features, teacher_layers: int, teacher_width: int, *, with_teacher: bool
    ) -> None:
        depth, width = student.config.num_hidden_layers, student.config.hidden_size
        layers = choose_layers(stage.layers, depth, "stages.features.layers")
        matched = match_layers(layers, depth, teacher_layers)
        super().__init__(student, stage, Wants(hidden=layers), Wants(hidden=matched), with_teacher=with_teacher)
        self.kind = stage.loss
        same = width == teacher_width
        self.projections = nn.ModuleList(nn.Identity() if same else nn.Linear(width, teacher_width) for _ in layers)

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch) -> Tensor:
        pairs = zip(self.projections, student.hidden, teacher.hidden, strict=True)
        losses = [feature_loss(project(s), t, batch.mask, self.kind) for project, s, t in pairs]
        return torch.stack(losses).mean()


class HeadMixing(nn.Module):
    """Each imitated teacher head as a learned average of the student's heads.

    The weights are a softmax, so a mixture of attention rows is again a probability distribution. The student's side
    is mixed, not the teacher's: a learned mixture of targets could drift to the one easiest head, but here every
    imitated head has to be explained.
    """

    def __init__(self, student_heads: int, kept: Sequence[int], teacher_heads: int) -> None:
        super().__init__()
        start = torch.zeros(len(kept), student_heads)
        for row, head in enumerate(kept):  # leaning towards the head at the same relative place
            start[row, head * student_heads // teacher_heads] = 4.0
        self.scores = nn.Parameter(start)

    def forward(self, maps: Tensor) -> Tensor:
        """`[batch, student_heads, length, length]` to `[batch, kept, length, length]`."""
        weights = self.scores.softmax(-1).to(maps.dtype)
        return torch.einsum("kh,bhqs->bkqs", weights, maps)


class AttentionStage(StageModule):
    """Stage 2: attention maps of chosen layers against the teacher heads that passed the screening."""

    def __init__(
        self,
        student: PreTrainedModel,
        stage: Attention,
        heads: Sequence[LayerHeads],
        teacher_layers: int,
        *,
        with_teacher: bool,
    ) -> None:
        layers, matched = attention_layers(student, stage, teacher_layers)
        super().__init__(student, stage, Wants(attention=layers), Wants(attention=matched), with_teacher=with_teacher)
        by_layer = {h.layer: h for h in heads}
        self.kept = [by_layer[layer].kept for layer in matched]
        own = student.config.num_attention_heads
        self.mixers = nn.ModuleList(
            HeadMixing(own, by_layer[layer].kept, len(by_layer[layer].entropy)) for layer in matched
        )

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch) -> Tensor:
        losses = [
            attention_loss(mixer(s), t[:, kept], batch.mask)
            for mixer, s, t, kept in zip(self.mixers, student.attention, teacher.attention, self.kept, strict=True)
        ]
        return torch.stack(losses).mean()


class TaskStage(StageModule):
    """Stage 3: logits and assistant tokens, on low-rank adapters or on every weight."""

    def __init__(self, student: PreTrainedModel, stage: Stage, lora: Lora | None, *, with_teacher: bool) -> None:
        super().__init__(student, stage, with_teacher=with_teacher)
        # In a list, hence no submodule: the adapters already are parts of the student.
        self.adapted = [] if lora is None else [_adapt(student, lora)]

    def finish(self) -> None:
        for adapted in self.adapted:
            adapted.merge_and_unload()
            self.student.requires_grad_(True)


def _adapt(student: PreTrainedModel, lora: Lora) -> PeftModel:
    """Put adapters into the student's linears, in place; everything else is frozen.

    Raises:
        UserError: `targets` names no module of the student.
    """
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        adapted: PeftModel = get_peft_model(student, config)
    except ValueError as error:
        raise UserError(f"stages.task.lora.targets: {error}", mend="name linears of the student, as q_proj") from error
    return adapted


def attention_layers(
    student: PreTrainedModel, stage: Attention, teacher_layers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The student's layers of stage 2, and the teacher's they are matched to."""
    depth = student.config.num_hidden_layers
    layers = choose_layers(stage.layers, depth, "stages.attention.layers")
    return layers, match_layers(layers, depth, teacher_layers)


def choose_layers(asked: tuple[int, ...] | None, depth: int, field: str) -> tuple[int, ...]:
    """The layers a recipe asks for; by default 6 to 9, or the upper half of a student with fewer than 7.

    Raises:
        UserError: one of them is not in the student.
    """
    if asked is None:
        return tuple(layer for layer in DEFAULT_LAYERS if layer < depth) or tuple(range(depth // 2, depth))
    wrong = [layer for layer in asked if not 0 <= layer < depth]
    if wrong or not asked:
        what = f"{field}: the student has layers 0 to {depth - 1}, not {', '.join(map(str, wrong)) or 'none'}"
        raise UserError(what, mend="name layers of the student, or leave the field out")
    return tuple(asked)


def match_layers(layers: Sequence[int], depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's layer at the same relative depth, the last one for the last one."""
    return tuple(max(0, round((layer + 1) * teacher_depth / depth) - 1) for layer in layers)
