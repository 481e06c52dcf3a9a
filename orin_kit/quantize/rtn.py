"""Round to nearest: every weight by itself, no calibration; the baseline, and the way for models that hardly fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import EMBEDDING, HEAD
from orin_kit.quantize.compressed import packed_tensors
from orin_kit.quantize.int4 import quantize_groups
from orin_kit.quantize.sections import Quantized, Section

SAMPLED_ROWS = 1024  # of each weight, for the reported loss
TABLE_ROWS = 1 << 14  # dequantized at a time


def rtn(checkpoint: Checkpoint, cut: Sequence[Section]) -> Iterator[Quantized]:
    """Quantize section by section, in memory for the largest section's packed weights only.

    Raises:
        UserError: a weight is NaN or infinite.
        ArtifactError: a tensor is missing or of another shape.
    """
    for section in cut:
        if section.linears and f"{EMBEDDING}.weight" in section.plain:
            yield Quantized(section.name, shared_table(checkpoint, section))
            continue
        tensors = {name: checkpoint.tensor(name) for name in section.plain}
        lost = total = 0.0
        for name in section.linears:
            weight = checkpoint.tensor(f"{name}.weight")
            packed = round_to_nearest(weight, section.scheme, name)
            tensors |= packed_tensors(name, packed, symmetric=section.scheme.symmetric)
            rows = slice(None, None, max(1, len(weight) // SAMPLED_ROWS))
            sampled: NDArray[np.float32] = np.asarray(weight[rows], np.float32)
            lost += float(np.square(part(packed, rows).dense() - sampled).sum())
            total += float(np.square(sampled).sum())
        yield Quantized(section.name, tensors, lost / total if total else None)


def round_to_nearest(weight: NDArray[Any], scheme: WeightScheme, name: str) -> PackedWeight:
    """Quantize a weight as `quantize_groups` does without knowing its inputs."""
    assert scheme.group_size is not None
    return quantize_groups(weight, scheme.group_size, bits=scheme.bits, symmetric=scheme.symmetric, name=name)


def shared_table(checkpoint: Checkpoint, section: Section) -> dict[str, NDArray[Any]]:
    """Head and embedding of one quantized table: the packed head, and as fp16 embedding exactly what it stands for.

    The scales lose least of the table itself, which is what an embedding is read as.
    """
    packed = round_to_nearest(checkpoint.tensor(f"{HEAD}.weight"), section.scheme, HEAD)
    table = np.empty(packed.shape, np.float16)
    for first in range(0, len(table), TABLE_ROWS):
        rows = slice(first, first + TABLE_ROWS)
        table[rows] = part(packed, rows).dense()
    return {**packed_tensors(HEAD, packed, symmetric=section.scheme.symmetric), f"{EMBEDDING}.weight": table}


def part(weight: PackedWeight, rows: slice) -> PackedWeight:
    """Some output features of a weight."""
    zero_points = None if weight.zero_points is None else weight.zero_points[rows]
    return PackedWeight(weight.bits, weight.packed[rows], weight.scales[rows], zero_points, weight.order)
