"""Which teacher heads are worth imitating: screened by the entropy of their attention, on calibration rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from orin_kit.distill.attention import BLOCK, attention_scores, visible
from orin_kit.distill.record import Projections
from orin_kit.errors import UserError

PICTURES = ("svg", "png", "pdf")


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


@torch.no_grad()
def head_entropy(projections: Projections, documents: Tensor, block: int = BLOCK) -> tuple[Tensor, int]:
    """Sum over real queries of each head's entropy, as a share of the most that the query's visible keys allow.

    Args:
        projections: of one layer.
        documents: int64 `[batch, length]`, number of the packed document each token belongs to, -1 for padding.
        block: queries at a time; maps of `block x length` live at once.

    Returns:
        fp64 `[heads]`, and how many queries were counted; a query that sees one key only says nothing and is skipped.
    """
    sums = torch.zeros(projections.query.shape[1], dtype=torch.float64, device=documents.device)
    queries = 0
    for i, query in enumerate(torch.split(projections.query, block, 2)):
        start = i * block
        stop = start + query.shape[2]
        seen = visible(documents[:, :stop], start, stop)
        p = attention_scores(query, projections.key[:, :, :stop], projections.scaling, seen).softmax(-1)
        entropy = -torch.xlogy(p, p).sum(-1).double()  # [batch, heads, queries]
        keys = seen.sum(-1)
        share = entropy / keys.clamp(min=2).double().log()
        sums += torch.where(keys > 1, share, 0.0).sum((0, 2))
        queries += int((keys > 1).sum())
    return sums, queries


def screen_heads(
    measured: Iterable[tuple[Tensor, Mapping[int, Projections]]], layers: Sequence[int], keep: float, prefer: str
) -> list[LayerHeads]:
    """Measure the heads of teacher layers and keep a share of each layer's.

    Args:
        measured: calibration batches: `documents` (see `head_entropy`) and the projections of each layer.
        layers: of the teacher, from 0; a layer named twice is measured once.
        keep: the share of heads to keep, rounded up to whole heads.
        prefer: "focused" keeps the lowest entropies, "diffuse" the highest.
    """
    unique = sorted(set(layers))
    sums: dict[int, Tensor | float] = dict.fromkeys(unique, 0.0)
    queries = 0
    for documents, projections in measured:
        count = 0
        for layer in unique:
            entropy, count = head_entropy(projections[layer], documents)
            sums[layer] = sums[layer] + entropy.cpu()
        queries += count
    means = {layer: (torch.as_tensor(total) / max(queries, 1)).tolist() for layer, total in sums.items()}
    return [LayerHeads(layer, mean, keep_heads(mean, keep, prefer)) for layer, mean in means.items()]


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


def plot_heads(heads: Sequence[LayerHeads], path: Path) -> None:
    """A picture of `heads.json`: a row a layer, a square a head, darker the more focused, kept ones dotted.

    Args:
        heads: of one model, so of as many heads a layer.
        path: ends in .svg, .png or .pdf.

    Raises:
        UserError: it ends otherwise.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = path.suffix.lstrip(".").lower()
    if kind not in PICTURES:
        raise UserError(f"{path}: no picture is written as {path.suffix or 'a file without ending'}",
                        mend=f"end it in one of: {', '.join(PICTURES)}")  # fmt: skip
    rows = sorted(heads, key=lambda h: h.layer)
    count = max(len(h.entropy) for h in rows)
    figure = Figure(figsize=(1.8 + 0.28 * count, 1.5 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    # Twenty shades and squares as paths: an SVG without pictures inside, which any page can take in.
    squares = axes.pcolormesh([h.entropy for h in rows], cmap=mpl.colormaps["Blues_r"].resampled(20), vmin=0, vmax=1)
    kept = [(head + 0.5, row + 0.5) for row, h in enumerate(rows) for head in h.kept]
    axes.scatter([x for x, _ in kept], [y for _, y in kept], s=22, color="#e08a1e", edgecolors="white", linewidths=0.6)
    axes.set_title(f"Entropy of attention ({len(kept)} of {len(rows) * count} heads kept, dotted)", loc="left")
    axes.set(xlabel="head", ylabel="layer")
    every = 1 if count < 16 else 4
    axes.set_xticks([head + 0.5 for head in range(0, count, every)], [str(head) for head in range(0, count, every)])
    axes.set_yticks([row + 0.5 for row in range(len(rows))], [str(h.layer) for h in rows])
    axes.invert_yaxis()
    figure.colorbar(squares, ax=axes, label="0: one key, 1: all alike")
    fresh = path.with_suffix(".new")
    figure.savefig(fresh, format=kind, dpi=150)
    fresh.replace(path)
