"""GPTQ: round a weight column by column, and let the columns to come make up for what each rounding lost.

Frantar et al., arXiv 2210.17323, algorithm 1; the reference is IST-DASLab/gptq. The scales of a group are chosen when
its first column comes up, from the weights as they are by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orin_kit.errors import UserError
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.packing import PackedWeight, middle, pack
from orin_kit.quantize.int4 import quantize_groups
from orin_kit.quantize.sequential import Fold

BLOCK = 128  # columns after which the rest of the weight is brought up to date
DAMPING = (0.01, 0.1, 1.0)  # of the mean of the Hessian's diagonal; the next where it is singular still


@dataclass
class Hessian:
    """`H = 2 mean(x x^T)` of a linear's inputs, collected batch by batch.

    Attributes:
        count: inputs in all, known before.
        matrix: fp32 `[in, in]`.
    """

    count: int
    matrix: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add inputs `[..., in]`."""
        x = x.flatten(0, -2).float()
        if self.matrix.ndim == 0:
            self.matrix = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.matrix.addmm_(x.T, x, alpha=2 / self.count)


@dataclass(frozen=True)
class Gptq:
    """See `sequential.Method`.

    Attributes:
        act_order: round the columns with the largest inputs first. Groups stay where they are, with scales chosen
            before the first column, as in llm-compressor's `actorder: weight`: groups of sorted columns would cost
            every runtime a gather of its inputs, and compressed-tensors does not load them any more.
    """

    act_order: bool = False

    def statistics(self, count: int, scheme: WeightScheme) -> Hessian:
        return Hessian(count)

    @torch.no_grad()
    def quantize(
        self, module: nn.Module, read: Mapping[Fold, Hessian], scheme: WeightScheme, prefix: str
    ) -> dict[str, PackedWeight]:
        quantized: dict[str, PackedWeight] = {}
        for fold, hessian in read.items():
            dead, order, factor = self._factor(hessian.matrix, prefix + fold.consumers[0])
            hessian.matrix = torch.zeros(())  # 0.3 GB for the down projection of a 1.5B model
            for name in fold.consumers:
                weight = module.get_submodule(name).get_parameter("weight")
                weight[:, dead] = 0  # no input was ever there, and 0 costs no group anything
                quantized[name] = solve(weight, factor, scheme, order, prefix + name)
                weight.copy_(torch.from_numpy(quantized[name].dense()))
        return quantized

    def _factor(self, hessian: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Which columns have no inputs `[in]`, the order `[in]` to take columns in, and `inverse_factor`."""
        diagonal = hessian.diagonal()
        if not torch.isfinite(diagonal).all():
            what = f"the inputs of {name} are not finite on the calibration text"
            raise UserError(what, mend="get the checkpoint again or train it again")
        dead = diagonal == 0
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else None
        diagonal[dead] = 1
        return dead, order, inverse_factor(hessian if order is None else hessian[order][:, order])


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, `U^T U = (H + damping)^-1`, fp32 `[in, in]`.

    Row i of U says how the columns after i make up for an error in column i; `U[i, i]^2` is the paper's
    `[H_F^-1]_qq` once the columns before i are done.

    Raises:
        RuntimeError: H has negative eigenvalues, which no `x x^T` has.
    """
    mean = hessian.diagonal().mean()
    for damping in DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower, out=damped)
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
    raise RuntimeError("GPTQ's Hessian is not positive")


def solve(
    weight: torch.Tensor, factor: torch.Tensor, scheme: WeightScheme, order: torch.Tensor | None, name: str
) -> PackedWeight:
    """Quantize a weight.

    Args:
        weight: fp32 `[out, in]`.
        factor: see `inverse_factor`; of sorted columns where `order` is given.
        scheme: bits, group size, symmetry.
        order: int64 `[in]`, columns from the first taken to the last.
        name: for errors.

    Raises:
        UserError: weights are NaN or infinite.
    """
    assert scheme.group_size is not None
    groups = _Groups(scheme, tuple(weight.shape), name)
    columns = weight.T.clone()  # rows of this are next to each other in memory
    if order is not None:
        groups.choose(weight)
        columns = columns[order]
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    block = max(BLOCK, scheme.group_size)
    for first in range(0, len(columns), block):
        last = min(first + block, len(columns))
        part, local = columns[first:last], factor[first:last, first:last]
        errors = torch.empty_like(part)
        for i in range(last - first):
            column = first + i
            if order is None and column % scheme.group_size == 0:
                groups.choose(part[i : i + scheme.group_size].T, column // scheme.group_size)
            code, value = groups.round(part[i], (column if order is None else int(order[column])))
            codes[column] = code
            errors[i] = (part[i] - value) / local[i, i]
            part[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    if order is not None:
        codes[order] = codes.clone()
    return groups.packed(codes.T.cpu().numpy())


class _Groups:
    """Scales and zero points of a weight `[out, in]`, chosen group by group.

    Args:
        scheme: bits, group size, symmetry.
        shape: `(out, in)`.
        name: for errors.
    """

    def __init__(self, scheme: WeightScheme, shape: tuple[int, ...], name: str) -> None:
        assert scheme.group_size is not None
        self.scheme, self.size, self.name = scheme, scheme.group_size, name
        count = shape[1] // self.size
        self.scales = np.empty((shape[0], count), np.float16)
        self.zeros = np.full((shape[0], count), middle(scheme.bits), np.uint8)
        self._live: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def choose(self, weight: torch.Tensor, first: int = 0) -> None:
        """Choose for the groups from number `first` on that these columns `[out, n * group_size]` are."""
        chosen = quantize_groups(
            weight.cpu().numpy(), self.size, bits=self.scheme.bits, symmetric=self.scheme.symmetric, name=self.name
        )
        groups = slice(first, first + chosen.scales.shape[1])
        self.scales[:, groups] = chosen.scales
        if chosen.zero_points is not None:
            self.zeros[:, groups] = chosen.zero_points
        for group in range(groups.start, groups.stop):
            scale, zero = (torch.from_numpy(x[:, group].astype(np.float32)) for x in (self.scales, self.zeros))
            self._live[group] = scale.to(weight.device), zero.to(weight.device)

    def round(self, column: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, and what they stand for, of column number `index` `[out]`."""
        scale, zero = self._live[index // self.size]
        code = (column / scale).round_().add_(zero).clamp_(0, (1 << self.scheme.bits) - 1)
        return code.to(torch.uint8), (code - zero) * scale

    def packed(self, codes: NDArray[np.uint8]) -> PackedWeight:
        """Of the codes `[out, in]`."""
        packed = pack(np.ascontiguousarray(codes), self.scheme.bits)
        return PackedWeight(self.scheme.bits, packed, self.scales, None if self.scheme.symmetric else self.zeros)
