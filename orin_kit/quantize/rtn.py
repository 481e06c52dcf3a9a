"""Round to nearest: every weight by itself, no calibration; the baseline, and the way for models that hardly fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from orin_kit.quantize.checkpoint import Checkpoint, Quantized, Section
from orin_kit.quantize.compressed import packed_tensors
from orin_kit.quantize.int4 import dequantize, quantize_groups

SAMPLED_ROWS = 1024  # of each weight, for the reported loss


def rtn(checkpoint: Checkpoint, cut: Sequence[Section], group_size: int) -> Iterator[Quantized]:
    """Quantize section by section, in memory for the largest section's INT4 weights only.

    Raises:
        UserError: a weight is NaN or infinite.
        ArtifactError: a tensor is missing or of another shape.
    """
    for section in cut:
        tensors = {name: checkpoint.tensor(name) for name in section.plain}
        lost = total = 0.0
        for name in section.linears:
            weight = checkpoint.tensor(f"{name}.weight")
            q, scales = quantize_groups(weight, group_size, name=name)
            tensors |= packed_tensors(name, q, scales)
            rows = slice(None, None, max(1, len(weight) // SAMPLED_ROWS))
            sampled: NDArray[np.float32] = np.asarray(weight[rows], np.float32)
            lost += float(np.square(dequantize(q[rows], scales[rows], group_size) - sampled).sum())
            total += float(np.square(sampled).sum())
        yield Quantized(section.name, tensors, lost / total if total else None)
