"""The three stages: what each reads from teacher and student, what it learns beside the student, and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook

from orin_kit.distill.attention import HeadMixing, attention_loss, relation_loss
from orin_kit.distill.heads import LayerHeads
from orin_kit.distill.logits import Dense, TaskLoss, TopK, task_loss
from orin_kit.distill.losses import feature_loss
from orin_kit.distill.recipe import Attention, Features, Lora, Stage, Task
from orin_kit.distill.signals import Signal, TensorBatch, Wants, logits_of, read_signal
from orin_kit.errors import UserError


@dataclass(frozen=True)
class Knobs:
    """What the schedules say for one step."""

    temperature: float
    teacher_weight: float


class StageModule(nn.Module):
    """The student and whatever a stage learns beside it, with the stage's loss as `forward`.

    One `forward` computes everything that has a gradient, so that accelerate can wrap it as a whole. The stages differ
    in `alignment`, the loss they add to the task's own.

    Args:
        student: trained in place.
        stage: the recipe's section of this stage.
        task: the recipe's section that says how logits are compared, in every stage.
        wants, teacher_wants: what `alignment` reads from the student and from the teacher.
        with_teacher: whether the task's loss has a teacher in it at all.
        vocab_size: tokens that the tokenizer has; what a table is padded with beyond them is not compared.
    """

    weight = 0.0
    on_policy = False  # whether batches may be the student's own words

    def __init__(
        self,
        student: PreTrainedModel,
        stage: Stage,
        task: Task,
        *,
        with_teacher: bool,
        wants: Wants | None = None,
        teacher_wants: Wants | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.student, self.task, self.task_weight, self.vocab_size = student, task, stage.task_weight, vocab_size
        own, teachers, learns = wants or Wants(), teacher_wants or Wants(), stage.task_weight > 0
        self.wants = Wants(own.hidden, own.attention, own.embeddings, learns)
        self.teacher_wants = Wants(teachers.hidden, teachers.attention, teachers.embeddings, learns and with_teacher)

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch, knobs: Knobs) -> Tensor | None:
        return None

    def forward(self, batch: TensorBatch, teacher: Signal, knobs: Knobs, measure: bool = False) -> dict[str, Tensor]:
        """Losses by name; `loss` = weight x alignment + task_weight x (kd and ce, shared out) is minimised.

        `measure` gives the cross-entropy alone.
        """
        student = read_signal(self.student, batch, Wants(logits=True) if measure else self.wants)
        if measure:
            return {"ce": self.compare(student.logits, batch.labels, None, Knobs(1.0, 0.0)).ce}
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), device=batch.input_ids.device)
        aligned = self.alignment(student, teacher, batch, knobs)
        if aligned is not None:
            parts["alignment"] = aligned
            loss = loss + self.weight * aligned
        if student.logits is not None:
            found = self.compare(student.logits, batch.labels, teacher.logits, knobs)
            parts |= {"ce": found.ce} | ({} if found.kd is None else {"kd": found.kd})
            loss = loss + self.task_weight * found.loss
        return {"loss": loss, **parts}

    def compare(
        self, student: Dense | TopK | None, labels: Tensor, teacher: Dense | TopK | None, knobs: Knobs
    ) -> TaskLoss:
        assert isinstance(student, Dense)
        return task_loss(
            student,
            labels,
            teacher,
            teacher_weight=0.0 if teacher is None else knobs.teacher_weight,
            temperature=knobs.temperature,
            divergence=self.task.divergence,
            beta=self.task.beta,
            vocab_size=self.vocab_size,
        )

    def finish(self) -> None:
        """Leave the student as an ordinary model."""

    def tie_weights(self) -> None:
        """Make a tied head the embedding again (accelerate calls it when FSDP has moved the parameters)."""
        self.student.tie_weights()

    @property
    def _no_split_modules(self) -> list[str]:
        """The student's decoder layers, by class name: what FSDP shards one by one (accelerate reads it here)."""
        return list(self.student._no_split_modules or [])


