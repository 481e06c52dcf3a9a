"""An exponential moving average of what is trained: steadier than the last step's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Averages of parameters, updated after every step.

    Args:
        parameters: the trained ones; of a sharded model each process averages its own shards.
        decay: share of the average that stays at each step. After n steps at most `(1 + n) / (10 + n)`, so that it does
            not remember its random beginning (as tf.train.ExponentialMovingAverage).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.averages: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(self.averages, [p.detach() for p in self.parameters], self.steps)

    @torch.no_grad()
    def put(self) -> None:
        """Make the averages the weights."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)
