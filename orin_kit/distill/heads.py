"""Which teacher heads are worth imitating: screened by the entropy of their attention, on calibration batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from orin_kit.distill.losses import causal_mask
from orin_kit.distill.signals import Teacher, TensorBatch, Wants


@dataclass(frozen=True)
class LayerHeads:
    """One teacher layer's heads.

    Attributes:
        layer: from 0.
        entropy: of each head, 0 (each query looks at one key) to 1 (at all it may see, alike).
        kept: the heads that are imitated, in rising order.
    """

    layer: int
    entropy: list[float]
    kept: list[int]


def head_entropy(maps: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Sum over real queries of each head's entropy, as a share of the most that the query's visible keys allow.

    Args:
        maps: `[batch, heads, length, length]`, rows are distributions over keys.
        mask: bool `[batch, length]`, true for real tokens.

    Returns:
        fp64 `[heads]`, and how many queries were counted; a query that sees one key only says nothing and is skipped.
    """
    valid = causal_mask(mask)
    visible = valid.sum(-1)  # [batch, 1, length]
    counted = visible > 1
    p = torch.where(valid, maps.double(), 0.0)
    entropy = -torch.xlogy(p, p).sum(-1) / visible.clamp(min=2).double().log()
    return torch.where(counted, entropy, 0.0).sum((0, 2)), int(counted.sum())


def screen_heads(
    teacher: Teacher, batches: Iterable[TensorBatch], layers: Sequence[int], keep: float, prefer: str
) -> list[LayerHeads]:
    """Measure the heads of teacher layers and keep a share of each layer's.

    Args:
        teacher: gives the attention maps.
        batches: calibration rows.
        layers: of the teacher, from 0; a layer named twice is measured once.
        keep: the share of heads to keep, rounded up to whole heads.
        prefer: "focused" keeps the lowest entropies, "diffuse" the highest.
    """
    unique = tuple(sorted(set(layers)))
    sums: list[Tensor | float] = [0.0] * len(unique)
    queries = 0
    for batch in batches:
        signal = teacher(batch, Wants(attention=unique))
        for i, maps in enumerate(signal.attention):
            entropy, count = head_entropy(maps, batch.mask)
            sums[i] = sums[i] + entropy.cpu()
        queries += count
    means = [(torch.as_tensor(total) / max(queries, 1)).tolist() for total in sums]
    return [LayerHeads(layer, mean, keep_heads(mean, keep, prefer)) for layer, mean in zip(unique, means, strict=True)]


def keep_heads(entropy: Sequence[float], keep: float, prefer: str) -> list[int]:
    """The share `keep` of the heads, at least one; ties go to the lower head."""
    sign = 1 if prefer == "focused" else -1
    ranked = sorted(range(len(entropy)), key=lambda head: (sign * entropy[head], head))
    return sorted(ranked[: max(1, math.ceil(keep * len(entropy) - 1e-9))])


def write_heads(path: Path, heads: Sequence[LayerHeads]) -> None:
    """`heads.json`: for each layer the entropy of every head and which are kept."""
    rows = [{**asdict(h), "entropy": [round(e, 6) for e in h.entropy]} for h in heads]
    text = ",\n ".join(json.dumps(row) for row in rows)
    fresh = path.with_suffix(".new")
    fresh.write_text(f"[{text}]\n", "utf-8")
    fresh.replace(path)


def read_heads(path: Path) -> list[LayerHeads]:
    return [LayerHeads(**row) for row in json.loads(path.read_text("utf-8"))]
