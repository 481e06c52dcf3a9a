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
    """The teacher's weight, moved by what is measured on held-out data.

    While the held-out loss still falls, the student learns what carries over, and the data may speak more; once it
    rises, the student learns its training set by heart, and the teacher's soft targets get more weight again.

    Attributes:
        weight: the teacher's share of the task loss; the data's is `1 - weight`.
        best: the lowest held-out loss so far, in nats a token.
    """

    rules: TeacherWeight
    weight: float
    best: float = math.inf

    @classmethod
    def begin(cls, rules: TeacherWeight) -> Elastic:
        return cls(rules, rules.start)

    def due(self, step: int) -> bool:
        """Whether a measurement follows `step` (from 0)."""
        return self.rules.every > 0 and (step + 1) % self.rules.every == 0

    def measured(self, held_out_loss: float) -> None:
        move = -self.rules.move if held_out_loss < self.best else self.rules.move
        self.weight = min(self.rules.high, max(self.rules.low, self.weight + move))
        self.best = min(self.best, held_out_loss)
