"""What changes while training: the learning rate, the temperature, and the teacher's share of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orin_kit.distill.recipe import Rate, TeacherWeight, Temperature


def learning_rate(rate: Rate, step: int, steps: int) -> float:
    """The rate for `step` (from 0) of `steps`: linear warm-up, constant, then linear or cosine decay towards zero."""
    warmup, decay = round(rate.warmup * steps), round(rate.decay * steps)
    rising = min(1.0, (step + 1) / (warmup + 1))
    left = min(1.0, (steps - step) / (decay + 1))
    falling = left if rate.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return rate.learning_rate * min(rising, falling)


def temperature(schedule: Temperature, step: int) -> float:
    """`start x factor` once every `every` steps, never below `floor`."""
    return max(schedule.floor, schedule.start * schedule.factor ** (step // schedule.every))


@dataclass
class Elastic:
    """The teacher's weight, moved by what is measured while training.

    Where there is a general set, by forgetting: how much the loss on it has risen above what it was before training, as
    a share. Beyond the tolerance the teacher, who has not forgotten, gets more weight; else the data may speak more.
    Without one, by the held-out loss of the data itself: while it falls, the student learns what carries over; once it
    rises, the student learns its training set by heart, and the teacher's soft targets get more weight again.

    Attributes:
        weight: the teacher's share of the task loss; the data's is `1 - weight`.
        best: the lowest held-out loss so far, in nats a token.
        baseline: the loss on the general set before training, in nats a token; None without such a set.
        tolerance: the forgetting that is borne.
    """

    rules: TeacherWeight
    weight: float
    best: float = math.inf
    baseline: float | None = None
    tolerance: float = 0.0

    @classmethod
    def begin(cls, rules: TeacherWeight, tolerance: float = 0.0) -> Elastic:
        return cls(rules, rules.start, tolerance=tolerance)

    def due(self, step: int) -> bool:
        """Whether a measurement follows `step` (from 0)."""
        return self.rules.every > 0 and (step + 1) % self.rules.every == 0

    def measured(self, held_out_loss: float, general_loss: float | None = None) -> float | None:
        """Move the weight; returns the forgetting, where it was measured."""
        forgotten = None if general_loss is None else self.forgetting(general_loss)
        to_teacher = held_out_loss >= self.best if forgotten is None else forgotten > self.tolerance
        move = self.rules.move if to_teacher else -self.rules.move
        self.weight = min(self.rules.high, max(self.rules.low, self.weight + move))
        self.best = min(self.best, held_out_loss)
        return forgotten

    def forgetting(self, general_loss: float) -> float:
        """How far the general loss has risen above its baseline, as a share; below 0 when it has fallen."""
        assert self.baseline is not None
        return general_loss / self.baseline - 1.0

    def state(self) -> list[float | None]:
        return [self.weight, self.best, self.baseline]

    def restore(self, state: list[float | None]) -> None:
        weight, best, self.baseline = state
        assert weight is not None
        assert best is not None
        self.weight, self.best = weight, best
