"""The train loop: one for all stages, on whatever accelerate finds, resumed to the bit after a kill."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from torch import nn

from orin_kit.data.packing import Example, cut
from orin_kit.distill.accelerate_setup import make_accelerator
from orin_kit.distill.accuracy import held_out_loss
from orin_kit.distill.checkpoint import CheckpointStore
from orin_kit.distill.dataset import Batches, Dataset, in_batches, to_tensors
from orin_kit.distill.ema import Ema
from orin_kit.distill.log import TrainLog
from orin_kit.distill.on_policy import sample_replies
from orin_kit.distill.optimizers import make_optimizers, set_learning_rate
from orin_kit.distill.pair import Pair
from orin_kit.distill.recipe import Recipe, Stage, Task
from orin_kit.distill.schedule import Elastic, learning_rate, temperature
from orin_kit.distill.sharding import gathered, local, scattered
from orin_kit.distill.signals import LiveTeacher, Signal, Teacher, TensorBatch
from orin_kit.distill.stage_setup import StageBuilder
from orin_kit.distill.stages import Knobs, StageModule
from orin_kit.errors import TrainingDivergedError, UserError

PARTS = ("loss", "alignment", "ce", "kd")  # of a loss, in the order in which processes add them up
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

    Every micro-batch has a number of its own over the whole run and all processes. That number picks its rows and seeds
    the random generator, so a checkpoint holds weights, optimizers and the schedules' state, a resumed run computes the
    numbers of an undisturbed one, and two processes do what one does with twice the accumulation.
    """

    def __init__(self, recipe: Recipe, pair: Pair, data: Dataset, store: CheckpointStore) -> None:
        self.recipe, self.pair, self.data, self.store = recipe, pair, data, store
        self.accelerator = make_accelerator(recipe.precision)
        device = self.accelerator.device
        general = recipe.data.general
        rehearsed = data.general.rehearsed if data.general else []
        self.teacher = open_teacher(recipe, pair, [*data.train, *rehearsed], device)
        self.batches = Batches(data, recipe.batch_size, recipe.seed, device, general.rehearsal if general else 0.0)
        self.elastic = Elastic.begin(recipe.stages.task.teacher_weight, general.tolerance if general else 0.0)
        self.builder = StageBuilder(recipe, pair, self.teacher, self.batches, store, first=self._first)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP

    def train(self, *, overwrite: bool = False, advance: Advance = lambda *_: None) -> float:
        """Run all stages, from a checkpoint when there is one; returns the seconds it took, before a kill and after.

        Raises:
            TrainingDivergedError: the loss or its gradient is not finite.
            UserError: the checkpoint is another run's, or a stage does not fit the models.
        """
        saved = self._open(overwrite)
        position = Position(**saved["position"]) if saved else Position()
        self.pair.student.to(self.accelerator.device)
        if saved:
            self.elastic.restore(saved["elastic"])
        elif self.data.general:
            with self.accelerator.autocast():
                self.elastic.baseline = held_out_loss(
                    self.pair.student, self.data.general.watched, self.recipe.batch_size
                )
        self.log = TrainLog(self.store.log, self.store.events, position.done) if self._first else None
        for index, (name, stage) in enumerate(self.recipe.running_stages()):
            if index < position.stage:
                continue  # its student is in the checkpoint
            if not saved:
                position.stage, position.step = index, 0
            module = self._run_stage(name, stage, position, saved, advance)
            saved = None
            module.finish()
        if self.log:
            self.log.close()
        return position.seconds

    def _run_stage(
        self, name: str, stage: Stage, position: Position, saved: dict[str, Any] | None, advance: Advance
    ) -> StageModule:
        """Train through one stage, from `saved` where it was cut off; returns its module, not yet finished."""
        run = _StageRun(self, name, stage, position.stage, saved)
        since = time.perf_counter()
        for step in range(position.step, stage.steps):
            rate, knobs = learning_rate(stage, step, stage.steps), self._knobs(stage, step)
            set_learning_rate(run.optimizers, rate / stage.learning_rate)
            parts = self._gradients(run.wrapped, run.module, knobs, position.done)
            norm = self.accelerator.clip_grad_norm_(run.trained, self.recipe.clip)
            norm = float(gathered(norm))
            self._check_finite(name, step, parts["loss"], norm)
            run.apply()
            position.step, position.done = step + 1, position.done + 1
            line = {"learning_rate": rate, "grad_norm": norm, **vars(knobs), **parts}
            if isinstance(stage, Task) and self.elastic.due(step):
                line |= self._measured(run.wrapped)
            advance(name, position.done, line["loss"])
            last = position.step == stage.steps
            if step == 0 or last or position.step % self.recipe.log_every == 0 or "held_out_loss" in line:
                seconds = position.seconds + time.perf_counter() - since
                self._log({"stage": name, "step": position.step, "done": position.done, "seconds": seconds, **line})
            if last or position.done % self.recipe.checkpoint_every == 0:
                now = time.perf_counter()
                position.seconds, since = position.seconds + now - since, now
                if not all(bool(local(p.detach()).isfinite().all()) for p in run.trained):
                    self._diverged(name, step, line["loss"], norm)
                self._save(run, position)
        return run.close()

    def _gradients(self, wrapped: nn.Module, module: StageModule, knobs: Knobs, done: int) -> dict[str, float]:
        """Accumulate one step's gradients; returns its losses.

        A loss is a mean over tokens, so each micro-batch counts by its share of the step's asked tokens, over all
        processes: long answers and short ones weigh the same a token, however they were batched.
        """
        world, count = self.accelerator.num_processes, self.recipe.accumulation
        numbers = [(done * count + micro) * world + self.accelerator.process_index for micro in range(count)]
        work = [self._micro_batch(module, number, knobs) for number in numbers]
        asked = torch.tensor([float(batch.labels.numel()) for batch, _ in work], device=self.accelerator.device)
        shares = asked / self.accelerator.reduce(asked.sum(), "sum").clamp(min=1.0)
        sums = torch.zeros(2, len(PARTS), device=self.accelerator.device)  # values, and the shares that have them
        for index, (number, (batch, own)) in enumerate(zip(numbers, work, strict=True)):
            self._seed(number)
            signal = self.teacher(batch, module.teacher_wants) if module.teacher_wants else Signal()
            synced = index + 1 == count
            with self.accelerator.no_sync(wrapped) if not synced else nullcontext():
                with self.accelerator.autocast():  # FSDP's wrapper has none
                    parts = wrapped(batch, signal, own)
                # Processes' gradients are averaged, not summed.
                self.accelerator.backward(parts["loss"] * (shares[index] * world))
            for name, value in parts.items():
                sums[0, PARTS.index(name)] += value.detach() * shares[index]
                sums[1, PARTS.index(name)] += shares[index]
        values, weights = self.accelerator.reduce(sums, "sum").tolist()
        found = zip(PARTS, values, weights, strict=True)
        # A batch of the student's own has a kd where one of the data may have none: a mean of those that have it.
        return {name: value / (weight or 1.0) for name, value, weight in found if weight or name == "loss"}

    def _micro_batch(self, module: StageModule, number: int, knobs: Knobs) -> tuple[TensorBatch, Knobs]:
        """Micro-batch `number` of the run, and its knobs: of the data, or what the student itself says."""
        rules = module.task.on_policy if module.on_policy else None
        if rules is None or random.Random(f"{self.recipe.seed}-{number}").random() >= rules.share:
            return self.batches.batch(number), knobs
        self._seed(-number - 1_000_000_007)  # not what its dropout is seeded with
        with self.accelerator.autocast():
            prompts, stops = self.batches.questions(number), self.pair.tokenizer.stop_ids
            rows = sample_replies(self.pair.student, prompts, stops, rules)
        rows = list(cut(rows, self.recipe.data.row_length))
        return to_tensors(rows, self.accelerator.device), Knobs(knobs.temperature, 1.0)

    def _measured(self, wrapped: nn.Module) -> dict[str, float]:
        """The held-out loss, and the forgetting where there is a general set; moves the elastic weight."""
        found = {"held_out_loss": self._loss_on(wrapped, self.data.watched)}
        if self.data.general:
            found["general_loss"] = self._loss_on(wrapped, self.data.general.watched)
        forgotten = self.elastic.measured(found["held_out_loss"], found.get("general_loss"))
        return found if forgotten is None else {**found, "forgetting": forgotten}

    @torch.no_grad()
    def _loss_on(self, wrapped: nn.Module, rows: Sequence[Example]) -> float:
        """As `held_out_loss`, through the wrapped module: a sharded student is whole only inside of that."""
        wrapped.eval()
        total = count = 0.0
        for batch in in_batches(rows, self.recipe.batch_size, self.accelerator.device):
            with self.accelerator.autocast():
                ce = wrapped(batch, Signal(), Knobs(1.0, 0.0), measure=True)["ce"]
            total += float(ce) * batch.labels.numel()
            count += batch.labels.numel()
        wrapped.train()
        return total / max(count, 1)

    def _knobs(self, stage: Stage, step: int) -> Knobs:
        schedule = self.recipe.stages.task.temperature
        cooled = temperature(schedule, step) if isinstance(stage, Task) else schedule.start
        return Knobs(cooled, self.elastic.weight)

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

    def _seed(self, number: int) -> None:
        """Seed the random generator: for a micro-batch, or (below 0) for something that is none."""
        torch.manual_seed((self.recipe.seed * 1_000_003 + number) % 2**63)

    @property
    def _first(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _open(self, overwrite: bool) -> dict[str, Any] | None:
        """The checkpoint, if there is one; the first process clears away what is of no use before the others look."""
        saved = self.store.open(overwrite=overwrite) if self._first else None
        self.accelerator.wait_for_everyone()
        saved = saved if self._first else self.store.read()
        processes = self.accelerator.num_processes
        if saved and saved["processes"] != processes:
            what = f"{self.store.directory} is of a run in {saved['processes']} processes, this one has {processes}"
            raise UserError(what, mend="start as many: the batches of a step are theirs together")
        return saved

    def _log(self, line: dict[str, Any]) -> None:
        if self.log:
            self.log.write(line)

    def _save(self, run: _StageRun, position: Position) -> None:
        state = {
            "position": vars(position),
            **run.state(),
            "elastic": self.elastic.state(),
            "processes": self.accelerator.num_processes,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        if self._first:
            self.store.save(state)


class _StageRun:
    """One stage under way: its module as built and as accelerate wrapped it, optimizers, average."""

    def __init__(self, trainer: Trainer, name: str, stage: Stage, index: int, saved: dict[str, Any] | None) -> None:
        self.trainer, self.stage, self.index = trainer, stage, index
        accelerator, recipe = trainer.accelerator, trainer.recipe
        self.module = self._build()
        if saved:
            self.module.load_state_dict(saved["module"])
        if recipe.activation_checkpointing:
            # Without the student's training mode nothing is computed again: sampling and scoring are as fast as ever.
            trainer.pair.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made = make_optimizers(self.module, stage, recipe)
        self.wrapped, *self.prepared = accelerator.prepare(self.module, *made)
        self.optimizers: list[torch.optim.Optimizer] = [p.optimizer for p in self.prepared]
        self.trained = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.ema = Ema(self.trained, recipe.ema) if recipe.ema else None
        if saved:
            self._load(saved)
        self.wrapped.train()

    def _build(self) -> StageModule:
        self.trainer._seed(-1 - self.index)
        return self.trainer.builder.build(self.stage).to(self.trainer.accelerator.device)

    def _load(self, saved: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            pieces = {i: scattered(of, parameters[i]) for i, of in state["state"].items()}
            optimizer.load_state_dict({**state, "state": pieces})
        if self.ema and saved["ema"]:
            self.ema.steps, averages = saved["ema"]
            self.ema.averages = [scattered(a, p).to(p.device) for a, p in zip(averages, self.trained, strict=True)]
        scaler = self.trainer.accelerator.scaler
        if scaler and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])

    def apply(self) -> None:
        """Let the optimizers step on the gradients; with fp16 an overflow skips the step of all of them."""
        scaler = self.trainer.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0
        for optimizer in self.optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler:
            scaler.update()  # once: by accelerate's own step each optimizer would
        if self.ema and (not scaler or scaler.get_scale() >= scale):
            self.ema.update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this stage, whole. All processes must call it."""
        keep = self.trainer._first
        return {
            "module": gathered(self.module.state_dict(), keep=keep),
            "optimizers": [gathered(optimizer.state_dict(), keep=keep) for optimizer in self.optimizers],
            "ema": [self.ema.steps, gathered(self.ema.averages, keep=keep)] if self.ema else None,
        }

    def close(self) -> StageModule:
        """The trained module, whole, unwrapped, with the averages as weights where they were asked for."""
        if self.ema:
            self.ema.put()
        trainer = self.trainer
        whole = gathered(self.module.state_dict()) if trainer.sharded else None
        trainer.accelerator.free_memory()
        if whole is not None:  # sharded in place: another one is built, whole
            trainer.pair.student = type(trainer.pair.student)(trainer.pair.student.config)
            self.module = self._build()
            self.module.load_state_dict(whole)
        if trainer.recipe.activation_checkpointing:
            trainer.pair.student.gradient_checkpointing_disable()
        return self.module


def open_teacher(recipe: Recipe, pair: Pair, rows: Iterable[Example], device: torch.device) -> Teacher:
    """The teacher as the recipe has it: its stored logits, or the model itself, which moves only where it is asked."""
    if pair.teacher is None:
        from orin_kit.distill.teacher_logits import StoredTeacher

        tokenizer, schedule = pair.tokenizer_directory, recipe.stages.task.temperature
        assert recipe.teacher_logits is not None
        stored = StoredTeacher(recipe.teacher_logits, tokenizer=tokenizer, temperature=schedule)
        stored.check(rows)
        return stored
    return LiveTeacher(pair.teacher.to(device) if recipe.asks_teacher else pair.teacher)
