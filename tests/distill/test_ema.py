"""The average of weights against its recurrence, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from orin_kit.distill.ema import Ema


def test_recurrence_and_putting_it_in() -> None:
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    ema = Ema(parameters, decay=0.6)
    expected = [p.detach().double().numpy().copy() for p in parameters]
    for n in range(12):
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p))
        ema.update()
        decay = min(0.6, (1 + n) / (10 + n))
        expected = [
            decay * e + (1 - decay) * p.detach().double().numpy() for e, p in zip(expected, parameters, strict=True)
        ]
    ema.put()
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5, atol=1e-6)
