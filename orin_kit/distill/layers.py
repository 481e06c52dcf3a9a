"""Which layer of the teacher a layer of the student is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from orin_kit.distill.recipe import Aligned
from orin_kit.distill.signals import Signal
from orin_kit.errors import UserError

DEFAULT_LAYERS = (6, 7, 8, 9)
TINY = torch.finfo(torch.float64).tiny
CKA_TOKENS = 4096  # that the search looks at: beyond it nothing moves, and its cost is linear in them


def choose_layers(asked: Sequence[int] | None, depth: int, field: str) -> tuple[int, ...]:
    """The layers a recipe asks for; by default 6 to 9, or the upper half of a student with fewer than 7.

    Raises:
        UserError: one of them is not in the student.
    """
    if asked is None:
        return tuple(layer for layer in DEFAULT_LAYERS if layer < depth) or tuple(range(depth // 2, depth))
    _check(asked, depth, "student", field)
    return tuple(asked)


def compared_layers(
    stage: Aligned, field: str, depth: int, teacher_depth: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The student's layers of a stage, and the teacher's they are compared with, as far as nothing is measured for it.

    Raises:
        UserError: layers are named that a model does not have, or not one for each.
    """
    layers = choose_layers(stage.layers, depth, f"{field}.layers")
    return layers, match_layers(stage, field, layers, depth, teacher_depth)


def match_layers(stage: Aligned, field: str, layers: Sequence[int], depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's layers by list or by relative depth; a search is `search_layers`.

    Raises:
        UserError: the list names layers the teacher does not have, or is of another length than `layers`.
    """
    if isinstance(stage.teacher_layers, str):
        return proportional(layers, depth, teacher_depth)
    listed = tuple(stage.teacher_layers)
    _check(listed, teacher_depth, "teacher", f"{field}.teacher_layers")
    if len(listed) != len(layers):
        what = f"{field}.teacher_layers names {len(listed)} layers, for {len(layers)} of the student ({list(layers)})"
        raise UserError(what, mend="name one for each")
    return listed


def proportional(layers: Sequence[int], depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's layer at the same relative depth, the last one for the last one."""
    return tuple(max(0, round((layer + 1) * teacher_depth / depth) - 1) for layer in layers)


def search_layers(similarity: Tensor, layers: Sequence[int]) -> tuple[int, ...]:
    """For each student layer (row) a teacher layer (column), so that the similarities' sum is the largest.

    A deeper layer of the student is never matched with an earlier one of the teacher; both may share one.

    Args:
        similarity: `[student layers, teacher layers]`.
        layers: which layer of the student each row is.
    """
    rising = sorted(range(len(layers)), key=lambda row: layers[row])
    similarity = similarity[rising]
    rows, columns = similarity.shape
    best = torch.zeros(rows, columns, dtype=torch.float64)  # of the rows so far, the last one at this column or before
    choice = torch.zeros(rows, columns, dtype=torch.int64)
    for row in range(rows):
        total = similarity[row].double() + (best[row - 1] if row else 0.0)
        best[row], choice[row] = torch.cummax(total, 0)
    matched = []
    column = columns - 1
    for row in reversed(range(rows)):
        column = int(choice[row, column])
        matched.append(column)
    found = dict(zip(rising, reversed(matched), strict=True))
    return tuple(found[row] for row in range(rows))


def layer_similarity(pairs: Iterable[tuple[Signal, Signal, Tensor]]) -> Tensor:
    """Linear CKA of every student layer with every teacher layer.

    Args:
        pairs: student's and teacher's signals with `hidden` states, and the mask bool `[batch, length]` of real tokens.

    Returns:
        fp64 `[student layers, teacher layers]`, each from 0 to 1.

    Source: Kornblith et al., arXiv:1905.00414: |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred features.
    """
    students: list[list[Tensor]] = []
    teachers: list[list[Tensor]] = []
    seen = 0
    for student, teacher, mask in pairs:
        students.append([h[mask].float() for h in student.hidden])
        teachers.append([h[mask].float() for h in teacher.hidden])
        seen += int(mask.sum())
        if seen >= CKA_TOKENS:
            break
    ours, theirs = (
        [_centred(torch.cat(layer)[:CKA_TOKENS]) for layer in zip(*side, strict=True)] for side in (students, teachers)
    )
    own, other = ([_norm(x, x) for x in side] for side in (ours, theirs))
    return torch.stack(
        [
            torch.stack([_norm(y, x).square() / (a * b).clamp(min=TINY) for y, b in zip(theirs, other, strict=True)])
            for x, a in zip(ours, own, strict=True)
        ]
    )


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _norm(x: Tensor, y: Tensor) -> Tensor:
    """Frobenius norm of `x^T y`, fp64."""
    norm: Tensor = torch.linalg.matrix_norm((x.T @ y).double())
    return norm


def _check(asked: Sequence[int], depth: int, whose: str, field: str) -> None:
    wrong = [layer for layer in asked if not 0 <= layer < depth]
    if wrong or not asked:
        what = f"{field}: the {whose} has layers 0 to {depth - 1}, not {', '.join(map(str, wrong)) or 'none'}"
        raise UserError(what, mend=f"name layers of the {whose}, or leave the field out")
