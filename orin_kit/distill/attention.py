"""Losses on attention maps that are never held: they are made a block of queries at a time, and again going backward.

Scores, softmax and KL are in fp32 whatever autocast says. Projections may be bf16, but a score of 20 rounded to bf16 is
off by up to 0.06, and so is the log of its probability: more than the loss at the end of a distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orin_kit.distill.record import Projections
from orin_kit.errors import UserError

BLOCK = 128  # queries at a time: 28 heads over 2,048 keys are 29 MB a map


class HeadMixing(nn.Module):
    """Each imitated teacher head as a learned average of the student's heads.

    The weights are a softmax, so a mixture of attention rows is again a probability distribution. The student's side
    is mixed, not the teacher's: a learned mixture of targets could drift to the one easiest head, but here every
    imitated head has to be explained.
    """

    def __init__(self, student_heads: int, kept: Sequence[int], teacher_heads: int) -> None:
        super().__init__()
        start = torch.zeros(len(kept), student_heads)
        for row, head in enumerate(kept):  # leaning towards the head at the same relative place
            start[row, head * student_heads // teacher_heads] = 4.0
        self.scores = nn.Parameter(start)

    def forward(self, maps: Tensor) -> Tensor:
        """`[batch, student_heads, queries, keys]` to `[batch, kept, queries, keys]`."""
        return torch.einsum("kh,bhqs->bkqs", self.scores.to(maps.dtype).softmax(-1), maps)


def attention_loss(
    student: Projections,
    teacher: Projections,
    documents: Tensor,
    mixing: nn.Module,
    kept: Sequence[int],
    *,
    block: int = BLOCK,
) -> Tensor:
    """KL(teacher || student) of attention rows, averaged over the kept teacher heads and all real queries.

    Args:
        student: of the layer that learns.
        teacher: of the same rows; heads and widths may differ.
        documents: int64 `[batch, length]`, number of the packed document each token belongs to, -1 for padding.
        mixing: student maps `[batch, heads, queries, keys]` to `[batch, len(kept), queries, keys]`, rows staying
            distributions; see `HeadMixing`.
        kept: the teacher heads that are imitated.
        block: queries at a time; maps of `block x length` live at once, in the backward pass too.

    Returns:
        A scalar, fp32 (fp64 if the projections are); 0 where every token is padding.

    Source: MiniLM, arXiv:2002.10957, for the divergence.
    """
    group = teacher.query.shape[1] // teacher.key.shape[1]
    key = teacher.key[:, [head // group for head in kept]]
    target = Projections(teacher.query[:, list(kept)], key, key, teacher.scaling)

    def log_mixed(scores: Tensor) -> Tensor:
        maps: Tensor = mixing(scores.softmax(-1))
        return maps.clamp(min=torch.finfo(maps.dtype).tiny).log()

    return _mean_divergence(student, target, documents, log_mixed, block)


def relation_loss(
    student: Projections,
    teacher: Projections,
    documents: Tensor,
    *,
    relation_heads: int,
    kinds: Sequence[str] = ("query", "key", "value"),
    block: int = BLOCK,
) -> Tensor:
    """KL(teacher || student) of self-attention relations, averaged over kinds, relation heads and real queries.

    For each kind the heads are put side by side and cut anew into `relation_heads`; a relation is the softmax, over the
    visible positions, of the scaled dot products of such vectors with each other. So no head has to match another.

    Args:
        student: of the layer that learns.
        teacher: of the same rows; heads and widths may differ.
        documents: int64 `[batch, length]`, number of the packed document each token belongs to, -1 for padding.
        relation_heads: must divide every kind's width (heads x head_dim) in both models.
        kinds: of "query", "key", "value". The paper sums over all three, which is three times this mean.
        block: queries at a time.

    Raises:
        UserError: `relation_heads` does not divide the widths.

    Source: MiniLMv2, arXiv:2012.15828, section 3.1; causal, as decoders are.
    """
    _check_relation_heads((student, teacher), kinds, relation_heads)
    losses = []
    for kind in kinds:
        ours, theirs = (_relations(getattr(side, kind), relation_heads) for side in (student, teacher))
        losses.append(_mean_divergence(ours, theirs, documents, lambda scores: scores.log_softmax(-1), block))
    return torch.stack(losses).mean()


def visible(documents: Tensor, start: int, stop: int) -> Tensor:
    """Which keys queries `start` to `stop` may look at: real ones of the same document, not later than themselves.

    Args:
        documents: int64 `[batch, length]`, number of the packed document each token belongs to, -1 for padding.
        start: the first query.
        stop: behind the last one.

    Returns:
        bool `[batch, 1, stop - start, length]`; nothing in the rows of padding.
    """
    own = documents[:, start:stop, None]
    position = torch.arange(documents.shape[1], device=documents.device)
    earlier = position[start:stop, None] >= position
    return ((own == documents[:, None, :]) & (own >= 0) & earlier)[:, None]


def attention_scores(query: Tensor, key: Tensor, scaling: float, seen: Tensor) -> Tensor:
    """Scores whose softmax is attention.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`.
        scaling: what products are multiplied by.
        seen: bool `[batch, 1, queries, keys]`.

    Returns:
        `[batch, heads, queries, keys]`, fp32 or wider; the lowest finite number where not `seen`, whose softmax is 0
        and which leaves a row that sees nothing finite.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, queries, width = query.shape
    with torch.autocast(query.device.type, enabled=False):
        # A group's queries share a key: as rows of one matrix, so that keys need no copy for each head.
        grouped = query.to(dtype).reshape(batch, key.shape[1], -1, width) * scaling
        scores = (grouped @ key.to(dtype).transpose(2, 3)).view(batch, heads, queries, -1)
        return scores.masked_fill_(~seen, torch.finfo(dtype).min)


def _mean_divergence(
    student: Projections, teacher: Projections, documents: Tensor, log_rows: Callable[[Tensor], Tensor], block: int
) -> Tensor:
    """KL(teacher || student) a row, averaged over the teacher's heads and real queries.

    `log_rows` makes the student's scores the logs of the rows that are compared, of as many heads as the teacher has.
    """

    def divergence(ours: Tensor, keys: Tensor, theirs: Tensor, start: int) -> Tensor:
        stop = start + ours.shape[2]  # later keys are nobody's business here
        seen = visible(documents[:, :stop], start, stop)
        with torch.autocast(ours.device.type, enabled=False):
            target = attention_scores(theirs, teacher.key.detach()[:, :, :stop], teacher.scaling, seen).softmax(-1)
            log_q = log_rows(attention_scores(ours, keys[:, :, :stop], student.scaling, seen))
            rows = F.kl_div(log_q, target, reduction="none").sum(-1)
            return torch.where(documents[:, None, start:stop] >= 0, rows, 0.0).sum()

    queries = zip(torch.split(student.query, block, 2), torch.split(teacher.query.detach(), block, 2), strict=True)
    parts = [
        # Nothing in a block draws random numbers, so there is no state to keep for running it again.
        checkpoint(divergence, ours, student.key, theirs, i * block, use_reentrant=False, preserve_rng_state=False)
        # The last block first: it sees the most keys, and the memory that it gives back has room for all others.
        for i, (ours, theirs) in reversed(list(enumerate(queries)))
    ]
    total: Tensor = torch.stack(parts).sum()
    return total / (teacher.query.shape[1] * (documents >= 0).sum().clamp(min=1))


def _relations(heads: Tensor, count: int) -> Projections:
    """`[batch, heads, length, head_dim]` cut anew into `count` heads, as queries and keys of themselves."""
    batch, _, length, _ = heads.shape
    cut = heads.transpose(1, 2).reshape(batch, length, count, -1).transpose(1, 2)
    return Projections(cut, cut, cut, cut.shape[-1] ** -0.5)


def _check_relation_heads(sides: Sequence[Projections], kinds: Sequence[str], count: int) -> None:
    widths = [x.shape[1] * x.shape[3] for side in sides for x in (getattr(side, kind) for kind in kinds)]
    common = math.gcd(*widths)
    if count < 1 or common % count:
        what = f"relation_heads {count} does not divide the widths {', '.join(map(str, widths))}"
        divisors = (str(n) for n in range(1, common + 1) if common % n == 0)
        whose = f"(of {', '.join(kinds)}: first the student's, then the teacher's)"
        raise UserError(f"{what} {whose}", mend=f"choose one of {', '.join(divisors)}")
