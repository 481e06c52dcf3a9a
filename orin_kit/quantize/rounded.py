"""A plain checkpoint read as if its linears had been rounded to INT4: for an export that needs no calibration."""

from __future__ import annotations

import math
from pathlib import Path

from orin_kit.errors import UserError
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.format import Packing
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import HEAD
from orin_kit.quantize.int4 import check_group_size, quantize_groups


class RoundedCheckpoint(Checkpoint):
    """See `Checkpoint`. Each linear, the head among them, is rounded to nearest when it is read; nothing is written.

    Args:
        directory: a plain checkpoint.
        group_size: input features that share a scale.

    Raises:
        UserError: the checkpoint is quantized already, or groups of this size do not fit it; on reading, weights that
            are NaN or infinite.
    """

    def __init__(self, directory: str | Path, group_size: int) -> None:
        super().__init__(directory)
        if self.scheme is not None:
            raise UserError(f"{directory} is quantized already", mend="export it as it is")
        self.group_size = group_size
        spec = self.spec
        shapes = {
            f"model.layers.{layer}.{name}": shape
            for layer in range(spec.num_hidden_layers)
            for name, shape in spec.linear_shapes().items()
        }
        self._linears = shapes | {HEAD: (spec.vocab_size, spec.hidden_size)}
        common = math.gcd(*(in_features for _, in_features in self._linears.values()))
        for name, (_, in_features) in self._linears.items():
            check_group_size(name, in_features, group_size, common=common)

    @property
    def is_quantized(self) -> bool:
        return True

    def is_packed(self, linear: str) -> bool:
        return linear in self._linears

    def packing(self, linear: str) -> Packing | None:
        return Packing(self._linears[linear], 4, self.group_size) if self.is_packed(linear) else None

    def packed(self, linear: str) -> PackedWeight:
        weight = self.tensor(f"{linear}.weight")
        return quantize_groups(weight, self.group_size, name=linear)
