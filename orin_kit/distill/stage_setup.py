"""A recipe's section made into a stage: which layers, which of the teacher's, which heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from orin_kit.distill.checkpoint import CheckpointStore
from orin_kit.distill.dataset import Batches
from orin_kit.distill.heads import LayerHeads, read_heads, screen_heads, write_heads
from orin_kit.distill.layers import compared_layers, layer_similarity, search_layers
from orin_kit.distill.pair import Pair
from orin_kit.distill.recipe import Aligned, Attention, Features, Recipe, Stage, Task
from orin_kit.distill.signals import Signal, Teacher, Wants, read_signal
from orin_kit.distill.stages import AttentionStage, FeatureStage, RelationStage, StageModule, TaskStage, check_task


def check_stages(recipe: Recipe, pair: Pair) -> None:
    """Say what does not fit the models before anything is trained, not when a stage's turn comes.

    Raises:
        UserError: layers, exits or modules are named that the models do not have.
    """
    depth = pair.student.config.num_hidden_layers
    for name, stage in recipe.running_stages():
        field = f"stages.{name}"
        if isinstance(stage, Task):
            check_task(pair.student, stage)
        elif isinstance(stage, Aligned) and pair.teacher is not None:
            compared_layers(stage, field, depth, pair.teacher.config.num_hidden_layers)


class StageBuilder:
    """Builds stages; what is measured for it (heads, similar layers) is measured once a run and kept in its store.

    Several processes measure the same; the `first` one writes it down.
    """

    def __init__(
        self, recipe: Recipe, pair: Pair, teacher: Teacher, batches: Batches, store: CheckpointStore, *, first: bool
    ) -> None:
        self.first = first
        self.recipe, self.pair, self.teacher, self.batches, self.store = recipe, pair, teacher, batches, store

    def build(self, stage: Stage) -> StageModule:
        """The stage's module around `pair.student`.

        Raises:
            UserError: layers, heads or modules are named that the models do not have.
        """
        student, task = self.pair.student, self.recipe.stages.task
        options = {"with_teacher": self.recipe.with_teacher, "vocab_size": len(self.pair.tokenizer)}
        if isinstance(stage, Task):
            return TaskStage(student, stage, **options)
        assert self.pair.teacher is not None
        teacher = self.pair.teacher.config
        if isinstance(stage, Features):
            layers, matched = self.layers(stage, "stages.features")
            return FeatureStage(student, stage, task, layers, matched, teacher.hidden_size, **options)
        if isinstance(stage, Attention):
            layers, matched = self.layers(stage, "stages.attention")
            if stage.mode == "relations":
                return RelationStage(student, stage, task, layers, matched, teacher, **options)
            return AttentionStage(student, stage, task, layers, matched, self.heads(stage, matched), **options)
        raise TypeError(f"{stage} is no stage")

    def layers(self, stage: Aligned, field: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The student's layers of a stage, and the teacher's they are compared with."""
        assert self.pair.teacher is not None
        depth, teacher_depth = (m.config.num_hidden_layers for m in (self.pair.student, self.pair.teacher))
        layers, matched = compared_layers(stage, field, depth, teacher_depth)
        if stage.teacher_layers != "cka":
            return layers, matched
        known = self.store.read_layers()
        if field not in known:
            similarity = layer_similarity(self._hidden(layers, teacher_depth, stage.calibration_batches))
            matched = search_layers(similarity, layers)
            known[field] = {
                "student": list(layers),
                "teacher": list(matched),
                "cka": [[round(float(value), 4) for value in row] for row in similarity],
            }
            if self.first:
                self.store.write_layers(known)
        return layers, tuple(known[field]["teacher"])

    def heads(self, stage: Attention, layers: tuple[int, ...]) -> list[LayerHeads]:
        """The screened teacher heads."""
        if self.store.heads.is_file():
            return read_heads(self.store.heads)
        unique = tuple(sorted(set(layers)))
        measured = (
            (batch.documents, dict(zip(unique, self.teacher(batch, Wants(attention=unique)).attention, strict=True)))
            for batch in map(self.batches.batch, range(stage.calibration_batches))
        )
        heads = screen_heads(measured, unique, stage.keep_heads, stage.prefer)
        if self.first:
            write_heads(self.store.heads, heads)
        return heads

    @torch.no_grad()
    def _hidden(
        self, layers: tuple[int, ...], teacher_depth: int, count: int
    ) -> Iterator[tuple[Signal, Signal, Tensor]]:
        """Hidden states of the student's layers and of all the teacher's, on the first training batches."""
        student = self.pair.student
        training = student.training
        student.eval()
        for batch in map(self.batches.batch, range(count)):
            ours = read_signal(student, batch, Wants(hidden=layers))
            yield ours, self.teacher(batch, Wants(hidden=tuple(range(teacher_depth)))), batch.mask
        student.train(training)
