"""The task loss: cross-entropy and the teacher's next-token distribution, without ever holding all logits.

Logits of 2,048 positions over 152k tokens are 1.2 GB in fp32, and a plain loss keeps several such tensors until the
backward pass. Here the loss starts at the head's input instead. Positions are walked over in chunks: both models'
logits of a chunk, the loss, and at once its gradient, which goes through the head back to the hidden states before the
next chunk begins. What is kept for the backward pass has the shape of the parameters and of the hidden states. The idea
is Liger-Kernel's fused linear losses (arXiv:2410.10989).

Gradients of the logits are written out by hand (`DIVERGENCES`): each is one in-place pass over the chunk's own tensors,
where autograd would keep every intermediate of the chunk alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orin_kit.errors import UserError

CHUNK_BYTES = 64 * 2**20  # of a chunk's logits in fp32; five to eight such tensors live at once
EMPTY = -1e30  # stands for log 0: finite, so that a bucket which is empty on both sides counts 0 and not NaN


@dataclass(frozen=True)
class Dense:
    """Logits as the head's input and the head: `hidden @ weight.T + bias`, not yet multiplied.

    Attributes:
        hidden: `[positions, hidden_size]`.
        weight: `[vocab, hidden_size]`; may be tied to the embedding.
        bias: `[vocab]` or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def positions(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class TopK:
    """A teacher's logits as they are stored: its k likeliest tokens, and the mass of all others.

    Attributes:
        ids: int64 `[positions, k]`, distinct in a row.
        logits: `[positions, k]`, descending.
        tails: `[positions, len(temperatures)]`: log of the summed exp(logit / T) over every token that is not among the
            k, for each T of `temperatures`; -inf where there is none.
        temperatures: ascending.
    """

    ids: Tensor
    logits: Tensor
    tails: Tensor
    temperatures: tuple[float, ...]

    @property
    def positions(self) -> int:
        return self.ids.shape[0]

    def tail(self, temperature: float) -> Tensor:
        """`[positions]`: the tails at a temperature, between two recorded ones linear in 1/T.

        The tail is convex in 1/T, so the straight line lies above it.

        Raises:
            UserError: the temperature lies outside the recorded ones.
        """
        # Finite, and in fp32 or better: between two empty tails lies an empty one, and not inf times 0.
        tails = self.tails.to(torch.promote_types(self.tails.dtype, torch.float32)).clamp(min=EMPTY)
        recorded = self.temperatures
        for i, known in enumerate(recorded):
            if math.isclose(temperature, known, rel_tol=1e-6):
                return tails[:, i]
        if not recorded[0] < temperature < recorded[-1]:
            raise UserError(
                f"temperature {temperature:g} for teacher logits stored at {', '.join(f'{t:g}' for t in recorded)}",
                "store them again at temperatures that enclose the recipe's, or change the recipe's",
            )
        above = next(i for i, known in enumerate(recorded) if known > temperature)
        low, high = 1 / recorded[above], 1 / recorded[above - 1]
        return tails[:, above].lerp(tails[:, above - 1], (1 / temperature - low) / (high - low))


@dataclass(frozen=True)
class TaskLoss:
    """Scalars, means over positions in nats: the whole with its gradient, its two parts without.

    `kd` contains T^2 and is None where there was no teacher.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor | None


Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _forward_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    rows = log_p.sub_(log_q).mul_(p).sum(-1)
    return rows, log_q.exp_().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    ratio = log_q.sub_(log_p)
    rows = torch.mul(ratio, q, out=log_p).sum(-1)
    return rows, ratio.sub_(rows[:, None]).mul_(q)


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    if beta in (0.0, 1.0):
        return (_reverse_kl if beta else _forward_kl)(log_q, log_p, beta)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    q, p = log_q.exp(), log_p.exp()
    of_teacher = log_p.sub_(log_m).mul_(p).sum(-1)
    ratio = log_q.sub_(log_m)
    of_student = torch.mul(ratio, q, out=log_m).sum(-1)
    slope = ratio.sub_(of_student[:, None]).mul_(q).mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student, slope


DIVERGENCES: dict[str, Divergence] = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
"""(student's log-probabilities, teacher's, beta), both `[positions, outcomes]` and both used up ->
(divergence `[positions]`, its gradient with respect to what the student's softmax was taken of).

With p the teacher's and q the student's distribution: forward_kl is KL(p || q), reverse_kl is KL(q || p), jsd is
beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: the convention of GKD (arXiv:2306.13649) and of
TRL. Its formula goes to 0 at both ends, where its direction becomes that of the two KLs; as in TRL, beta 0 gives
forward_kl itself and beta 1 reverse_kl."""


@dataclass(frozen=True)
class _Objective:
    """What the sweep minimises; `shared` is the number of tokens that both distributions are taken over."""

    teacher_weight: float
    temperature: float
    divergence: Divergence
    beta: float
    chunk: int
    shared: int
    matmul_dtype: torch.dtype | None  # autocast's, read once: the backward pass runs outside of it


class _Gradients(NamedTuple):
    """Sums over positions, in fp32 or better: a gradient added up in bf16 over many chunks would lose its low bits."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Head:
    """A head and its input, in the dtype the multiplication runs in; logits come out in fp32, or fp64 where that is."""

    def __init__(self, dense: Dense, matmul_dtype: torch.dtype | None) -> None:
        exact = torch.promote_types(dense.hidden.dtype, dense.weight.dtype)
        dtype = matmul_dtype if matmul_dtype and exact != torch.float64 else exact
        self.hidden, self.weight = dense.hidden.detach().to(dtype), dense.weight.detach().to(dtype)
        self.dtype, self.accumulate = dtype, torch.promote_types(dtype, torch.float32)
        self.bias = None if dense.bias is None else dense.bias.detach().to(self.accumulate)

    def logits(self, rows: slice, vocab: int | None = None) -> Tensor:
        out = (self.hidden[rows] @ self.weight[:vocab].t()).to(self.accumulate)
        return out if self.bias is None else out.add_(self.bias[:vocab])


def task_loss(
    student: Dense,
    labels: Tensor,
    teacher: Dense | TopK | None,
    *,
    teacher_weight: float,
    temperature: float,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    chunk: int | None = None,
    vocab_size: int | None = None,
) -> TaskLoss:
    """(1 - teacher_weight) * cross-entropy + teacher_weight * divergence at temperature T * T^2, means over positions.

    Under autocast the head multiplies in its dtype, as `nn.Linear` would; softmax and sums are in fp32 (fp64 for fp64
    input). Gradients reach the student's hidden states, weight and bias, never the teacher.

    Args:
        student: logits to be learned; no position at all gives 0 with gradients of 0.
        labels: int64 `[positions]`, every one a real token.
        teacher: of the same positions. With None, or `teacher_weight` 0, the loss is cross-entropy alone.
            `Dense` may have a vocabulary padded to another size: the divergence is taken over the tokens both have.
            `TopK` is compared over k + 1 outcomes, the last being all other tokens, which is never more than the
            divergence over all of them (data processing). It must have been stored over the same tokens that are
            compared here: see `vocab_size`.
        teacher_weight: 0 to 1.
        temperature: above 1 softens both distributions. T^2 keeps the gradient's size (arXiv:1503.02531).
        divergence: one of `DIVERGENCES`.
        beta: 0 to 1, of `jsd` alone.
        chunk: positions at a time; None for logits of `CHUNK_BYTES`. It does not change the result.
        vocab_size: the tokenizer's, if the divergence is to leave out the rows that only pad the vocabulary.
            Cross-entropy is over the student's whole vocabulary in any case.

    Raises:
        UserError: an unknown divergence, a value out of range, a teacher that knows other positions, other tokens, or
            not this temperature.
    """
    if not teacher_weight:
        teacher = None
    sizes = (student.vocab, vocab_size, teacher.vocab if isinstance(teacher, Dense) else None)
    shared = min(size for size in sizes if size)
    if divergence not in DIVERGENCES:
        raise UserError(f"divergence {divergence!r} is not known", f"choose one of {', '.join(sorted(DIVERGENCES))}")
    device = student.hidden.device.type
    objective = _Objective(
        teacher_weight,
        temperature,
        DIVERGENCES[divergence],
        beta,
        chunk or _default_chunk(student.vocab),
        shared,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    _check(student, labels, teacher, objective)
    if torch.is_grad_enabled():
        loss, ce, kd = _TaskLossFunction.apply(  # type: ignore[no-untyped-call]
            student.hidden, student.weight, student.bias, labels, teacher, objective
        )
    else:
        loss, ce, kd, _ = _sweep(student, labels, teacher, objective, (False, False, False))
    return TaskLoss(loss, ce, kd if teacher else None)


@torch.no_grad()
def top_k(dense: Dense, k: int, temperatures: Sequence[float], chunk: int | None = None) -> TopK:
    """The k likeliest tokens of each position and the mass of the others, in chunks of positions.

    Args:
        dense: cut its weight (and bias) to the tokenizer's size first, so that rows which only pad the vocabulary are
            in neither the k nor the tail.
        k: at most the vocabulary.
        temperatures: at which the tails are recorded; `TopK.tail` interpolates between them.
        chunk: positions at a time; None for logits of `CHUNK_BYTES`.

    Raises:
        UserError: k or a temperature that cannot be.
    """
    if not 1 <= k <= dense.vocab:
        raise UserError(f"top-k of {k} tokens from a vocabulary of {dense.vocab}", "choose k between 1 and it")
    if not temperatures or min(temperatures) <= 0:
        raise UserError(f"temperatures {list(temperatures)} for stored logits", "name one or more above 0")
    ascending = tuple(sorted(set(temperatures)))
    head, parts = _Head(dense, None), []
    for rows in _chunks(dense.positions, chunk or _default_chunk(dense.vocab)):
        logits = head.logits(rows)
        values, ids = logits.topk(k, dim=-1)
        logits.scatter_(1, ids, -torch.inf)
        tails = torch.stack([(logits / temperature).logsumexp(-1) for temperature in ascending], dim=-1)
        parts.append((ids, values, tails))
    ids, values, tails = (torch.cat(part) for part in zip(*parts, strict=True))
    return TopK(ids, values, tails, ascending)


class _TaskLossFunction(torch.autograd.Function):
    """The sweep with its gradients made in the forward pass, so that the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: Dense | TopK | None,
        objective: _Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        loss, ce, kd, ctx.gradients = _sweep(Dense(hidden, weight, bias), labels, teacher, objective, wanted)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.teacher, ctx.objective = teacher, objective
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        # Scaling in place spends the gradients, so that a weight's is never there twice; a second backward pass
        # through a kept graph makes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            wanted = ctx.needs_input_grad[:3]
            gradients = _sweep(Dense(hidden, weight, bias), labels, ctx.teacher, ctx.objective, wanted)[-1]
        scale = grad_loss / max(labels.numel(), 1)
        scaled = (
            None if gradient is None else gradient.mul_(scale).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
        )
        return *scaled, None, None, None


def _sweep(
    student: Dense, labels: Tensor, teacher: Dense | TopK | None, objective: _Objective, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, _Gradients]:
    """Loss, cross-entropy and divergence as means, and the wanted gradients as sums over positions."""
    weight = objective.teacher_weight if teacher else 0.0
    head = _Head(student, objective.matmul_dtype)
    teach = _teacher_rows(teacher, objective)
    tensors = zip((student.hidden, student.weight, student.bias), wanted, strict=True)
    gradients = _Gradients(
        *(torch.zeros_like(t, dtype=head.accumulate) if t is not None and w else None for t, w in tensors)
    )
    ce, kd = torch.zeros(2, dtype=head.accumulate, device=student.hidden.device)
    with torch.autocast(student.hidden.device.type, enabled=False):
        for rows in _chunks(student.positions, objective.chunk):
            logits = head.logits(rows)
            ce_rows, slope = _cross_entropy(logits, labels[rows])
            ce += ce_rows.sum()
            slope.mul_(1 - weight)
            if teach:
                # Overwrites the logits; d/dlogit is 1/T of d/d(logit / T), and T^2 makes it T.
                kd_rows, kd_slope = teach(logits[:, : objective.shared].div_(objective.temperature), rows)
                kd += kd_rows.sum()
                slope[:, : objective.shared].add_(kd_slope, alpha=weight * objective.temperature)
                del kd_slope
            del logits
            _accumulate(gradients, head, slope, rows)
            del slope
    positions = max(student.positions, 1)
    ce, kd = ce / positions, kd / positions * objective.temperature**2
    return (1 - weight) * ce + weight * kd, ce, kd, gradients


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(`[positions]`, its gradient with respect to the logits)."""
    log_q = logits.log_softmax(-1)
    rows = -log_q.gather(1, labels[:, None])[:, 0]
    slope = log_q.exp_()
    return rows, slope.scatter_add_(1, labels[:, None], torch.full_like(slope[:, :1], -1.0))


def _teacher_rows(
    teacher: Dense | TopK | None, objective: _Objective
) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]] | None:
    """(the student's logits / T over the shared tokens, to be used up; rows) -> what `DIVERGENCES` gives."""
    if isinstance(teacher, Dense):
        head = _Head(teacher, objective.matmul_dtype)

        def dense(scaled: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            log_p = _log_softmax_(head.logits(rows, objective.shared).to(scaled.dtype).div_(objective.temperature))
            return objective.divergence(_log_softmax_(scaled), log_p, objective.beta)

        return dense
    if isinstance(teacher, TopK):
        tails = teacher.tail(objective.temperature)

        def stored(scaled: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            kept = teacher.logits[rows].to(scaled.dtype) / objective.temperature
            log_p = torch.cat([kept, tails[rows, None].to(scaled.dtype)], dim=-1).log_softmax(-1)
            return _against_buckets(scaled, teacher.ids[rows], log_p, objective)

        return stored
    return None


def _against_buckets(scaled: Tensor, ids: Tensor, log_p: Tensor, objective: _Objective) -> tuple[Tensor, Tensor]:
    """The divergence over k tokens and one bucket of the others; the bucket's gradient is shared out by probability."""
    kept = scaled.gather(1, ids)
    others = scaled.scatter_(1, ids, -torch.inf)
    tail = others.logsumexp(-1, keepdim=True).clamp(min=EMPTY)
    log_q = torch.cat([kept, tail], dim=-1).log_softmax(-1)
    rows, slope = objective.divergence(log_q, log_p, objective.beta)
    others.sub_(tail).exp_().mul_(slope[:, -1:])
    return rows, others.scatter_(1, ids, slope[:, :-1])


def _accumulate(gradients: _Gradients, head: _Head, slope: Tensor, rows: slice) -> None:
    """Carry the logits' gradient `[chunk, vocab]` back through the head."""
    if gradients.bias is not None:
        gradients.bias.add_(slope.sum(0))
    slope = slope.to(head.dtype)
    if gradients.hidden is not None:
        gradients.hidden[rows] = slope @ head.weight
    if gradients.weight is None:
        return
    if head.dtype == head.accumulate:
        gradients.weight.addmm_(slope.t(), head.hidden[rows])
        return
    # A product in bf16 is added to a sum in fp32, some tokens at a time: the whole product is as large as the head.
    step = max(1, CHUNK_BYTES // (4 * head.hidden.shape[1]))
    for first in range(0, slope.shape[1], step):
        gradients.weight[first : first + step] += slope[:, first : first + step].t() @ head.hidden[rows]


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _default_chunk(vocab: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocab))


def _chunks(positions: int, chunk: int) -> Iterator[slice]:
    for first in range(0, max(positions, 1), chunk):  # one empty chunk where there is no position
        yield slice(first, min(first + chunk, positions))


def _check(student: Dense, labels: Tensor, teacher: Dense | TopK | None, objective: _Objective) -> None:
    weight, temperature, beta = objective.teacher_weight, objective.temperature, objective.beta
    if not (0 <= weight <= 1 and 0 <= beta <= 1 and temperature > 0):
        raise UserError(
            f"teacher_weight {weight:g}, beta {beta:g}, temperature {temperature:g}",
            "the first two lie between 0 and 1, the temperature above 0",
        )
    if labels.shape != (student.positions,) or (teacher and teacher.positions != student.positions):
        known = f", {teacher.positions} of the teacher" if teacher else ""
        raise UserError(
            f"labels of shape {list(labels.shape)} for {student.positions} positions of the student{known}",
            "all must be of the same tokens",
        )
    if isinstance(teacher, TopK) and teacher.ids.numel() and (last := int(teacher.ids.max())) >= objective.shared:
        raise UserError(
            f"the stored teacher logits name token {last}, and only {objective.shared} tokens are compared",
            "store them again, from a head cut to the tokenizer's size",
        )
