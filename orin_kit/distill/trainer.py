"""The train loop: one for all stages, on whatever accelerate finds, resumed to the bit after a kill."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from orin_kit.distill.accuracy import held_out_loss
from orin_kit.distill.checkpoint import CheckpointStore
from orin_kit.distill.dataset import Batches, Dataset
from orin_kit.distill.heads import LayerHeads, read_heads, screen_heads, write_heads
from orin_kit.distill.optimizers import make_optimizers, set_learning_rate
from orin_kit.distill.pair import Pair
from orin_kit.distill.recipe import Attention, Features, Recipe, Stage, Task
from orin_kit.distill.schedule import Elastic, learning_rate, temperature
from orin_kit.distill.signals import LiveTeacher, Signal
from orin_kit.distill.stages import AttentionStage, FeatureStage, Knobs, StageModule, TaskStage, attention_layers
from orin_kit.errors import TrainingDivergedError, UserError

Advance = Callable[[str, int, float], None]  # stage, steps done over all stages, loss


@dataclass
class Position:
    """Where a run stands: `step` steps of stage number `stage` are done, `done` of all stages, in `seconds`."""

    stage: int = 0
    step: int = 0
    done: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains `pair.student` in place through the recipe's stages.

    Every step seeds the random generator with its own number and picks its batch by that number, so a checkpoint
    holds weights, optimizers and the schedules' state, and a resumed run computes the numbers of an undisturbed one.
    """

    def __init__(self, recipe: Recipe, pair: Pair, data: Dataset, store: CheckpointStore) -> None:
        self.recipe, self.pair, self.data, self.store = recipe, pair, data, store
        self.accelerator = make_accelerator(recipe.precision)
        device = self.accelerator.device
        self.teacher = LiveTeacher(pair.teacher.to(device))
        self.student = pair.student.to(device)
        self.batches = Batches(data.train, recipe.batch_size, recipe.seed, device)
        self.elastic = Elastic.begin(recipe.stages.task.teacher_weight)
        # A recipe whose teacher weight stays 0 never runs the teacher: the plain student of a comparison.
        weights = recipe.stages.task.teacher_weight
        self.with_teacher = weights.start > 0 or weights.every > 0

    def train(self, *, overwrite: bool = False, advance: Advance = lambda *_: None) -> float:
        """Run all stages, from a checkpoint when there is one; returns the seconds it took, before a kill and after.

        Raises:
            TrainingDivergedError: the loss or its gradient is not finite.
            UserError: the checkpoint is another run's, or a stage does not fit the models.
        """
        saved = self.store.open(overwrite=overwrite)
        position = Position(**saved["position"]) if saved else Position()
        if saved:
            self.elastic.weight, self.elastic.best = saved["elastic"]
        for index, (name, stage) in enumerate(self.recipe.running_stages()):
            if index < position.stage:
                continue  # its student is in the checkpoint
            torch.manual_seed(self._seed(-1 - index))
            module = self._module(stage)
            optimizers = make_optimizers(module, stage, self.recipe)
            if saved:
                module.load_state_dict(saved["module"])
                for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
                if self.accelerator.scaler:
                    self.accelerator.scaler.load_state_dict(saved["scaler"])
                saved = None
            else:
                position.stage, position.step = index, 0
            self._run_stage(name, stage, module, optimizers, position, advance)
            module.finish()
        return position.seconds

    def _run_stage(
        self,
        name: str,
        stage: Stage,
        module: StageModule,
        optimizers: list[torch.optim.Optimizer],
        position: Position,
        advance: Advance,
    ) -> None:
        wrapped, *prepared = self.accelerator.prepare(module, *optimizers)
        wrapped.train()
        trained = [p for p in module.parameters() if p.requires_grad]
        since = time.perf_counter()
        for step in range(position.step, stage.steps):
            rate, knobs = learning_rate(stage, step, stage.steps), self._knobs(stage, step)
            set_learning_rate(optimizers, rate / stage.learning_rate)
            torch.manual_seed(self._seed(position.done))
            parts = self._gradients(wrapped, module, knobs, position.done)
            norm = float(self.accelerator.clip_grad_norm_(trained, self.recipe.clip))
            self._check_finite(name, step, float(parts["loss"]), norm)
            for optimizer in prepared:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            position.step, position.done = step + 1, position.done + 1
            line = {"learning_rate": rate, "grad_norm": norm, **vars(knobs), **{k: float(v) for k, v in parts.items()}}
            if isinstance(stage, Task) and self.elastic.due(step):
                line["held_out_loss"] = self._held_out()
                self.elastic.measured(line["held_out_loss"])
            advance(name, position.done, line["loss"])
            last = position.step == stage.steps
            if step == 0 or last or position.step % self.recipe.log_every == 0 or "held_out_loss" in line:
                self._log({"stage": name, "step": position.step, **line})
            if last or position.done % self.recipe.checkpoint_every == 0:
                now = time.perf_counter()
                position.seconds, since = position.seconds + now - since, now
                if not all(bool(p.isfinite().all()) for p in trained):
                    self._diverged(name, step, line["loss"], norm)
                self._save(module, optimizers, position)
        self.accelerator.free_memory()

    def _gradients(self, wrapped: torch.nn.Module, module: StageModule, knobs: Knobs, done: int) -> dict[str, Tensor]:
        """Accumulate one step's gradients; the losses of all its batches, averaged."""
        count, sums = self.recipe.accumulation, dict[str, Tensor]()
        for micro in range(count):
            batch = self.batches.batch(done * count + micro)
            signal = self.teacher(batch, module.teacher_wants) if module.teacher_wants else Signal()
            parts = wrapped(batch, signal, knobs)
            self.accelerator.backward(parts["loss"] / count)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / count
        return sums

    def _check_finite(self, name: str, step: int, loss: float, norm: float) -> None:
        # With fp16 a gradient overflows now and then: the scaler skips that step and halves its scale.
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.scaler):
            self._diverged(name, step, loss, norm)

    def _diverged(self, name: str, step: int, loss: float, norm: float) -> NoReturn:
        saved = self.store.state.is_file()
        kept = f"the last good checkpoint is in {self.store.directory}" if saved else "there is no checkpoint yet"
        what = (
            f"stage {name}, step {step + 1}: the loss ({loss}), its gradient ({norm}) or a weight is not finite; {kept}"
        )
        mend = f"lower stages.{name}.learning_rate or use precision: fp32, then start with --overwrite"
        raise TrainingDivergedError(what, mend=mend)

    def _module(self, stage: Stage) -> StageModule:
        teacher = self.pair.teacher.config
        depth, options = teacher.num_hidden_layers, {"with_teacher": self.with_teacher}
        if isinstance(stage, Features):
            made: StageModule = FeatureStage(self.student, stage, depth, teacher.hidden_size, **options)
        elif isinstance(stage, Attention):
            made = AttentionStage(self.student, stage, self._heads(stage), depth, **options)
        else:
            assert isinstance(stage, Task)
            made = TaskStage(self.student, stage, stage.lora, **options)
        return made.to(self.accelerator.device)

    def _heads(self, stage: Attention) -> list[LayerHeads]:
        """The screened teacher heads, measured once a run on the first training rows."""
        if not self.store.heads.is_file():
            _, layers = attention_layers(self.student, stage, self.pair.teacher.config.num_hidden_layers)
            batches = (self.batches.batch(i) for i in range(stage.calibration_batches))
            write_heads(self.store.heads, screen_heads(self.teacher, batches, layers, stage.keep_heads, stage.prefer))
        return read_heads(self.store.heads)

    def _knobs(self, stage: Stage, step: int) -> Knobs:
        schedule = self.recipe.stages.task.temperature
        cooled = temperature(schedule, step) if isinstance(stage, Task) else schedule.start
        return Knobs(cooled, self.elastic.weight)

    def _held_out(self) -> float:
        with self.accelerator.autocast():
            return held_out_loss(self.student, self.data.watched, self.recipe.batch_size)

    def _seed(self, number: int) -> int:
        """A seed for the random generator: of one step, or (below 0) of a stage's beginning."""
        return int((self.recipe.seed * 1_000_003 + number) % 2**63)

    def _log(self, line: dict[str, Any]) -> None:
        with self.store.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, module: StageModule, optimizers: list[torch.optim.Optimizer], position: Position) -> None:
        self.store.save(
            {
                "position": vars(position),
                "module": module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "elastic": [self.elastic.weight, self.elastic.best],
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            }
        )


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's own choice of device, at the recipe's precision.

    Raises:
        UserError: fp16 without a GPU, or several processes (`accelerate launch`).
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 needs a GPU", mend="use bf16 or fp32 on a CPU")
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision))
    if accelerator.num_processes > 1:
        what = f"distill was started as {accelerator.num_processes} processes, but trains on one device"
        raise UserError(what, mend="start orin-kit distill without accelerate launch")
    return accelerator