class ResidualProjection(nn.Module):
    """What the student's state is, padded with zeros or cut to the teacher's width, plus a map that begins at zero."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.change = nn.Linear(width, teacher_width)
        self.pad = teacher_width - width
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to `[..., teacher_width]`."""
        projected: Tensor = F.pad(x, (0, self.pad)) + self.change(x)
        return projected


def projection(kind: str, width: int, teacher_width: int) -> nn.Module:
    if kind == "residual":
        return ResidualProjection(width, teacher_width)
    return nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)


class FeatureStage(StageModule):
    """Stage 1: hidden states of chosen layers, through a learned projection each.

    Args:
        layers: of the student.
        matched: of the teacher, one for each.
        teacher_width: its hidden_size.
        options: see `StageModule`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        stage: Features,
        task: Task,
        layers: tuple[int, ...],
        matched: tuple[int, ...],
        teacher_width: int,
        **options: Any,
    ) -> None:
        wants, theirs = (Wants(hidden=of, embeddings=stage.embeddings > 0) for of in (layers, matched))
        super().__init__(student, stage, task, wants=wants, teacher_wants=theirs, **options)
        self.kind, self.weight, self.embeddings = stage.loss, stage.weight, stage.embeddings
        width = student.config.hidden_size
        made = [projection(stage.projection, width, teacher_width) for _ in (*layers, *[0] * wants.embeddings)]
        self.projections = nn.ModuleList(made)

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch, knobs: Knobs) -> Tensor:
        pairs = zip(self.projections, student.hidden, teacher.hidden, strict=False)  # the embeddings' own comes last
        losses = [feature_loss(project(s), t, batch.mask, self.kind) for project, s, t in pairs]
        loss = torch.stack(losses).mean()
        if student.embeddings is not None and teacher.embeddings is not None:
            projected = self.projections[-1](student.embeddings)
            loss = loss + self.embeddings * feature_loss(projected, teacher.embeddings, batch.mask, self.kind)
        return loss


class AttentionStage(StageModule):
    """Stage 2: attention maps of chosen layers against the teacher heads that passed the screening."""

    def __init__(
        self,
        student: PreTrainedModel,
        stage: Attention,
        task: Task,
        layers: tuple[int, ...],
        matched: tuple[int, ...],
        heads: Sequence[LayerHeads],
        **options: Any,
    ) -> None:
        wants, theirs = Wants(attention=layers), Wants(attention=matched)
        super().__init__(student, stage, task, wants=wants, teacher_wants=theirs, **options)
        self.weight = stage.weight
        by_layer = {h.layer: h for h in heads}
        self.kept = [by_layer[layer].kept for layer in matched]
        own = student.config.num_attention_heads
        self.mixers = nn.ModuleList(
            HeadMixing(own, by_layer[layer].kept, len(by_layer[layer].entropy)) for layer in matched
        )

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch, knobs: Knobs) -> Tensor:
        of_layers = zip(self.mixers, student.attention, teacher.attention, self.kept, strict=True)
        return torch.stack([attention_loss(s, t, batch.documents, mix, kept) for mix, s, t, kept in of_layers]).mean()


class RelationStage(StageModule):
    """Stage 2 the MiniLM-v2 way: how queries, keys and values relate to their own kind; no head is matched."""

    def __init__(
        self,
        student: PreTrainedModel,
        stage: Attention,
        task: Task,
        layers: tuple[int, ...],
        matched: tuple[int, ...],
        teacher: PretrainedConfig,
        **options: Any,
    ) -> None:
        wants, theirs = Wants(attention=layers), Wants(attention=matched)
        super().__init__(student, stage, task, wants=wants, teacher_wants=theirs, **options)
        self.weight, self.kinds = stage.weight, stage.relations
        self.heads = stage.relation_heads or relation_heads(student.config, teacher)

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch, knobs: Knobs) -> Tensor:
        pairs = zip(student.attention, teacher.attention, strict=True)
        losses = [relation_loss(s, t, batch.documents, relation_heads=self.heads, kinds=self.kinds) for s, t in pairs]
        return torch.stack(losses).mean()


class TaskStage(StageModule):
    """Stage 3: logits and assistant tokens, on low-rank adapters or on every weight."""

    on_policy = True

    def __init__(self, student: PreTrainedModel, stage: Task, **options: Any) -> None:
        check_task(student, stage)
        exits = stage.exits.layers if stage.exits else ()
        super().__init__(student, stage, stage, wants=Wants(hidden=exits), **options)
        if stage.exits:
            self.weight = stage.exits.weight
        # In lists, hence no submodules: the adapters already are parts of the student.
        self.adapted = [] if stage.lora is None else [_adapt(student, stage.lora)]
        self.hooks = [_noise(student, stage.neftune)] if stage.neftune else []

    def alignment(self, student: Signal, teacher: Signal, batch: TensorBatch, knobs: Knobs) -> Tensor | None:
        if not student.hidden or not isinstance(student.logits, Dense):
            return None
        head = student.logits
        last = Dense(head.hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())
        alone, norm = Knobs(knobs.temperature, 1.0), last_norm(self.student)
        logits = (logits_of(self.student, norm(state[batch.asked])) for state in student.hidden)
        return torch.stack([self.compare(early, batch.labels, last, alone).loss for early in logits]).mean()

    def finish(self) -> None:
        for remove in self.hooks:
            remove()
        for adapted in self.adapted:
            adapted.merge_and_unload()
            self.student.requires_grad_(True)


def check_task(student: PreTrainedModel, stage: Task) -> None:
    """Say what of the task stage does not fit the student, before anything is trained.

    Raises:
        UserError: exits or LoRA targets that it does not have.
    """
    depth, exits = student.config.num_hidden_layers, stage.exits.layers if stage.exits else ()
    if any(layer >= depth - 1 for layer in exits):
        what = f"stages.task.exits.layers: {list(exits)} of a student with layers 0 to {depth - 1}"
        raise UserError(what, mend=f"name layers from 0 to {depth - 2}: the last one is their teacher")
    if stage.lora is None or isinstance(stage.lora.targets, str):
        return
    head = student.get_output_embeddings()
    linears = [name for name, part in student.named_modules() if isinstance(part, nn.Linear) and part is not head]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    for target in stage.lora.targets:  # peft complains only where none of them is found
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            what = f"stages.task.lora.targets: the student has no linear {target} to adapt"
            raise UserError(what, mend=f"choose from {known}, or all-linear")


def last_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head, whatever the family calls it."""
    decoder = model.get_decoder()
    norm: nn.Module = decoder.norm if hasattr(decoder, "norm") else decoder.embedding_norm
    return norm


def relation_heads(student: PretrainedConfig, teacher: PretrainedConfig) -> int:
    """As many as the student has heads, or the most below it that cut every width of both models evenly."""
    widths = []
    for config in (student, teacher):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths += [config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim]
    common = math.gcd(*widths)
    return next(heads for heads in range(student.num_attention_heads, 0, -1) if common % heads == 0)


def _adapt(student: PreTrainedModel, lora: Lora) -> PeftModel:
    """Put adapters into the student's linears, in place; everything else is frozen."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    adapted: PeftModel = get_peft_model(student, config)
    return adapted


def _noise(student: PreTrainedModel, alpha: float) -> Callable[[], None]:
    """Switch NEFTune's noise on (in training mode only); returns what switches it off."""
    embedding = student.get_input_embeddings()
    embedding.neftune_noise_alpha = alpha
    remove: Callable[[], None] = embedding.register_forward_hook(neftune_post_forward_hook).remove
    return remove
